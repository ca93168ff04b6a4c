"""Whole markets of real processes, sockets and containers, and what kill -9 does to them."""
