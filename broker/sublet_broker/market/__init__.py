"""Pure decisions: no IO, no clock, no randomness of its own. Read in the order of README.md."""
