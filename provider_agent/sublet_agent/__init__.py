"""The provider's agent: it offers idle GPUs and runs the jobs that are leased on them."""
