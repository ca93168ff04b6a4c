"""The signed documents. Each states who signs it and what it permits; each field has its unit.

A document is a promise that can be checked by a stranger, so it is strict: unknown fields, floats
and coercions are refused, and `broker` names the one broker it is meant for (no replay at another).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sublet_contracts.encoding import MAX_INTEGER, EncodingError, canonical_json, parse_json
from sublet_contracts.envelope import Envelope, SignatureRefused, sign_payload
from sublet_contracts.fields import (
    PATTERNS_IN_WORDS,
    Broker,
    Count,
    DeviceId,
    Digest,
    DocumentId,
    Epoch,
    Issued,
    JobId,
    Label,
    LeaseId,
    Name,
    Nonce,
    Party,
    PinnedImage,
    Provider,
    Renter,
    Sha256,
    Text,
    User,
)
from sublet_contracts.keys import KeyRefused, SigningKey
from sublet_contracts.reasons import Fault, Reason
from sublet_contracts.run_conventions import NOT_THE_JOBS
from sublet_contracts.versions import Document as Document
from sublet_contracts.versions import (
    Reads,
    UnknownVersion,
    downgraded,
    model_of,
    newest_that,
    upgraded,
    versions_of,
)

MAX_DEVICES = 64
MAX_INPUTS = 256
MAX_THREADS = 4096
MAX_CHECKPOINT_FOLDERS = 8


class DocumentRefused(ValueError):
    """A document breaks a rule. `field` is its dotted path ('' for the whole document)."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class KeyDocument(Document):
    """A party introduces its key to a broker."""

    KIND: ClassVar[str] = "key"
    SIGNED_BY: ClassVar[str] = "the party itself"

    party: Party = Field(description="the party that introduces itself: its public key")
    broker: Broker
    name: Text = Field(description="what people call the party; not unique, not proven")
    issued_ms: Issued


class Device(BaseModel):
    """One device of an offer: a GPU, or the CPU of a machine without any."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: DeviceId = Field(description="the GPU's uuid, or cpu")
    kind: Literal["gpu", "cpu"] = Field(
        description="cpu: the whole CPU of a machine without any GPU"
    )
    name: Text = Field(description="as the driver names it")
    memory_bytes: Count = Field(description="device memory; for a CPU the memory it may use")
    hardware_class: Label = Field(description="devices of one class give bit-identical results")
    compute_capability: Text | None = Field(default=None, description="major.minor")
    driver: Text | None = Field(default=None, description="version of the GPU's driver")
    ecc: bool | None = Field(default=None, description="whether the memory corrects errors")
    mig: bool | None = Field(default=None, description="whether the GPU is cut into slices")
    pcie_generation: Count | None = Field(default=None, description="of the link in use")
    pcie_lanes: Count | None = Field(default=None, description="of the link in use")
    power_limit_mw: Count | None = Field(default=None, description="milliwatts")


class Offer(Document):
    """Spare capacity at a price, until it expires. A lease inside its bounds needs no human."""

    KIND: ClassVar[str] = "offer"
    SIGNED_BY: ClassVar[str] = "the provider"

    provider: Provider
    broker: Broker
    sequence: Count = Field(description="rises with each offer; a newer one replaces the older")
    name: Text = Field(description="what the owner calls the machine")
    devices: tuple[Device, ...] = Field(
        min_length=1, max_length=MAX_DEVICES, description="what is for rent, each device by itself"
    )
    price_ucr_per_device_hour: Count = Field(description="the least that a lease may pay")
    cpu_millis: Count = Field(description="thousandths of a core that one device brings along")
    memory_bytes: Count = Field(description="main memory that one device brings along")
    disk_bytes: Count = Field(description="disk that one device brings along")
    region: Label = Field(description="where the machine stands, in the owner's words")
    runner: Literal["docker", "process"] = Field(
        description="process isolates nothing: only for renters in accepts"
    )
    image_policy: Literal["digest", "any"] = Field(description="digest: pinned images only")
    egress: bool = Field(description="whether jobs may reach the network")
    users: bool = Field(default=False, description="whether jobs may choose as whom they run")
    accepts: tuple[Party, ...] = Field(
        max_length=256, description="renters that it serves; empty: everybody"
    )
    grace_ms: Count = Field(description="notice that a reclaim gives the job")
    issued_ms: Issued
    expires_ms: Count = Field(description="no lease begins after this")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.expires_ms <= self.issued_ms:
            raise ValueError("expires_ms must be later than issued_ms")
        if len({device.id for device in self.devices}) != len(self.devices):
            raise ValueError("devices: an id stands twice")
        if self.runner == "process" and not self.accepts:
            raise ValueError(
                "accepts: the process runner isolates nothing, so it must name its renters"
            )
        return self


class Resources(BaseModel):
    """What a job needs. 0 and '' mean: no wish."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    devices: int = Field(ge=1, le=MAX_DEVICES, description="how many devices, all on one machine")
    device_kind: Literal["gpu", "cpu", "any"] = Field(description="what counts as a device")
    device_memory_bytes: Count = Field(default=0, description="least memory of each device")
    device_name: Text = Field(default="", description="words of the device's name")
    hardware_class: str = Field(default="", max_length=64, description="exactly this class")
    cpu_millis: Count = Field(
        default=0, description="thousandths of a core, in all; 0: what comes with the devices"
    )
    memory_bytes: Count = Field(description="main memory, in all")
    disk_bytes: Count = Field(description="disk for checkpoints and outputs, in all")
    region: str = Field(default="", max_length=64, description="exactly this region")
    egress: bool = Field(default=False, description="whether the job needs the network")
    user: User = Field(
        default="",
        description="as whom it runs: UID, UID:GID or a name that the image knows; never root",
    )

    @field_validator("user")
    @classmethod
    def _never_root(cls, user: str) -> str:
        if user == "root":
            raise ValueError("no job runs as root; name another user, or a number such as 1000")
        return user


class Input(BaseModel):
    """One input file or folder, as it was when the job was signed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    destination: str = Field(max_length=512, description="path in the container")
    kind: Literal["file", "folder"] = Field(description="a file's index lists just that file")
    index_digest: Digest = Field(description="of the tree index that lists its files and chunks")
    total_bytes: Count = Field(description="bytes of all its files")

    @field_validator("destination")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        return check_container_path(path)


LEAST_PATIENCE_MS = 5_000
"""No job may give its machine up after less silence."""
LEAST_STALL_MS = 60_000
"""No job may be paused after standing still for less: a heartbeat that is late is no stall."""
LEAST_CHECKPOINT_INTERVAL_MS = 1_000
AUTO_FIRST_INTERVAL_MS = 60_000
"""A job that leaves the interval to its agent is asked for its first checkpoint after so long: only
then is it known what one costs."""
AUTO_LEAST_INTERVAL_MS = 15_000
AUTO_MOST_INTERVAL_MS = 1_800_000
"""No agent asks such a job more often, or more seldom, whatever it has measured."""


class Job(Document):
    """A request to run a container, and the bounds inside which it may be run and charged."""

    KIND: ClassVar[str] = "job"
    SIGNED_BY: ClassVar[str] = "the renter"

    renter: Renter
    broker: Broker
    nonce: Nonce = Field(description="tells two otherwise equal jobs apart")
    name: Name = Field(description="what the renter calls the job; the newest of a name is meant")
    image: str = Field(min_length=1, max_length=512, description="by digest where policy wants it")
    command: tuple[Annotated[str, Field(max_length=16384)], ...] = Field(
        max_length=256, description="the program and its arguments; empty: the image's own"
    )
    env: dict[str, str] = Field(
        max_length=128, description="variables of the container; names with SUBLET_ are ours"
    )
    resources: Resources = Field(description="what one run needs")
    max_price_ucr_per_device_hour: Count = Field(description="the most that a lease may cost")
    budget_ucr: Count = Field(description="the job never costs more, whatever happens")
    checkpoint_interval_ms: int = Field(
        ge=0,
        le=86_400_000,
        description="the agent asks for a checkpoint this often; 0: as often as pays, by what "
        "saving has cost this run and how often machines are lost",
    )
    patience_ms: int = Field(
        ge=LEAST_PATIENCE_MS,
        le=86_400_000,
        description="silence after which the machine counts as lost",
    )
    stop_grace_ms: int = Field(
        default=30_000, ge=1_000, le=3_600_000, description="time to checkpoint when asked to stop"
    )
    stall_ms: int = Field(
        default=0,
        ge=0,
        le=604_800_000,
        description="without a sign of life for so long it is checkpointed and paused; 0: never",
    )
    inputs: tuple[Input, ...] = Field(
        max_length=MAX_INPUTS, description="files and folders that are placed before it starts"
    )
    outputs: str = Field(default="", max_length=512, description="folder that is brought back")
    workdir: str = Field(
        default="", max_length=512, description="the working folder; '': the image's, or /work"
    )
    shm_bytes: Count = Field(
        default=0, description="most in /dev/shm, as a part of the memory; 0: half of it"
    )
    checkpoints: tuple[str, ...] = Field(
        default=(),
        max_length=MAX_CHECKPOINT_FOLDERS,
        description="folders whose content is a checkpoint: absolute, or below the working folder",
    )
    accept_receipts_up_to_ucr: Count = Field(
        description="receipts up to this charge need no renter's signature"
    )
    issued_ms: Issued
    expires_ms: Count = Field(description="it does not start after this")

    @field_validator("command")
    @classmethod
    def _no_nul(cls, command: tuple[str, ...]) -> tuple[str, ...]:
        if any("\0" in part for part in command):
            raise ValueError("a part holds a NUL character")
        return command

    @field_validator("env")
    @classmethod
    def _names(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", name):
                raise ValueError(f"{name[:40]!r} is not a variable's name")
            if name.startswith("SUBLET_"):
                raise ValueError(f"{name}: names that start with SUBLET_ are ours")
            if len(value) > 8192 or "\0" in value:
                raise ValueError(f"{name}: at most 8192 characters and no NUL")
        return env

    @field_validator("outputs", "workdir")
    @classmethod
    def _outputs_inside(cls, path: str) -> str:
        return check_container_path(path) if path else path

    @field_validator("checkpoints")
    @classmethod
    def _checkpoints_apart(cls, folders: tuple[str, ...]) -> tuple[str, ...]:
        return check_checkpoint_folders(folders)

    @field_validator("stall_ms")
    @classmethod
    def _long_enough(cls, stall_ms: int) -> int:
        if 0 < stall_ms < LEAST_STALL_MS:
            raise ValueError(f"at least {LEAST_STALL_MS} ms (1m), or 0 for never")
        return stall_ms

    @field_validator("checkpoint_interval_ms")
    @classmethod
    def _auto_or_not_too_often(cls, interval_ms: int) -> int:
        if 0 < interval_ms < LEAST_CHECKPOINT_INTERVAL_MS:
            raise ValueError(
                f"at least {LEAST_CHECKPOINT_INTERVAL_MS} ms (1s), or 0 to leave it to the agent"
            )
        return interval_ms

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.expires_ms <= self.issued_ms:
            raise ValueError("expires_ms must be later than issued_ms")
        if self.accept_receipts_up_to_ucr > self.budget_ucr:
            raise ValueError("accept_receipts_up_to_ucr must not be above budget_ucr")
        if self.shm_bytes > self.resources.memory_bytes:
            raise ValueError("shm_bytes must not be above memory_bytes, of which it is a part")
        if any(self.workdir == top or self.workdir.startswith(f"{top}/") for top in NOT_THE_JOBS):
            raise ValueError(f"workdir: {self.workdir!r} is not the job's to use; use /work, say")
        destinations = [i.destination for i in self.inputs]
        if len(set(destinations)) != len(destinations):
            raise ValueError("inputs: a destination stands twice")
        for folder in self.checkpoints:
            if any(folder == path or folder.startswith(f"{path}/") for path in destinations):
                raise ValueError(
                    f"checkpoints: {folder!r} lies in an input, and inputs can't be written to; "
                    "name the folder that the command saves into"
                )
        return self


class Lease(Document):
    """One job on one offer at one price. It binds once the agent has signed it too."""

    KIND: ClassVar[str] = "lease"
    SIGNED_BY: ClassVar[str] = "the broker, then the provider"

    broker: Broker
    provider: Provider
    renter: Renter
    job: JobId
    offer: DocumentId = Field(description="the offer that it takes")
    epoch: int = Field(ge=1, le=MAX_INTEGER, description="rises with each lease of the job")
    device_ids: tuple[DeviceId, ...] = Field(
        min_length=1, max_length=MAX_DEVICES, description="devices of the offer that it takes"
    )
    price_ucr_per_device_hour: Count = Field(
        description="between the offer's price and the job's highest"
    )
    fee_bps: int = Field(ge=0, le=10_000, description="the broker's share of the charge")
    hold_ucr: Count = Field(description="the most that this lease may charge")
    start_step: Count = Field(description="step of the checkpoint it starts from; 0: the start")
    start_checkpoint: DocumentId | None = Field(
        default=None, description="the durable checkpoint that it resumes from"
    )
    image: PinnedImage = Field(
        default="",
        description="what the job's tag meant when it first ran; '': it has not, or has no tag",
    )
    threads: int = Field(
        default=1,
        ge=1,
        le=MAX_THREADS,
        description="threads of arithmetic: as in the lease whose checkpoint was durable first",
    )
    issued_ms: Issued
    answer_by_ms: Count = Field(description="void unless the agent has signed it by then")


CheckpointKind = Literal["checkpoint", "outputs", "partial-outputs"]
"""What an agent moves off its machine: a state to resume from, what a finished job hands over, or
what a run had written that ended in another way. Partial outputs are a service: no progress, and
nothing that is paid for rests on them."""


class Checkpoint(Document):
    """A complete state of the job (or its outputs) that the agent has moved off its machine."""

    KIND: ClassVar[str] = "checkpoint"
    SIGNED_BY: ClassVar[str] = "the provider"

    provider: Provider
    job: JobId
    lease: LeaseId
    epoch: Epoch
    kind: CheckpointKind = Field(
        description="outputs: what the finished job hands over; partial-outputs: what a run had "
        "written that ended otherwise"
    )
    step: Count = Field(description="the job's own count of its progress")
    index_digest: Digest = Field(description="of the tree index that lists files and chunks")
    total_bytes: Count = Field(description="bytes of all its files")
    cum_device_ms: Count = Field(description="the lease's device time when the job finished it")
    image: PinnedImage = Field(
        default="", description="the image that made it; '': the job has no tag, or uses no image"
    )
    issued_ms: Issued


class Receipt(Document):
    """The lease's usage so far: cumulative, hash-chained, signed by the provider and the renter."""

    KIND: ClassVar[str] = "receipt"
    VERSION: ClassVar[int] = 2
    SIGNED_BY: ClassVar[str] = "the provider, then the renter (or the job's bounds accept it)"

    provider: Provider
    job: JobId
    lease: LeaseId
    epoch: Epoch
    sequence: int = Field(ge=1, le=MAX_INTEGER, description="1, 2, 3 ... within the lease")
    previous: DocumentId | None = Field(description="the receipt before it; null for the first")
    cum_device_ms: Count = Field(description="wall ms times devices since the run started")
    pull_device_ms: Count = Field(
        default=0,
        description="of it, what came before the start: a pull beyond its free 10 minutes",
    )
    reached_step: Count = Field(
        description="newest step that the agent has seen a whole checkpoint of; else start_step"
    )
    durable_step: Count = Field(description="newest durable step of this lease; else start_step")
    durable_checkpoint: DocumentId | None = Field(description="its checkpoint, if of this lease")
    durable_device_ms: Count = Field(description="that checkpoint's cum_device_ms; else 0")
    charge_ucr: Count = Field(description="floor(price x cum_device_ms / 3 600 000), at most hold")
    final: bool = Field(description="the last of its lease")
    reason: Reason | None = Field(description="why the run ended; null unless final")
    issued_ms: Issued

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.durable_step > self.reached_step:
            raise ValueError("durable_step must not be above reached_step")
        if self.pull_device_ms > self.cum_device_ms:
            raise ValueError("pull_device_ms must not be above cum_device_ms")
        if self.durable_device_ms > self.cum_device_ms:
            raise ValueError("durable_device_ms must not be above cum_device_ms")
        if (self.sequence == 1) != (self.previous is None):
            raise ValueError("previous must be null on the first receipt and only there")
        if self.final != (self.reason is not None):
            raise ValueError("reason must stand on the final receipt and only there")
        return self


class Transfer(BaseModel):
    """One movement of the ledger."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: Sha256 = Field(description="from what it cites, so that a replay is a no-op")
    debit: str = Field(max_length=160, description="account that is debited")
    credit: str = Field(max_length=160, description="account that is credited")
    amount_ucr: Count = Field(description="what is moved")


class Settlement(Document):
    """The broker closes a lease: what is paid, to whom, and on which receipt it rests."""

    KIND: ClassVar[str] = "settlement"
    SIGNED_BY: ClassVar[str] = "the broker"

    broker: Broker
    job: JobId
    lease: LeaseId
    epoch: Epoch
    receipt: DocumentId | None = Field(description="the newest receipt; null if none came")
    reason: Reason = Field(description="why the run ended")
    fault: Fault = Field(description="who answers for it, by the table of reasons")
    accepted_by: Literal["renter", "job", "none"] = Field(
        description="renter: countersigned; job: within accept_receipts_up_to_ucr; none: no charge"
    )
    cum_device_ms: Count = Field(description="device time claimed, within the broker's own clock")
    payable_device_ms: Count = Field(description="what the durable-progress rule leaves of it")
    lost_device_ms: Count = Field(description="cum_device_ms - payable_device_ms")
    charged_ucr: Count = Field(
        description="what the renter pays: floor(price x payable / 3 600 000), at most hold"
    )
    fee_ucr: Count = Field(description="the broker's share, rounded down")
    provider_ucr: Count = Field(description="charged_ucr - fee_ucr")
    transfers: tuple[Transfer, ...] = Field(
        max_length=16, description="what moves in the ledger; they add up to charged_ucr"
    )
    issued_ms: Issued


class Deposit(Document):
    """The operator credits an account."""

    KIND: ClassVar[str] = "deposit"
    SIGNED_BY: ClassVar[str] = "the operator (the broker's key)"

    broker: Broker
    party: Party = Field(description="whose account is credited")
    amount_ucr: int = Field(ge=1, le=MAX_INTEGER, description="what is credited")
    memo: Text = Field(description="for people; means nothing to the broker")
    nonce: Nonce = Field(description="tells two otherwise equal deposits apart")
    issued_ms: Issued


class Amendment(Document):
    """The renter raises a job's bounds. Totals, not deltas: sending it twice is harmless."""

    KIND: ClassVar[str] = "amendment"
    SIGNED_BY: ClassVar[str] = "the renter"

    renter: Renter
    broker: Broker
    job: JobId
    budget_ucr: Count = Field(description="the new total budget; never lower than before")
    accept_receipts_up_to_ucr: Count = Field(description="the new bound; as in the job")
    issued_ms: Issued


class TreeHead(Document):
    """The broker's log at one size: what has been logged before can't be changed unnoticed."""

    KIND: ClassVar[str] = "tree-head"
    SIGNED_BY: ClassVar[str] = "the broker"

    broker: Broker
    size: Count = Field(description="number of documents in the log")
    root_sha256: Sha256 = Field(description="Merkle root (RFC 6962) over their ids")
    issued_ms: Issued


DOCUMENTS: tuple[type[Document], ...] = (
    KeyDocument,
    Offer,
    Job,
    Lease,
    Checkpoint,
    Receipt,
    Settlement,
    Deposit,
    Amendment,
    TreeHead,
)


def versions_read() -> dict[str, tuple[int, ...]]:
    """Return the versions of each kind that this program reads: what it tells its peers."""
    return {kind.KIND: tuple(versions_of(kind)) for kind in DOCUMENTS}


D = TypeVar("D", bound=Document)


@dataclass(frozen=True)
class Signed(Generic[D]):
    """A document that was verified before it was parsed, with the envelope it came in."""

    document: D
    envelope: Envelope

    @property
    def id(self) -> str:
        """The document's id."""
        return self.envelope.id


def check_container_path(path: str) -> str:
    """Return `path` if it is an absolute, plain path in a container. Raises ValueError."""
    parts = path.split("/")
    if not path.startswith("/") or len(parts) < 2 or "\0" in path:
        raise ValueError(f"{path!r} must be an absolute path such as /data/train.csv")
    if any(part in ("", ".", "..") for part in parts[1:]):
        raise ValueError(f"{path!r} must not hold '.', '..' or an empty part")
    return path


def check_checkpoint_folders(folders: tuple[str, ...]) -> tuple[str, ...]:
    """Return `folders` if each is a plain path, absolute or relative ('.': the working folder
    itself), and none lies in another. Raises ValueError."""
    for folder in folders:
        if len(folder) > 512:
            raise ValueError(f"{folder[:40]!r}...: at most 512 characters")
        if folder == ".":
            continue
        parts = folder.removeprefix("/").split("/")
        if any(part in ("", ".", "..") for part in parts) or not folder.isprintable():
            raise ValueError(
                f"{folder!r} must be a plain path such as ckpts or /state/ckpts, without '.', '..' "
                "or an empty part; '.' alone is the working folder"
            )
    for folder in folders:
        others = [other for other in folders if other != folder]
        if len(others) != len(folders) - 1:
            raise ValueError(f"{folder!r} stands twice")
        for other in others:
            inside = folder == "." and not other.startswith("/")
            if inside or other.startswith(f"{folder}/"):
                raise ValueError(f"{other!r} lies in {folder!r}: name the outer one only")
    return folders


def sign_document(document: D, *keys: SigningKey, reads: Reads | None = None) -> Signed[D]:
    """Return `document` signed by each of `keys`.

    `reads`: the versions that its reader reads, where it has one reader; it is written as the
    newest of them, and returned as that says it (see versions.py). Raises NoCommonVersion.
    """
    kind = type(document)
    written: Document = document
    if reads is not None:
        written = downgraded(document, newest_that(kind, reads))
    payload = canonical_json(written.model_dump(mode="json"))
    return Signed(upgraded(written, kind), sign_payload(written.payload_type(), payload, keys))


def read_document(envelope: Envelope, kind: type[D], *, signed_by: tuple[str, ...] = ()) -> D:
    """Verify every signature, then parse: any version of `kind`, each strictly, in the newest's
    shape. `signed_by` must all have signed; where it is empty, whoever the document's own
    first-named party is must have (see `author`).

    Raises DocumentRefused, which names the field.
    """
    try:
        model = model_of(envelope.payloadType, kind)
    except UnknownVersion as error:
        raise DocumentRefused(str(error), "payloadType") from error
    try:
        # Every signature that is claimed must hold, asked for or not: a false one that came along
        # would be kept with the document, and would later make it look forged.
        envelope.require(*dict.fromkeys((*signed_by, *envelope.signers)))
        document = upgraded(parse_document(envelope.payload_bytes, model), kind)
    except (SignatureRefused, KeyRefused) as error:
        raise DocumentRefused(str(error), "signatures") from error
    except EncodingError as error:
        raise DocumentRefused(str(error), "payload") from error
    except ValidationError as error:
        raise refused_by_validation(error) from error
    if not signed_by and author(document) not in envelope.signers:
        raise DocumentRefused(f"not signed by {kind.SIGNED_BY}", "signatures")
    return document


def parse_document(payload: bytes, kind: type[D]) -> D:
    """Parse what has been verified, as this version and no other. Raises EncodingError,
    ValidationError."""
    parse_json(payload)
    return kind.model_validate_json(payload)


def open_document(
    envelope: Envelope, kind: type[D], *, signed_by: tuple[str, ...] = ()
) -> Signed[D]:
    """Like read_document, and keep the envelope beside the document."""
    return Signed(read_document(envelope, kind, signed_by=signed_by), envelope)


def author(document: Document) -> str:
    """Return the party whose signature makes this document: its SIGNED_BY, first named."""
    match document:
        case Offer() | Checkpoint() | Receipt():
            return document.provider
        case Job() | Amendment():
            return document.renter
        case Lease() | Settlement() | Deposit() | TreeHead():
            return document.broker
        case _:
            # A key or a session proof: the party speaks for itself.
            return str(document.model_dump(include={"party"})["party"])


def check_time(
    *, now_ms: int, issued_ms: int, expires_ms: int | None = None, skew_ms: int = 300_000
) -> None:
    """Refuse a document from the future or past its end. Raises DocumentRefused."""
    if issued_ms > now_ms + skew_ms:
        ahead_s = (issued_ms - now_ms) // 1000
        raise DocumentRefused(
            f"signed {ahead_s} s in the future; set the clock of the machine that signed it",
            "issued_ms",
        )
    if expires_ms is not None and expires_ms <= now_ms:
        raise DocumentRefused(
            f"expired {(now_ms - expires_ms) // 1000} s ago; sign a new one", "expires_ms"
        )


def _in_words(kind: str, bounds: Mapping[str, object]) -> str:
    """Return in people's words what is wrong with a text; '' where pydantic's have to do."""
    if kind == "string_pattern_mismatch":
        words = PATTERNS_IN_WORDS.get(str(bounds.get("pattern")))
        return f"it holds what may not stand there; {words}" if words else ""
    if kind == "string_too_long":
        return f"it is too long; at most {bounds.get('max_length')} characters fit"
    return ""


def refused_by_validation(error: ValidationError) -> DocumentRefused:
    """Return pydantic's first complaint as one that names its field."""
    first = error.errors(include_url=False, include_input=False)[0]
    # A path may hold keys that a stranger chose: bound what we repeat of them.
    field = ".".join(str(part)[:80] for part in first["loc"])[:400]
    said = str(first["msg"]).removeprefix("Value error, ")
    message = _in_words(first["type"], first.get("ctx", {})) or said
    return DocumentRefused(f"{field}: {message}" if field else message, field)
