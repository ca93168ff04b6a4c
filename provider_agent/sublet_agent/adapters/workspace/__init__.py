"""The folders of a run: what goes in, what comes out, checkpoints found and moved."""
