"""The page of what was found when we tried to break it: tests/RELIABILITY.md, made from records."""
