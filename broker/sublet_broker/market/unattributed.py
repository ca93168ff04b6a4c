"""Ends that nobody owns to: a signal ended the run, and nothing says who sent it.

Nobody can tell an owner's `kill -9` from one that the job sent itself. If such an end always cost
nothing, a job that kills itself before it saves would compute for free; if it were always paid, an
owner could be paid for work that he destroys. So a few are free, by counts that anybody can make
again from the settlements in the log (rules.py of contracts has them); beyond those the end is paid
in full, and the job does not go on by itself.
"""

from sublet_contracts.reasons import Reason
from sublet_contracts.rules import FREE_KILLS_A_JOB, FREE_KILLS_A_RENTER_AND_WEEK


def reason_that_counts(reason: Reason, *, of_job: int, of_renter_this_week: int) -> Reason:
    """Return the reason by which a lease is settled. The counts: settlements so far by
    `killed_unattributed`, of the job in all, and of its renter within the last week."""
    if reason is not Reason.KILLED_UNATTRIBUTED:
        return reason
    within = of_job < FREE_KILLS_A_JOB and of_renter_this_week < FREE_KILLS_A_RENTER_AND_WEEK
    return reason if within else Reason.KILLED_TOO_OFTEN
