"""The edges: one library each."""
