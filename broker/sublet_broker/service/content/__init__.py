"""Whose bytes are here, and how long they are kept."""
