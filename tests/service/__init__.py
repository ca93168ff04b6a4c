"""The use-cases, in commands and documents."""
