"""Ray: match shards as actors, verification and settlement as tasks, and what brings it back."""
