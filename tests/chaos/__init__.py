"""Real processes under real faults: see README.md."""
