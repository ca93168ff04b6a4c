"""The agent's decisions, pure: what a run is, which lease to take, what happens next."""
