"""The connection to the broker, and what outlives it: journal, log spool, reserve."""
