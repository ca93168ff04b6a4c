"""The agent's edges, one library each: Docker, processes, NVML, this machine."""
