"""Run jobs on other people's idle GPUs."""
