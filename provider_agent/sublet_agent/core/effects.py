"""What the core wants done, after its changes are on disk. Every effect may be done twice.

Durable changes travel beside them as one `Save`: the shell commits it in one transaction first.
"""

from dataclasses import dataclass, field

from sublet_agent.core.deadlines import Over
from sublet_agent.core.records import IssuedOffer, RunRecord, UploadKind
from sublet_contracts.envelope import Envelope
from sublet_contracts.wire import Message

UNEXPECTED = "unexpected, please report it"
"""how a line begins that tells of a mistake of ours"""


@dataclass(frozen=True)
class Send:
    """Send an unreliable message, if the session is live."""

    message: Message


@dataclass(frozen=True)
class LookUpImage:
    """Find out what a tag means, for a lease that waits for it -> ImageLookedUp | LookUpFailed."""

    lease_id: str
    image: str


@dataclass(frozen=True)
class Pull:
    """Have the image ready -> ImageReady | PreparationFailed."""

    lease_id: str


@dataclass(frozen=True)
class Restore:
    """Place inputs and checkpoint -> Restored | PreparationFailed."""

    lease_id: str


@dataclass(frozen=True)
class Start:
    """Create and start the run unless it exists -> Observed | PreparationFailed."""

    lease_id: str


@dataclass(frozen=True)
class AskStop:
    """Write STOP and send TERM."""

    lease_id: str


@dataclass(frozen=True)
class AskSave:
    """Write SAVE."""

    lease_id: str


@dataclass(frozen=True)
class Kill:
    """Kill every process of the run, now."""

    lease_id: str


@dataclass(frozen=True)
class ScanFolder:
    """Read the folder of a run that has exited -> FolderScanned."""

    lease_id: str


@dataclass(frozen=True)
class Upload:
    """Move a checkpoint or the outputs to the broker -> Uploaded | UploadFailed."""

    lease_id: str
    kind: UploadKind
    step: int
    until_ms: int = 0
    """what of partial outputs is not there by then stays behind; 0: it takes as long as it takes"""


@dataclass(frozen=True)
class RenewDeadline:
    """Write down when the run is to be gone unless this is done again: the watchdog ends it then,
    whatever has become of the agent."""

    lease_id: str
    in_ms: int
    over: Over


@dataclass(frozen=True)
class AckStep:
    """Write ack/step-N: durable off this machine."""

    lease_id: str
    step: int


@dataclass(frozen=True)
class DeleteSteps:
    """Delete local checkpoints."""

    lease_id: str
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Remove:
    """Kill and remove the container, delete the folder -> Removed."""

    lease_id: str


@dataclass(frozen=True)
class PutAside:
    """Kill and remove the container of a quarantined run; its folder is kept as evidence."""

    lease_id: str


@dataclass(frozen=True)
class PrepareJob:
    """Pull the image and restore the checkpoint of a job that may come -> PrepareDone."""

    job: Envelope
    checkpoint: Envelope | None
    image: str = ""
    """what the job's tag meant when it first ran; '': it has not, or has none"""


@dataclass(frozen=True)
class UnprepareJob:
    """Drop what was prepared."""

    job_id: str


@dataclass(frozen=True)
class SendLogs:
    """The broker has all lines before `next_number`: send on from there."""

    lease_id: str
    next_number: int


@dataclass(frozen=True)
class AddLogLine:
    """Put a line of stream `sublet` into the run's log."""

    lease_id: str
    text: str


@dataclass(frozen=True)
class Say:
    """Tell the owner."""

    text: str


@dataclass(frozen=True)
class Unexpected:
    """A mistake of ours: something came that can't happen to a run in its phase (run_phases.py; the
    run is left as it is), or an error that nobody had thought of (the run is quarantined). The
    owner's log says so, tests and the simulator fail."""

    lease_id: str
    """'': it was about no run"""
    text: str


@dataclass(frozen=True)
class ReadFacts:
    """Look at the machine now -> FactsRead. Something waits for it."""


@dataclass(frozen=True)
class StartTest:
    """Start something that does nothing, with these devices -> StartTested."""

    device_ids: tuple[str, ...]


@dataclass(frozen=True)
class Done:
    """Everything is handed back: the agent may exit."""


Effect = (
    Send
    | LookUpImage
    | Pull
    | Restore
    | Start
    | AskStop
    | AskSave
    | Kill
    | ScanFolder
    | Upload
    | RenewDeadline
    | AckStep
    | DeleteSteps
    | Remove
    | PutAside
    | PrepareJob
    | UnprepareJob
    | SendLogs
    | AddLogLine
    | Say
    | Unexpected
    | ReadFacts
    | StartTest
    | Done
)


@dataclass(frozen=True)
class Queued:
    """A reliable message for the outbox, and the lease it belongs to ('' for none)."""

    mid: int
    lease_id: str
    message: Message


@dataclass
class Save:
    """Durable changes of one step: all or nothing."""

    runs: dict[str, RunRecord] = field(default_factory=dict)
    forget_runs: list[str] = field(default_factory=list)
    queue: list[Queued] = field(default_factory=list)
    drop_messages_of: list[str] = field(default_factory=list)
    offers: list[IssuedOffer] | None = None
    broker: str | None = None
    offer_sequence: int | None = None
    next_mid: int | None = None
    epochs: dict[str, int] = field(default_factory=dict)
    settlements: list[Envelope] = field(default_factory=list)
    reclaimed: bool | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return not (
            self.runs
            or self.queue
            or self.settlements
            or self.epochs
            or self.forget_runs
            or self.drop_messages_of
            or self.offers is not None
            or self.broker is not None
            or self.offer_sequence is not None
            or self.next_mid is not None
            or self.reclaimed is not None
        )


@dataclass
class Step:
    """What one event leads to: commit `save`, then perform `effects` in order."""

    save: Save = field(default_factory=Save)
    effects: list[Effect] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether nothing came of the event."""
        return not self.effects and self.save.empty


NOTHING = Step()
"""What most events lead to. Nobody writes into a Step that was handed out."""
