"""Use-cases: load, decide (market), commit facts and outbox together. Ports are Protocols."""
