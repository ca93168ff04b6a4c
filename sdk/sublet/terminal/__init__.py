"""What a person at a terminal sees: progress, a job followed, plain text."""
