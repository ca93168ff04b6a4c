"""One transaction with all that every use-case does in it, and what is told after it."""
