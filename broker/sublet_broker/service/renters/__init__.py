"""What renters and the operator ask for: jobs, accounts, countersignatures."""
