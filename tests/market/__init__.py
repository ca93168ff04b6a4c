"""The pure market."""
