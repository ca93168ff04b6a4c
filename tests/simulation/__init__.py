"""Simulated markets: the real cores on a virtual clock, under faults, watched by an auditor."""
