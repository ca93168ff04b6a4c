"""The messages between broker and agent: one JSON text frame each, over the agent's websocket.

A frame is {"type": ..., "mid": ... or null, "body": {...}}. A message with a `mid` is reliable: its
sender keeps it on disk and sends it again, on this connection or the next, until an `ack` names the
mid; its receiver acts on it once, however often it comes. A message without one may be lost.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from sublet_contracts.documents import CheckpointKind, refused_by_validation
from sublet_contracts.encoding import EncodingError, canonical_json, parse_json
from sublet_contracts.envelope import Envelope
from sublet_contracts.fields import (
    Count,
    DeviceId,
    DocumentId,
    JobId,
    Label,
    LeaseId,
    Name,
    Nonce,
    Party,
    PinnedImage,
    Text,
)
from sublet_contracts.reasons import Reason
from sublet_contracts.run_conventions import MAX_LOG_STATE_CHARACTERS

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 1024 * 1024
MAX_LOG_LINE_CHARACTERS = 16 * 1024
MAX_LOG_LINES_PER_FRAME = 500
MAX_RUNS = 64
MAX_USAGE_DEVICES = 64
MAX_UTILIZATION_PERCENT = 100

DocumentVersions = Annotated[
    dict[Label, Annotated[tuple[int, ...], Field(min_length=1, max_length=16)]],
    Field(max_length=64, description="versions of each kind of document that it reads"),
]
Mid = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9._:-]+$")]
RunState = Literal["assigned", "pulling", "restoring", "running", "draining", "exited"]


class FrameRefused(ValueError):
    """A frame breaks the protocol; the message says how."""


class Message(BaseModel):
    """What all messages share."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    TYPE: ClassVar[str]
    SENDER: ClassVar[Literal["broker", "agent", "both"]]
    RELIABLE: ClassVar[bool] = False


class Hello(Message):
    """The broker greets: prove who you are by signing my nonce."""

    TYPE: ClassVar[str] = "hello"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "broker"

    broker: Party = Field(description="who greets")
    nonce: Nonce = Field(description="to be signed in join; new for each connection")
    versions: tuple[int, ...] = Field(
        min_length=1, max_length=16, description="protocol versions it speaks"
    )
    time_ms: Count = Field(description="the broker's clock; ms since 1970")
    reads: DocumentVersions


class Join(Message):
    """The agent answers with a signed session proof."""

    TYPE: ClassVar[str] = "join"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "agent"

    proof: Envelope = Field(description="a session document over the nonce, signed by the provider")
    version: int = Field(description="the protocol version that is spoken from here on")
    reads: DocumentVersions


class HeldLease(BaseModel):
    """A lease that the broker believes the agent to hold."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    lease: LeaseId
    epoch: Count = Field(description="the lease's epoch")


class Welcome(Message):
    """The agent is in. What it runs beyond `leases` it must stop: those have gone elsewhere."""

    TYPE: ClassVar[str] = "welcome"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "broker"

    heartbeat_ms: int = Field(
        ge=100,
        le=60_000,
        description="how often a heartbeat is expected; of who runs nothing every third",
    )
    fee_bps: Count = Field(description="the broker's share; shown to the owner")
    leases: tuple[HeldLease, ...] = Field(
        max_length=MAX_RUNS, description="what the agent holds, as far as the broker knows"
    )


class Refused(Message):
    """The broker closes the connection and says why."""

    TYPE: ClassVar[str] = "refused"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "broker"

    code: Name = Field(description="for programs: of session.py or problems.py")
    detail: str = Field(max_length=1024, description="for people: what is wrong")


class Ack(Message):
    """These messages are on my disk; forget them."""

    TYPE: ClassVar[str] = "ack"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "both"

    mids: tuple[Mid, ...] = Field(max_length=1000, description="the messages that are safe")


class Announce(Message):
    """The agent's offer, new or refreshed."""

    TYPE: ClassVar[str] = "announce"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "agent"

    offer: Envelope = Field(description="the offer, signed by the provider")


class Withdraw(Message):
    """No further leases: the owner wants the devices, or the agent is stopping."""

    TYPE: ClassVar[str] = "withdraw"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "agent"
    RELIABLE: ClassVar[bool] = True

    offer_sequence: Count = Field(description="this offer and all before it")


class Assign(Message):
    """A lease to sign and run."""

    TYPE: ClassVar[str] = "assign"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "broker"
    RELIABLE: ClassVar[bool] = True

    lease: Envelope = Field(description="signed by the broker")
    job: Envelope = Field(description="signed by the renter")
    checkpoint: Envelope | None = Field(description="where to start from; null: the beginning")
    loss_every_ms: Count = Field(
        default=0,
        description="how long a machine of this market works until it is lost, on average; a "
        "hint, by which a job's checkpoints may be asked for; 0: not known",
    )


class LeaseAnswer(Message):
    """The lease with the agent's signature, or why not."""

    TYPE: ClassVar[str] = "lease_answer"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "agent"
    RELIABLE: ClassVar[bool] = True

    lease: LeaseId
    signed: Envelope | None = Field(
        description="the lease with the provider's signature; null if refused"
    )
    image: PinnedImage = Field(
        default="",
        description="what the job's tag means, looked up before it was signed; '': it has no tag, "
        "or the runner uses no image",
    )
    refusal: Text = Field(default="", description="why it was refused")
    reason: Reason | None = Field(
        default=None, description="the reason, where it is the image that can't be had"
    )


class Prepare(Message):
    """You may get this job soon: pull its image and restore its checkpoint."""

    TYPE: ClassVar[str] = "prepare"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "broker"

    job: Envelope = Field(description="signed by the renter")
    checkpoint: Envelope | None = Field(description="what to restore; null: nothing yet")
    image: PinnedImage = Field(default="", description="as in the lease that may follow")


class Unprepare(Message):
    """The job went on where it was; drop what was prepared."""

    TYPE: ClassVar[str] = "unprepare"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "broker"

    job: JobId


class Order(Message):
    """What the broker wants of a run. It only ever hardens: run, then drain, then stop."""

    TYPE: ClassVar[str] = "order"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "broker"
    RELIABLE: ClassVar[bool] = True

    lease: LeaseId
    epoch: Count = Field(description="the lease's epoch")
    desired: Literal["drain", "stop"] = Field(description="drain: checkpoint first; stop: at once")
    reason: Reason = Field(description="why the run is to end")
    grace_ms: Count = Field(description="time until it is stopped by force")


class RunUpload(BaseModel):
    """What of a run is on its way to the broker. Informative: nothing rests on it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: CheckpointKind = Field(description="as in the document that will name it")
    step: Count = Field(description="likewise")
    total_bytes: Count = Field(description="of its content, what it has twice counted once")
    there_bytes: Count = Field(description="of them, what is at the broker: sent, or there before")
    sent_bytes: Count = Field(description="of them, what was sent")
    bytes_per_s: Count = Field(description="how fast it was sent lately; 0: nothing was")
    age_ms: Count = Field(description="how old the figures are as they are sent")


class DeviceUsage(BaseModel):
    """How busy one GPU of a run is, as its driver says. null: it doesn't tell."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: DeviceId = Field(description="as in the lease")
    utilization_percent: int | None = Field(
        default=None,
        ge=0,
        le=MAX_UTILIZATION_PERCENT,
        description="part of the time in which it computed, over the driver's last sample",
    )
    memory_used_bytes: Count | None = Field(default=None, description="of its memory, in use")
    memory_bytes: Count | None = Field(default=None, description="of its memory, all")


class RunUsage(BaseModel):
    """What a run uses of its machine, as its agent measured it last. Informative: nothing is paid
    by it. null: it can't be measured there."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    age_ms: Count = Field(description="how old the figures are as they are sent")
    cpu_millis: Count | None = Field(
        default=None, description="thousandths of a core, on average since the measure before"
    )
    memory_bytes: Count | None = Field(
        default=None, description="main memory in use; file cache that can be dropped left out"
    )
    peak_memory_bytes: Count | None = Field(
        default=None, description="the most of it that was seen"
    )
    memory_limit_bytes: Count | None = Field(default=None, description="what it may use of it")
    disk_bytes: Count | None = Field(default=None, description="in its folders")
    disk_limit_bytes: Count | None = Field(default=None, description="what it may use of it")
    devices: tuple[DeviceUsage, ...] = Field(
        default=(), max_length=MAX_USAGE_DEVICES, description="its GPUs; none on a CPU"
    )


class RunStall(BaseModel):
    """For how long saving has held a run's loop, as its job says in the newest checkpoint that was
    uploaded; never longer than it has run. Informative: nothing is paid by it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    saves: Count = Field(description="so many, of the job's process so far")
    all_stall_ms: Count = Field(description="how long they held the loop, all together")
    stall_ms: Count = Field(description="how long the newest did, from the call to its return")
    write_ms: Count = Field(description="how long the newest took to be written")


IntervalRests = Literal["job", "first", "measured", "link", "least", "most"]


class RunCadence(BaseModel):
    """How often a run is asked for a checkpoint, and what a loss would cost by that. Informative:
    nothing is paid by it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    interval_ms: Count = Field(description="so long after the last checkpoint it is asked")
    rests_on: IntervalRests = Field(
        description="job: the renter said so; first: none was made yet; measured: what saving "
        "costs and how often machines are lost; link: no checkpoint is durable sooner; least, "
        "most: the bounds"
    )
    cost_ms: Count = Field(
        default=0, description="what a checkpoint costs the run; 0: not known yet"
    )
    durable_after_ms: Count = Field(
        default=0, description="how old a checkpoint is when it is durable; 0: not known yet"
    )
    most_lost_ms: Count = Field(
        description="the most work that a loss would cost, by what was measured"
    )
    spacing_ms: Count = Field(
        default=0, description="the longest time between the last checkpoints; 0: not known yet"
    )
    unanswered_ms: Count = Field(
        default=0, description="for how long it has been asked and none came; 0: it is not waited"
    )


class RunReport(BaseModel):
    """One run in a heartbeat. All figures but `usage` and `upload` are cumulative."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    lease: LeaseId
    epoch: Count = Field(description="the lease's epoch")
    state: RunState = Field(description="as the agent observes it")
    cum_device_ms: Count = Field(description="wall ms times devices since it started")
    step: Count = Field(default=0, description="the job's own progress")
    total_steps: Count = Field(default=0, description="of so many; 0: not known")
    metrics: dict[Name, FiniteFloat] = Field(
        default_factory=dict, max_length=32, description="what the job reports, such as its loss"
    )
    detail: Text = Field(default="", description="for people")
    checkpoint_opened: bool | None = Field(
        default=None,
        description="whether the job has opened what it was restored from; null: it began anew, or "
        "that can't be known there",
    )
    saved_file: Text = Field(
        default="",
        description="the file that the job seems to save its state to, as it sees it, while no "
        "checkpoint of it was found; a guess, for people",
    )
    upload: RunUpload | None = Field(
        default=None, description="what is on its way to the broker; null: nothing"
    )
    usage: RunUsage | None = Field(default=None, description="what it uses; null: not measured")
    stall: RunStall | None = Field(
        default=None, description="for how long saving has held its loop; null: it has not said so"
    )
    cadence: RunCadence | None = Field(
        default=None, description="how often it is asked for a checkpoint; null: it does not run"
    )


class Heartbeat(Message):
    """I am here, and this is what I run."""

    TYPE: ClassVar[str] = "heartbeat"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "agent"

    runs: tuple[RunReport, ...] = Field(max_length=MAX_RUNS, description="all that it runs")


class RunChanged(Message):
    """A run entered a state. `reason` and `exit_code` stand on exited."""

    TYPE: ClassVar[str] = "run_changed"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "agent"
    RELIABLE: ClassVar[bool] = True

    lease: LeaseId
    epoch: Count = Field(description="the lease's epoch")
    state: RunState = Field(description="the state that it entered")
    cum_device_ms: Count = Field(description="wall ms times devices since it started")
    reason: Reason | None = Field(default=None, description="why it ended; null unless exited")
    exit_code: int | None = Field(
        default=None, ge=-255, le=255, description="of the command; negative: the signal"
    )
    detail: str = Field(default="", max_length=2048, description="for people")


class CheckpointUploaded(Message):
    """All chunks and the index of this checkpoint are at the broker: verify it. The figures beside
    it are informative: nothing is paid by them."""

    TYPE: ClassVar[str] = "checkpoint_uploaded"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "agent"
    RELIABLE: ClassVar[bool] = True

    checkpoint: Envelope = Field(description="signed by the provider")
    sent_bytes: Count = Field(
        default=0,
        description="of its content, what was sent for it since the agent began to: the rest was "
        "there already",
    )
    took_ms: Count = Field(
        default=0,
        description="from when it was whole on the provider's disk until all of it was sent",
    )
    stall_ms: Count | None = Field(
        default=None,
        description="for how long saving it held the job's loop, as the job says; null: it doesn't",
    )


class CheckpointVerdict(Message):
    """The checkpoint is durable, or is refused for `detail`."""

    TYPE: ClassVar[str] = "checkpoint_verdict"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "broker"
    RELIABLE: ClassVar[bool] = True

    lease: LeaseId
    epoch: Count = Field(description="the lease's epoch")
    checkpoint: DocumentId = Field(description="the checkpoint's document")
    kind: CheckpointKind = Field(description="as in the document")
    step: Count = Field(description="as in the document")
    durable: bool = Field(description="true: it counts; false: refused")
    detail: str = Field(default="", max_length=1024, description="why it was refused")


class ReceiptIssued(Message):
    """The next receipt of a lease."""

    TYPE: ClassVar[str] = "receipt_issued"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "agent"
    RELIABLE: ClassVar[bool] = True

    receipt: Envelope = Field(description="signed by the provider")


class SettlementNotice(Message):
    """The lease is closed and paid; its state may be deleted."""

    TYPE: ClassVar[str] = "settled"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "broker"
    RELIABLE: ClassVar[bool] = True

    settlement: Envelope = Field(description="signed by the broker")


class LogLine(BaseModel):
    """One line of the run's output. `number` counts from 0 within the lease."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    number: Count = Field(description="from 0 within the lease")
    time_ms: Count = Field(description="when it was written; ms since 1970")
    stream: Literal["stdout", "stderr", "sublet"] = Field(
        description="sublet: a remark of the agent's"
    )
    text: str = Field(
        max_length=MAX_LOG_LINE_CHARACTERS, description="without its line end; longer lines are cut"
    )


class Logs(Message):
    """Consecutive lines. The broker answers with the number that it wants next."""

    TYPE: ClassVar[str] = "logs"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "agent"

    lease: LeaseId
    epoch: Count = Field(description="the lease's epoch")
    lines: tuple[LogLine, ...] = Field(
        min_length=1, max_length=MAX_LOG_LINES_PER_FRAME, description="in order, without a gap"
    )


class LogState(BaseModel):
    """A line that isn't finished yet, as it stands: a progress bar, a prompt."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    number: Count = Field(description="lines that were finished before it was seen")
    time_ms: Count = Field(description="when it was seen; ms since 1970")
    stream: Literal["stdout", "stderr"] = Field(description="where it is written")
    text: str = Field(
        max_length=MAX_LOG_STATE_CHARACTERS, description="what stands there; '': nothing any more"
    )


class LogStates(Message):
    """How the run's unfinished lines stand now. Each message replaces the one before; none of it is
    kept: what a line is in the end comes with `logs`."""

    TYPE: ClassVar[str] = "log_states"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "agent"

    lease: LeaseId
    epoch: Count = Field(description="the lease's epoch")
    states: tuple[LogState, ...] = Field(
        max_length=2, description="one for each stream that has one"
    )


class LogsWanted(Message):
    """Lines before `next_number` are kept; send on from there."""

    TYPE: ClassVar[str] = "logs_wanted"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "broker"

    lease: LeaseId
    next_number: Count = Field(description="the first line that is wanted")


class Prepared(Message):
    """The successor is ready (or can't be: then another is tried)."""

    TYPE: ClassVar[str] = "prepared"
    SENDER: ClassVar[Literal["broker", "agent", "both"]] = "agent"

    job: JobId
    ready: bool = Field(description="image and checkpoint are there")
    detail: Text = Field(default="", description="what went wrong")


MESSAGES: dict[str, type[Message]] = {
    message.TYPE: message
    for message in (
        Hello,
        Join,
        Welcome,
        Refused,
        Ack,
        Announce,
        Withdraw,
        Assign,
        LeaseAnswer,
        Prepare,
        Unprepare,
        Order,
        Heartbeat,
        RunChanged,
        CheckpointUploaded,
        CheckpointVerdict,
        ReceiptIssued,
        SettlementNotice,
        Logs,
        LogStates,
        LogsWanted,
        Prepared,
    )
}


class Frame(BaseModel):
    """A message on the wire."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: str = Field(max_length=40)
    mid: Mid | None
    body: dict[str, Any]


def encode_frame(message: Message, mid: str | None = None) -> bytes:
    """Return the frame for `message`. A reliable message must have a mid, another must not.

    Raises FrameRefused.
    """
    if (mid is not None) != message.RELIABLE:
        raise FrameRefused(f"{message.TYPE}: {'needs a' if message.RELIABLE else 'takes no'} mid")
    data = canonical_json(
        {"type": message.TYPE, "mid": mid, "body": message.model_dump(mode="json")}
    )
    if len(data) > MAX_FRAME_BYTES:
        raise FrameRefused(f"{message.TYPE}: {len(data)} bytes; at most {MAX_FRAME_BYTES} fit")
    return data


def decode_frame(data: bytes) -> tuple[Message, str | None]:
    """Return the message in a frame, and its mid. Raises FrameRefused."""
    try:
        value = parse_json(data, max_bytes=MAX_FRAME_BYTES, allow_floats=True)
        frame = Frame.model_validate(value)
        kind = MESSAGES.get(frame.type)
        if kind is None:
            raise FrameRefused(f"unknown message type {frame.type!r}; update this side")
        message = kind.model_validate_json(canonical_json(frame.body))
    except EncodingError as error:
        raise FrameRefused(str(error)) from error
    except ValidationError as error:
        raise FrameRefused(str(refused_by_validation(error))) from error
    if (frame.mid is not None) != message.RELIABLE:
        raise FrameRefused(f"{frame.type}: {'needs a' if message.RELIABLE else 'takes no'} mid")
    return message, frame.mid
