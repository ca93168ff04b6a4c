"""What happens to the agent. Each event is a plain fact; the clock comes with it."""

from dataclasses import dataclass, field

from sublet_agent.core.checkpoints import Stall
from sublet_agent.core.deadlines import Over
from sublet_agent.core.exit_reasons import ExitEvidence
from sublet_agent.core.records import UploadKind
from sublet_agent.core.runner_port import Measure
from sublet_agent.core.supply import Facts
from sublet_agent.core.uploads import Moved
from sublet_contracts.reasons import Reason
from sublet_contracts.versions import Reads
from sublet_contracts.wire import Message


@dataclass(frozen=True)
class MessageArrived:
    """A message of the broker's, in its place in the session. Acknowledge it after the save."""

    message: Message


@dataclass(frozen=True)
class Joined:
    """The session is live with this broker; `MessageArrived(welcome)` follows. `broker_ahead_ms`:
    how far its clock is ahead of ours now."""

    broker: str
    broker_ahead_ms: int = 0
    broker_reads: Reads = field(default_factory=dict)
    """The versions of documents that it reads."""


@dataclass(frozen=True)
class Disconnected:
    """The session is over. Runs go on."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class ImageLookedUp:
    """It is known what the tag of a lease's job means, before that lease is signed."""

    lease_id: str
    image: str
    """by its content, as in the lease document"""


@dataclass(frozen=True)
class LookUpFailed:
    """The registry could not be asked what a tag means, or knows of no such image. `reason`: None
    where it isn't the image's trouble."""

    lease_id: str
    reason: Reason | None
    detail: str


@dataclass(frozen=True)
class ImageReady:
    """The image is here."""

    lease_id: str
    image: str = ""
    """which it is, by its content; '': the runner uses none"""


@dataclass(frozen=True)
class Restored:
    """Inputs and checkpoint are in place."""

    lease_id: str


@dataclass(frozen=True)
class PreparationFailed:
    """Pulling, restoring or starting failed for good."""

    lease_id: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Observed:
    """The runner's word on a run. Times in ms of the agent's clock; ran_ms: wall time it ran."""

    lease_id: str
    running: bool
    started_ms: int
    ran_ms: int
    end: ExitEvidence | None = None
    """what was seen of its end, once it has exited"""
    detail: str = ""


@dataclass(frozen=True)
class Vanished:
    """The runner knows nothing of a run that should exist."""

    lease_id: str


@dataclass(frozen=True)
class DeadlinePassed:
    """The watchdog has ended the run. It comes before the end itself is observed."""

    lease_id: str
    over: Over


@dataclass(frozen=True)
class CheckpointFound:
    """A whole checkpoint lies in out/ (renamed, DONE is there)."""

    lease_id: str
    step: int
    overtaken: tuple[int, ...] = ()
    """older ones that were first seen at the same look: too many to be told one by one"""
    age_ms: int = 0
    """how long ago it was complete: what the run has done since isn't in it"""
    unsynced: bool = False
    """whether nobody has made it durable on this disk"""


@dataclass(frozen=True)
class FolderScanned:
    """The run has exited and its folder was read once more: what is there now is all."""

    lease_id: str
    steps: tuple[int, ...]
    unsynced: tuple[int, ...] = ()
    """those of them that nobody has made durable on this disk"""
    finished: bool = True
    """whether exit code 0 means that the job had finished, even where it was asked to stop"""


@dataclass(frozen=True)
class Uploaded:
    """All chunks and the index are at the broker."""

    lease_id: str
    kind: UploadKind
    step: int
    index_digest: str
    total_bytes: int
    sent_bytes: int = 0
    """of its content, what was sent: the rest was there already"""
    stall_ms: int | None = None
    """for how long saving it held the job's loop, by the job's word; None: it doesn't say"""


@dataclass(frozen=True)
class UploadMoved:
    """How far an upload is."""

    lease_id: str
    kind: UploadKind
    step: int
    moved: Moved


@dataclass(frozen=True)
class UploadFailed:
    """It can't be uploaded: invalid (torn, links, too large) or refused; `stale`: the epoch is."""

    lease_id: str
    kind: UploadKind
    step: int
    detail: str
    stale: bool = False
    nothing: bool = False
    """there are no partial outputs to upload"""


@dataclass(frozen=True)
class Progressed:
    """What the job says of its progress."""

    lease_id: str
    step: int
    total_steps: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FileSaved:
    """The file that the job seems to save its state to, as it sees it, while nothing that could be
    resumed was found."""

    lease_id: str
    path: str


@dataclass(frozen=True)
class StallTold:
    """What the job says, in a checkpoint, of how long saving has held its loop."""

    lease_id: str
    stall: Stall


@dataclass(frozen=True)
class CheckpointOpened:
    """Whether the job has opened what it was restored from."""

    lease_id: str
    opened: bool


@dataclass(frozen=True)
class DiskUsed:
    """Bytes in the run's folders."""

    lease_id: str
    used_bytes: int


@dataclass(frozen=True)
class Measured:
    """What the run uses of the machine, as its runner measured it."""

    lease_id: str
    measure: Measure


@dataclass(frozen=True)
class DiskFull:
    """This machine's own disk is full."""

    lease_id: str
    detail: str


@dataclass(frozen=True)
class RulesBroken:
    """The job has filled its folders with what nobody can be made to read. `reason`: its own."""

    lease_id: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Quarantined:
    """Handling this run brought an unexpected error. `detail`: for the owner, and for us."""

    lease_id: str
    detail: str


@dataclass(frozen=True)
class Removed:
    """Container and folder of a run are gone."""

    lease_id: str


@dataclass(frozen=True)
class PrepareDone:
    """A job that we may get soon is prepared (or can't be)."""

    job_id: str
    ready: bool
    detail: str = ""


@dataclass(frozen=True)
class DrainAsked:
    """The owner wants the devices (reclaimed) or stops the agent (provider_drained)."""

    reason: Reason
    grace_ms: int
    then_stop: bool = True


@dataclass(frozen=True)
class OfferAgain:
    """The owner puts the devices back on the market."""


@dataclass(frozen=True)
class FactsRead:
    """The machine was looked at: this is what is there. `looked_ms`: when the look began."""

    facts: Facts
    looked_ms: int


@dataclass(frozen=True)
class DeviceFailed:
    """The driver reported a fault of a device (a hardware Xid, memory that can't be corrected)."""

    device_id: str
    detail: str


@dataclass(frozen=True)
class StartTested:
    """The machine has tried to start something by itself; `trouble`: '' if that went well."""

    trouble: str


Event = (
    MessageArrived
    | Joined
    | Disconnected
    | Tick
    | ImageLookedUp
    | LookUpFailed
    | ImageReady
    | Restored
    | PreparationFailed
    | Observed
    | DeadlinePassed
    | Vanished
    | CheckpointFound
    | FolderScanned
    | UploadMoved
    | Uploaded
    | UploadFailed
    | Progressed
    | StallTold
    | CheckpointOpened
    | FileSaved
    | DiskUsed
    | Measured
    | DiskFull
    | RulesBroken
    | Quarantined
    | Removed
    | PrepareDone
    | DrainAsked
    | OfferAgain
    | FactsRead
    | DeviceFailed
    | StartTested
)
