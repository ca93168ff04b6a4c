"""What the agent must remember over a kill -9: one record per run, and the counters.

A record is saved before any effect that rests on it is performed (see agent.py), so whatever the
outside has seen of us is on disk here.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sublet_agent.core.run_phases import RunPhase
from sublet_contracts.documents import Checkpoint, CheckpointKind, Job, Lease
from sublet_contracts.envelope import Envelope
from sublet_contracts.reasons import Reason

UploadKind = CheckpointKind


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Stop(_Record):
    """A run has been asked to end. It only hardens: drain, then stop."""

    desired: Literal["drain", "stop"]
    reason: Reason
    deadline_ms: int
    """when it is killed"""
    killed: bool = False
    detail: str = ""


class Uploading(_Record):
    """What is on its way to the broker."""

    kind: UploadKind
    step: int
    cum_device_ms: int
    whole_ms: int = 0
    """when it was whole on this disk"""


class AwaitingVerdict(_Record):
    """An uploaded checkpoint, or outputs, that the broker has not judged yet."""

    kind: UploadKind
    step: int
    cum_device_ms: int
    since_ms: int


class SavesMeasured(_Record):
    """What the last few checkpoints of a run have shown, oldest first, by its own time."""

    stalls_ms: list[int] = Field(default_factory=list)
    """how long each held the job's loop, by the job's word"""
    saves_told: int = 0
    """as many it had made by then, by its word"""
    durable_after_ms: list[int] = Field(default_factory=list)
    """how old each was when it was durable"""
    spacings_ms: list[int] = Field(default_factory=list)
    """how much the run had done since the one before"""
    saved_device_ms: int = 0
    """up to which device time the newest holds what it has done"""
    asked_device_ms: int | None = None
    """when it was asked for one and none has come since; None: it is not waited for"""


class RunRecord(_Record):
    """One lease and the run under it. Times in ms of the agent's clock."""

    lease_id: str
    lease: Lease
    job_id: str
    job: Job
    checkpoint: Checkpoint | None = None
    image: str = ""
    """what the job's tag means, by content; '': the job has no tag, or the runner uses no image"""
    phase: RunPhase = RunPhase.PULLING
    stop: Stop | None = None
    started_ms: int | None = None
    prepared_ms: int = 0
    """for how long it was made ready before it started, as far as somebody looked"""
    pull_device_ms: int = 0
    """of its device time, what came before the start"""
    exit_code: int | None = None
    cum_device_ms: int = 0
    reason: Reason | None = None
    unless_finished: Reason | None = None
    """the reason instead of success, should the job's folder say that its work was not done"""
    detail: str = ""
    quarantined: str = ""
    """the unexpected error that came of handling it; '': none did"""
    local_checkpoints: dict[int, int] = Field(default_factory=dict)
    """whole checkpoints on this disk: step -> cum_device_ms when each was found"""
    unsynced_steps: list[int] = Field(default_factory=list)
    """those of them that nobody has made durable on this disk: a power cut may tear them"""
    boot: str = ""
    """the start of the machine in which its folders were placed"""
    whole_ms: dict[int, int] = Field(default_factory=dict)
    """of those: step -> when it was whole on this disk"""
    uploading: Uploading | None = None
    awaiting_verdict: dict[str, AwaitingVerdict] = Field(default_factory=dict)
    """by the id of the signed checkpoint"""
    uploaded_step: int = -1
    """the newest that was uploaded, or given up"""
    refused_uploads: int = 0
    durable_step: int = 0
    durable_checkpoint: str | None = None
    durable_device_ms: int = 0
    folder_scanned: bool = False
    """whether the folder was read once more after the exit"""
    outputs_to_upload: Literal["outputs", "partial-outputs"] | None = None
    exited_ms: int = 0
    """when it was seen that it had"""
    outputs_until_ms: int = 0
    """until when what it has written is brought back; 0: however long that takes"""
    cpu_millis: int = 0
    """of a job that has no wish: what its devices bring along, fixed when the lease was signed"""
    device_failed: str = ""
    """what was seen of a device of its that failed while it ran; '' if nothing was"""
    device_failed_ms: int = 0
    """when"""
    interval_began_ms: int = 0
    """for how long its command had run when the last checkpoint was found, or was asked for with
    SAVE"""
    saves: SavesMeasured = Field(default_factory=SavesMeasured)
    loss_every_ms: int = 0
    """how long a machine lasts, as the broker said with the lease; 0: it did not"""
    last_receipt_sequence: int = 0
    last_receipt_id: str | None = None
    last_receipt_cum_device_ms: int = -1
    unlisted_since_ms: int = 0
    """since when the broker no longer names this ended lease in its welcome; 0: it does"""

    @property
    def devices(self) -> int:
        """Devices leased."""
        return len(self.lease.device_ids)

    @property
    def is_over(self) -> bool:
        """Whether it has ended, so that its devices are free again."""
        return self.phase in (RunPhase.ENDED, RunPhase.DISCARDED)


class IssuedOffer(_Record):
    """An offer of ours that a lease may still rest on."""

    id: str
    sequence: int
    envelope: Envelope


class Saved(_Record):
    """All that the journal holds of the core."""

    broker: str = ""
    offer_sequence: int = 0
    next_mid: int = 1
    offers: list[IssuedOffer] = Field(default_factory=list)
    runs: dict[str, RunRecord] = Field(default_factory=dict)
    epochs: dict[str, int] = Field(default_factory=dict)
    """job -> the highest epoch that we have ever signed: an older Assign is an echo"""
    reclaimed: bool = False
    """The owner has taken the devices back and not offered them again."""
