"""Content on disk: files named by their hash, the disk's room, a checkpoint's check."""
