"""Why a run ended or a job changed state; for each reason, whose fault it is and what follows.

Every transition carries one of these. Fault decides what is paid (see rules.py), `next` decides
what becomes of the job. Nothing else in the code base may know either.
"""

from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """Who answers for an ending."""

    NOBODY = "nobody"
    RENTER = "renter"
    PROVIDER = "provider"
    BROKER = "broker"


class Next(StrEnum):
    """What the job does after a run that ended so."""

    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"
    PAUSE = "pause"
    RETRY = "retry"


class Reason(StrEnum):
    """The one list of endings."""

    SUCCEEDED = "succeeded"
    JOB_FAILED = "job_failed"
    OUT_OF_MEMORY = "out_of_memory"
    DISK_LIMIT = "disk_limit"
    IMAGE_UNAVAILABLE = "image_unavailable"
    INPUT_UNAVAILABLE = "input_unavailable"
    CHECKPOINT_INVALID = "checkpoint_invalid"
    CANCELLED = "cancelled"
    JOB_EXPIRED = "job_expired"
    PAUSED_BY_RENTER = "paused_by_renter"
    BUDGET_EXHAUSTED = "budget_exhausted"
    NO_PROGRESS = "no_progress"
    YIELDED = "yielded"
    RECLAIMED = "reclaimed"
    PROVIDER_DRAINED = "provider_drained"
    PROVIDER_LOST = "provider_lost"
    RUN_KILLED = "run_killed"
    RUN_VANISHED = "run_vanished"
    START_FAILED = "start_failed"
    PROVIDER_DISK_FULL = "provider_disk_full"
    LEASE_REFUSED = "lease_refused"
    LEASE_UNANSWERED = "lease_unanswered"
    RESTORE_FAILED = "restore_failed"
    EVIDENCE_OF_FRAUD = "evidence_of_fraud"


@dataclass(frozen=True)
class Meaning:
    """What a reason implies, and a sentence for the people who read it."""

    fault: Fault
    next: Next
    says: str


MEANINGS: dict[Reason, Meaning] = {
    Reason.SUCCEEDED: Meaning(Fault.NOBODY, Next.FINISH, "the command exited with 0"),
    Reason.JOB_FAILED: Meaning(
        Fault.RENTER, Next.FAIL, "the command exited with an error; see its logs"
    ),
    Reason.OUT_OF_MEMORY: Meaning(
        Fault.RENTER, Next.FAIL, "the job used more memory than it asked for"
    ),
    Reason.DISK_LIMIT: Meaning(
        Fault.RENTER, Next.FAIL, "the job wrote more to disk than it asked for"
    ),
    Reason.IMAGE_UNAVAILABLE: Meaning(
        Fault.RENTER, Next.FAIL, "the image can't be had, or its pin doesn't match"
    ),
    Reason.INPUT_UNAVAILABLE: Meaning(
        Fault.RENTER, Next.FAIL, "an input's content is not at the broker"
    ),
    Reason.CHECKPOINT_INVALID: Meaning(
        Fault.RENTER, Next.FAIL, "the job wrote a checkpoint that breaks the rules"
    ),
    Reason.CANCELLED: Meaning(Fault.RENTER, Next.CANCEL, "the renter cancelled the job"),
    Reason.JOB_EXPIRED: Meaning(Fault.RENTER, Next.CANCEL, "nobody took the job before it expired"),
    Reason.PAUSED_BY_RENTER: Meaning(Fault.RENTER, Next.PAUSE, "the renter paused the job"),
    Reason.BUDGET_EXHAUSTED: Meaning(
        Fault.RENTER, Next.PAUSE, "the budget is used up; top it up and the job goes on"
    ),
    Reason.NO_PROGRESS: Meaning(
        Fault.RENTER, Next.PAUSE, "several attempts in a row made no durable step"
    ),
    Reason.YIELDED: Meaning(
        Fault.RENTER, Next.RETRY, "the job stopped by itself and asked to be resumed (exit 75)"
    ),
    Reason.RECLAIMED: Meaning(Fault.PROVIDER, Next.RETRY, "the owner took the device back"),
    Reason.PROVIDER_DRAINED: Meaning(Fault.PROVIDER, Next.RETRY, "the agent was stopped"),
    Reason.PROVIDER_LOST: Meaning(
        Fault.PROVIDER, Next.RETRY, "nothing was heard from the machine for too long"
    ),
    Reason.RUN_KILLED: Meaning(
        Fault.PROVIDER, Next.RETRY, "the run was killed on the provider's machine"
    ),
    Reason.RUN_VANISHED: Meaning(
        Fault.PROVIDER, Next.RETRY, "the agent came back and its run was gone"
    ),
    Reason.START_FAILED: Meaning(
        Fault.PROVIDER, Next.RETRY, "the provider's engine could not start the run"
    ),
    Reason.PROVIDER_DISK_FULL: Meaning(Fault.PROVIDER, Next.RETRY, "the provider's disk is full"),
    Reason.LEASE_REFUSED: Meaning(Fault.PROVIDER, Next.RETRY, "the agent refused the lease"),
    Reason.LEASE_UNANSWERED: Meaning(
        Fault.PROVIDER, Next.RETRY, "the agent did not sign the lease in time"
    ),
    Reason.RESTORE_FAILED: Meaning(
        Fault.BROKER, Next.RETRY, "the checkpoint could not be restored; an older one is used"
    ),
    Reason.EVIDENCE_OF_FRAUD: Meaning(
        Fault.PROVIDER, Next.RETRY, "the provider signed two histories of the same lease"
    ),
}
