"""What agents say: sessions, offers, reports of runs, checkpoints, receipts."""
