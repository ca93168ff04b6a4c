"""Runs as child process groups: for a first look and for tests; they isolate nothing."""
