"""The broker: it matches jobs with offers, supervises runs and settles the money."""
