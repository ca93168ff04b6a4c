"""What the agent must remember over a kill -9: one record per run, and the counters.

A record is saved before any effect that rests on it is performed (see agent.py), so whatever the
outside has seen of us is on disk here.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sublet_agent.core.run_phases import RunPhase
from sublet_contracts.documents import Checkpoint, Job, Lease
from sublet_contracts.envelope import Envelope
from sublet_contracts.reasons import Reason

UploadKind = Literal["checkpoint", "outputs"]


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


class Awaiting(_Record):
    """An uploaded checkpoint without a verdict yet."""

    kind: UploadKind
    step: int
    cum_device_ms: int
    since_ms: int


class RunRecord(_Record):
    """One lease and the run under it. Times in ms of the agent's clock."""

    lease_id: str
    lease: Lease
    job_id: str
    job: Job
    checkpoint: Checkpoint | None = None
    phase: RunPhase = RunPhase.PULLING
    stop: Stop | None = None
    started_ms: int | None = None
    exit_code: int | None = None
    cum_device_ms: int = 0
    reason: Reason | None = None
    detail: str = ""
    seen: dict[int, int] = Field(default_factory=dict)
    """step of each whole checkpoint found on disk -> device time when it was seen"""
    uploading: Uploading | None = None
    awaiting: dict[str, Awaiting] = Field(default_factory=dict)
    uploaded_step: int = -1
    refusals: int = 0
    """verdicts that refused an upload of this run"""
    durable_step: int = 0
    durable_checkpoint: str | None = None
    durable_device_ms: int = 0
    final_scanned: bool = False
    outputs_wanted: bool = False
    save_asked_ms: int = 0
    receipt_sequence: int = 0
    receipt_id: str | None = None
    receipt_ms: int = 0
    receipt_cum_device_ms: int = -1
    orphaned_ms: int = 0
    """since when the broker no longer lists this ended lease; 0: it does"""

    @property
    def devices(self) -> int:
        """Devices leased."""
        return len(self.lease.device_ids)

    @property
    def over(self) -> bool:
        """Whether its devices are free again."""
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
