"""Why a run ended or a job changed state; for each reason, whose fault it is and what follows.

Every transition carries one of these. `pays` decides what is paid (see rules.py), `next` decides
what becomes of the job, `evidence` says what must have been seen before anybody may give the
reason. Nothing else in the code base may know any of these.
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


class Pays(StrEnum):
    """What of a run's device time is payable."""

    ALL = "all"
    DURABLE = "durable"
    """Up to the newest durable checkpoint: whoever ended the run, it was not the renter."""


class Reason(StrEnum):
    """The one list of endings."""

    SUCCEEDED = "succeeded"
    JOB_FAILED = "job_failed"
    OUT_OF_MEMORY = "out_of_memory"
    DISK_LIMIT = "disk_limit"
    IMAGE_UNKNOWN = "image_unknown"
    IMAGE_UNAVAILABLE = "image_unavailable"
    PULL_FAILED = "pull_failed"
    IMAGE_NOT_ALLOWED = "image_not_allowed"
    INPUT_UNAVAILABLE = "input_unavailable"
    CHECKPOINT_INVALID = "checkpoint_invalid"
    CANCELLED = "cancelled"
    JOB_EXPIRED = "job_expired"
    PAUSED_BY_RENTER = "paused_by_renter"
    BUDGET_EXHAUSTED = "budget_exhausted"
    NO_PROGRESS = "no_progress"
    STALLED = "stalled"
    YIELDED = "yielded"
    KILLED_UNATTRIBUTED = "killed_unattributed"
    KILLED_TOO_OFTEN = "killed_too_often"
    RECLAIMED = "reclaimed"
    PROVIDER_DRAINED = "provider_drained"
    PROVIDER_LOST = "provider_lost"
    RUN_KILLED = "run_killed"
    RUN_VANISHED = "run_vanished"
    RUN_QUARANTINED = "run_quarantined"
    DEVICE_FAILED = "device_failed"
    ENGINE_STOPPED = "engine_stopped"
    START_FAILED = "start_failed"
    PROVIDER_DISK_FULL = "provider_disk_full"
    LEASE_REFUSED = "lease_refused"
    LEASE_UNANSWERED = "lease_unanswered"
    RESTORE_FAILED = "restore_failed"
    EVIDENCE_OF_FRAUD = "evidence_of_fraud"


IMAGE_REASONS = frozenset({Reason.IMAGE_UNKNOWN, Reason.PULL_FAILED, Reason.IMAGE_NOT_ALLOWED})
"""The image could not be had: found out before the lease was signed, or by its pull."""


@dataclass(frozen=True)
class Meaning:
    """What a reason implies, a sentence for the people who read it, and what it rests on."""

    fault: Fault
    next: Next
    pays: Pays
    says: str
    evidence: str


MEANINGS: dict[Reason, Meaning] = {
    Reason.SUCCEEDED: Meaning(
        Fault.NOBODY,
        Next.FINISH,
        Pays.ALL,
        "the command exited with 0",
        "exit code 0; where anybody had asked the run to stop, also the job's own word that "
        "its work was done",
    ),
    Reason.JOB_FAILED: Meaning(
        Fault.RENTER,
        Next.FAIL,
        Pays.ALL,
        "the command exited with an error; see its logs",
        "a code other than 0 that the job returned by itself, a signal that its own mistake "
        "brought (a bad address, an abort), or more processes than a run may have",
    ),
    Reason.OUT_OF_MEMORY: Meaning(
        Fault.RENTER,
        Next.FAIL,
        Pays.ALL,
        "the job used more memory than it asked for",
        "the kernel's record of an out-of-memory kill in this run's own process tree",
    ),
    Reason.DISK_LIMIT: Meaning(
        Fault.RENTER,
        Next.FAIL,
        Pays.ALL,
        "the job wrote more to disk than it asked for",
        "the agent's measure of the run's folders",
    ),
    Reason.IMAGE_UNKNOWN: Meaning(
        Fault.NOBODY,
        Next.RETRY,
        Pays.DURABLE,
        "the registry has no such image, as this machine was told",
        "the registry's answer that the manifest is unknown",
    ),
    Reason.IMAGE_UNAVAILABLE: Meaning(
        Fault.RENTER,
        Next.FAIL,
        Pays.ALL,
        "the image can't be had: no machine that was asked found it",
        "`image_unknown` from three providers, or twice from all that fit over five minutes",
    ),
    Reason.PULL_FAILED: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "this machine could not pull the image",
        "any other error of the pull: the registry busy or unreachable, no bytes for too "
        "long, another architecture, no room",
    ),
    Reason.IMAGE_NOT_ALLOWED: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "this machine's owner does not let renters use that image",
        "the owner's list of images and registries",
    ),
    Reason.INPUT_UNAVAILABLE: Meaning(
        Fault.RENTER,
        Next.FAIL,
        Pays.ALL,
        "an input's content is not at the broker",
        "the broker's answer to the agent that asked for it",
    ),
    Reason.CHECKPOINT_INVALID: Meaning(
        Fault.RENTER,
        Next.FAIL,
        Pays.ALL,
        "the job wrote a checkpoint that breaks the rules",
        "the agent's or the verifier's reading of it",
    ),
    Reason.CANCELLED: Meaning(
        Fault.RENTER,
        Next.CANCEL,
        Pays.ALL,
        "the renter cancelled the job",
        "the renter's signed request",
    ),
    Reason.JOB_EXPIRED: Meaning(
        Fault.RENTER,
        Next.CANCEL,
        Pays.ALL,
        "nobody took the job before it expired",
        "the broker's clock and the job's own date",
    ),
    Reason.PAUSED_BY_RENTER: Meaning(
        Fault.RENTER,
        Next.PAUSE,
        Pays.ALL,
        "the renter paused the job",
        "the renter's signed request",
    ),
    Reason.BUDGET_EXHAUSTED: Meaning(
        Fault.RENTER,
        Next.PAUSE,
        Pays.ALL,
        "the budget is used up; top it up and the job goes on",
        "receipts that near the lease's hold, and an order of the broker's or the agent's to stop",
    ),
    Reason.NO_PROGRESS: Meaning(
        Fault.RENTER,
        Next.PAUSE,
        Pays.ALL,
        "several attempts in a row made no durable step",
        "the broker's count of leases without a new durable step",
    ),
    Reason.STALLED: Meaning(
        Fault.RENTER,
        Next.PAUSE,
        Pays.ALL,
        "the job showed no sign of life for as long as it was to be waited for",
        "what its agent reported, by the broker's clock: for the job's own `stall_ms` no new step "
        "and no durable checkpoint; of a job that tells no steps, no output or computing either",
    ),
    Reason.YIELDED: Meaning(
        Fault.RENTER,
        Next.RETRY,
        Pays.ALL,
        "the job stopped by itself and asked to be resumed (exit 75)",
        "exit code 75 that nobody had asked for",
    ),
    Reason.KILLED_UNATTRIBUTED: Meaning(
        Fault.NOBODY,
        Next.RETRY,
        Pays.DURABLE,
        "a signal ended the run, and nothing says who sent it",
        "a signal such as KILL or TERM without an order of ours, an event of the engine, a "
        "sender that was seen outside of the run, or an out-of-memory record; 128 + such a signal "
        "that the job returned soon after the signal had ended another of its processes, or that "
        "any job returned where the kernel doesn't tell the agent how processes end (which takes "
        "root, CAP_NET_ADMIN or Linux 6.6, in the machine's own pid namespace); or an end of which "
        "nobody knows the code",
    ),
    Reason.KILLED_TOO_OFTEN: Meaning(
        Fault.RENTER,
        Next.FAIL,
        Pays.ALL,
        "a signal that nobody owns to ended the run once too often for it to cost nothing",
        "`killed_unattributed`, beyond what is allowed for each job and for each renter and "
        "week, by the settlements in the log",
    ),
    Reason.RECLAIMED: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "the owner took the device back",
        "the owner's command, in the agent's journal",
    ),
    Reason.PROVIDER_DRAINED: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "the agent was stopped",
        "the owner's command or signal, in the agent's journal",
    ),
    Reason.PROVIDER_LOST: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "nothing was heard from the machine for too long",
        "the broker's clock",
    ),
    Reason.RUN_KILLED: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "the run was killed on the provider's machine",
        "a signal whose sender was seen outside of the run",
    ),
    Reason.RUN_VANISHED: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "the agent came back and its run was gone",
        "a runner that no longer knows the run, or a machine that was started anew meanwhile",
    ),
    Reason.RUN_QUARANTINED: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "the agent could not handle the run and has put it aside",
        "an unexpected error in the agent while it handled this run; its folder is kept",
    ),
    Reason.DEVICE_FAILED: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "a device of the run failed: its GPU no longer answers, or its driver reported a fault",
        "the driver's answer for the device, or its fault record, within the run's time",
    ),
    Reason.ENGINE_STOPPED: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "the machine's container engine stopped the run, or went away",
        "the engine's own event, or the engine's silence at the time of the end",
    ),
    Reason.START_FAILED: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "the provider's engine could not start the run",
        "the engine's answer to the start",
    ),
    Reason.PROVIDER_DISK_FULL: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "the provider's disk is full",
        "the agent's measure of the disk, or the system's error",
    ),
    Reason.LEASE_REFUSED: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "the agent refused the lease",
        "the agent's answer",
    ),
    Reason.LEASE_UNANSWERED: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "the agent did not sign the lease in time",
        "the broker's clock",
    ),
    Reason.RESTORE_FAILED: Meaning(
        Fault.BROKER,
        Next.RETRY,
        Pays.DURABLE,
        "the checkpoint could not be restored; an older one is used",
        "the agent's reading of what the broker sent",
    ),
    Reason.EVIDENCE_OF_FRAUD: Meaning(
        Fault.PROVIDER,
        Next.RETRY,
        Pays.DURABLE,
        "the provider signed two histories of the same lease",
        "two signed receipts that can't both be true",
    ),
}
