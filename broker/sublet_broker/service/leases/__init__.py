"""What befalls a lease: candidates, standby, orders, closing, settlement."""
