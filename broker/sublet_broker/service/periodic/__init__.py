"""What happens because time passes: scheduling, supervision, settling."""
