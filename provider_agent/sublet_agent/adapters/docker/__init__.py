"""Runs as containers, through the Docker SDK."""
