"""The signed documents. Each states who signs it and what it permits; each field has its unit.

A document is a promise that can be checked by a stranger, so it is strict: unknown fields, floats
and coercions are refused, and `broker` names the one broker it is meant for (no replay at another).
"""

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sublet_contracts.encoding import MAX_INTEGER, EncodingError, canonical_json, parse_json
from sublet_contracts.envelope import Envelope, SignatureRefused, sign_payload
from sublet_contracts.keys import PARTY_PATTERN, KeyRefused, SigningKey
from sublet_contracts.reasons import Fault, Reason

Party = Annotated[str, Field(pattern=PARTY_PATTERN, description="a party id: the public key")]
DocumentId = Annotated[
    str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of a document's type and payload")
]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of content")]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$", description="random hex digits")]
Text = Annotated[str, Field(max_length=256)]
Name = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._ /:@+-]*$")]
Label = Annotated[str, Field(max_length=64, pattern=r"^[a-z0-9][a-z0-9.-]*$")]
DeviceId = Annotated[str, Field(max_length=96, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")]

MAX_DEVICES = 64
MAX_INPUTS = 256


class DocumentRefused(ValueError):
    """A document breaks a rule. `field` is its dotted path ('' for the whole document)."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Document(BaseModel):
    """What all documents share."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1
    SIGNED_BY: ClassVar[str]

    @classmethod
    def payload_type(cls) -> str:
        """The DSSE payload type: kind and version, inside the signature."""
        return f"application/vnd.sublet.{cls.KIND}.v{cls.VERSION}+json"


class KeyDocument(Document):
    """A party introduces its key to a broker."""

    KIND: ClassVar[str] = "key"
    SIGNED_BY: ClassVar[str] = "the party itself"

    party: Party
    broker: Party
    name: Text = Field(description="what people call the party; not unique, not proven")
    issued_ms: Count = Field(description="when it was signed, ms since 1970")


class Device(BaseModel):
    """One device of an offer: a GPU, or the CPU of a machine without any."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: DeviceId = Field(description="the GPU's uuid, or cpu")
    kind: Literal["gpu", "cpu"]
    name: Text = Field(description="as the driver names it")
    memory_bytes: Count = Field(description="device memory; for a CPU the memory it may use")
    hardware_class: Label = Field(description="devices of one class give bit-identical results")
    compute_capability: Text | None = Field(default=None, description="major.minor")
    driver: Text | None = None
    ecc: bool | None = None
    mig: bool | None = None
    pcie_generation: Count | None = None
    pcie_lanes: Count | None = None
    power_limit_mw: Count | None = Field(default=None, description="milliwatts")


class Offer(Document):
    """Spare capacity at a price, until it expires. A lease inside its bounds needs no human."""

    KIND: ClassVar[str] = "offer"
    SIGNED_BY: ClassVar[str] = "the provider"

    provider: Party
    broker: Party
    sequence: Count = Field(description="rises with each offer; a newer one replaces the older")
    name: Text = Field(description="what the owner calls the machine")
    devices: tuple[Device, ...] = Field(min_length=1, max_length=MAX_DEVICES)
    price_ucr_per_device_hour: Count
    cpu_millis: Count = Field(description="thousandths of a core that one device brings along")
    memory_bytes: Count = Field(description="main memory that one device brings along")
    disk_bytes: Count = Field(description="disk that one device brings along")
    region: Label
    runner: Literal["docker", "process"]
    image_policy: Literal["digest", "any"] = Field(description="digest: pinned images only")
    egress: bool = Field(description="whether jobs may reach the network")
    accepts: tuple[Party, ...] = Field(
        max_length=256, description="renters that it serves; empty: everybody"
    )
    grace_ms: Count = Field(description="notice that a reclaim gives the job")
    issued_ms: Count
    expires_ms: Count

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

    devices: int = Field(ge=1, le=MAX_DEVICES)
    device_kind: Literal["gpu", "cpu", "any"]
    device_memory_bytes: Count = Field(default=0, description="least memory of each device")
    device_name: Text = Field(default="", description="a part of the device's name")
    hardware_class: str = Field(default="", max_length=64, description="exactly this class")
    cpu_millis: Count = Field(default=1000, description="thousandths of a core, in all")
    memory_bytes: Count = Field(description="main memory, in all")
    disk_bytes: Count = Field(description="disk for checkpoints and outputs, in all")
    region: str = Field(default="", max_length=64)
    egress: bool = False


class Input(BaseModel):
    """One input file or folder, as it was when the job was signed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    destination: str = Field(max_length=512, description="path in the container")
    kind: Literal["file", "folder"] = Field(description="a file's index lists just that file")
    index_sha256: Sha256 = Field(description="of the tree index that lists its files and chunks")
    total_bytes: Count

    @field_validator("destination")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        return check_container_path(path)


class Job(Document):
    """A request to run a container, and the bounds inside which it may be run and charged."""

    KIND: ClassVar[str] = "job"
    SIGNED_BY: ClassVar[str] = "the renter"

    renter: Party
    broker: Party
    nonce: Nonce = Field(description="tells two otherwise equal jobs apart")
    name: Name
    image: str = Field(min_length=1, max_length=512, description="by digest where policy wants it")
    command: tuple[Annotated[str, Field(max_length=16384)], ...] = Field(max_length=256)
    env: dict[str, str] = Field(max_length=128)
    resources: Resources
    max_price_ucr_per_device_hour: Count
    budget_ucr: Count = Field(description="the job never costs more, whatever happens")
    checkpoint_interval_ms: int = Field(ge=1_000, le=86_400_000)
    patience_ms: int = Field(
        ge=10_000, le=86_400_000, description="silence after which the machine counts as lost"
    )
    stop_grace_ms: int = Field(
        default=30_000, ge=1_000, le=3_600_000, description="time to checkpoint when asked to stop"
    )
    inputs: tuple[Input, ...] = Field(max_length=MAX_INPUTS)
    outputs: str = Field(default="", max_length=512, description="folder that is brought back")
    accept_receipts_up_to_ucr: Count = Field(
        description="receipts up to this charge need no renter's signature"
    )
    issued_ms: Count
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

    @field_validator("outputs")
    @classmethod
    def _outputs_inside(cls, path: str) -> str:
        return check_container_path(path) if path else path

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.expires_ms <= self.issued_ms:
            raise ValueError("expires_ms must be later than issued_ms")
        if self.accept_receipts_up_to_ucr > self.budget_ucr:
            raise ValueError("accept_receipts_up_to_ucr must not be above budget_ucr")
        destinations = [i.destination for i in self.inputs]
        if len(set(destinations)) != len(destinations):
            raise ValueError("inputs: a destination stands twice")
        return self


class Lease(Document):
    """One job on one offer at one price. It binds once the agent has signed it too."""

    KIND: ClassVar[str] = "lease"
    SIGNED_BY: ClassVar[str] = "the broker, then the provider"

    broker: Party
    provider: Party
    renter: Party
    job: DocumentId
    offer: DocumentId
    epoch: int = Field(ge=1, le=MAX_INTEGER, description="rises with each lease of the job")
    device_ids: tuple[DeviceId, ...] = Field(min_length=1, max_length=MAX_DEVICES)
    price_ucr_per_device_hour: Count
    fee_bps: int = Field(ge=0, le=10_000, description="the broker's share of the charge")
    hold_ucr: Count = Field(description="the most that this lease may charge")
    start_step: Count = Field(description="step of the checkpoint it starts from; 0: the start")
    start_checkpoint: DocumentId | None = None
    issued_ms: Count
    answer_by_ms: Count = Field(description="void unless the agent has signed it by then")


class Checkpoint(Document):
    """A complete state of the job (or its outputs) that the agent has moved off its machine."""

    KIND: ClassVar[str] = "checkpoint"
    SIGNED_BY: ClassVar[str] = "the provider"

    provider: Party
    job: DocumentId
    lease: DocumentId
    epoch: int = Field(ge=1, le=MAX_INTEGER)
    kind: Literal["checkpoint", "outputs"]
    step: Count
    index_sha256: Sha256 = Field(description="of the tree index that lists files and chunks")
    total_bytes: Count
    cum_device_ms: Count = Field(description="the lease's device time when the job finished it")
    issued_ms: Count


class Receipt(Document):
    """The lease's usage so far: cumulative, hash-chained, signed by the provider and the renter."""

    KIND: ClassVar[str] = "receipt"
    SIGNED_BY: ClassVar[str] = "the provider, then the renter (or the job's bounds accept it)"

    provider: Party
    job: DocumentId
    lease: DocumentId
    epoch: int = Field(ge=1, le=MAX_INTEGER)
    sequence: int = Field(ge=1, le=MAX_INTEGER, description="1, 2, 3 ... within the lease")
    previous: DocumentId | None = Field(description="the receipt before it; null for the first")
    cum_device_ms: Count = Field(description="wall ms times devices since the run started")
    durable_step: Count = Field(description="newest durable step of this lease; else start_step")
    durable_checkpoint: DocumentId | None = Field(description="its checkpoint, if of this lease")
    durable_device_ms: Count = Field(description="that checkpoint's cum_device_ms; else 0")
    charge_ucr: Count = Field(description="floor(price x cum_device_ms / 3 600 000), at most hold")
    final: bool = Field(description="the last of its lease")
    reason: Reason | None = Field(description="why the run ended; null unless final")
    issued_ms: Count

    @model_validator(mode="after")
    def _consistent(self) -> Self:
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
    amount_ucr: Count


class Settlement(Document):
    """The broker closes a lease: what is paid, to whom, and on which receipt it rests."""

    KIND: ClassVar[str] = "settlement"
    SIGNED_BY: ClassVar[str] = "the broker"

    broker: Party
    job: DocumentId
    lease: DocumentId
    epoch: int = Field(ge=1, le=MAX_INTEGER)
    receipt: DocumentId | None = Field(description="the newest receipt; null if none came")
    reason: Reason
    fault: Fault
    accepted_by: Literal["renter", "job", "none"] = Field(
        description="renter: countersigned; job: within accept_receipts_up_to_ucr; none: no charge"
    )
    cum_device_ms: Count = Field(description="device time claimed, within the broker's own clock")
    payable_device_ms: Count = Field(description="what the durable-progress rule leaves of it")
    lost_device_ms: Count = Field(description="cum_device_ms - payable_device_ms")
    charged_ucr: Count
    fee_ucr: Count
    provider_ucr: Count = Field(description="charged_ucr - fee_ucr")
    transfers: tuple[Transfer, ...] = Field(max_length=16)
    issued_ms: Count


class Deposit(Document):
    """The operator credits an account."""

    KIND: ClassVar[str] = "deposit"
    SIGNED_BY: ClassVar[str] = "the operator (the broker's key)"

    broker: Party
    party: Party
    amount_ucr: int = Field(ge=1, le=MAX_INTEGER)
    memo: Text
    nonce: Nonce
    issued_ms: Count


class Amendment(Document):
    """The renter raises a job's bounds. Totals, not deltas: sending it twice is harmless."""

    KIND: ClassVar[str] = "amendment"
    SIGNED_BY: ClassVar[str] = "the renter"

    renter: Party
    broker: Party
    job: DocumentId
    budget_ucr: Count = Field(description="the new total budget; never lower than before")
    accept_receipts_up_to_ucr: Count
    issued_ms: Count


class TreeHead(Document):
    """The broker's log at one size: what has been logged before can't be changed unnoticed."""

    KIND: ClassVar[str] = "tree-head"
    SIGNED_BY: ClassVar[str] = "the broker"

    broker: Party
    size: Count = Field(description="number of documents in the log")
    root_sha256: Sha256 = Field(description="Merkle root (RFC 6962) over their ids")
    issued_ms: Count


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


def sign_document(document: D, *keys: SigningKey) -> Signed[D]:
    """Return `document` signed by each of `keys`."""
    payload = canonical_json(document.model_dump(mode="json"))
    return Signed(document, sign_payload(document.payload_type(), payload, keys))


def read_document(envelope: Envelope, kind: type[D], *, signed_by: tuple[str, ...] = ()) -> D:
    """Verify, then parse. `signed_by` must all have signed; where it is empty, whoever the
    document's own first-named party is must have (see `author`).

    Raises DocumentRefused, which names the field.
    """
    if envelope.payloadType != kind.payload_type():
        raise DocumentRefused(
            f"expected {kind.payload_type()}, got {envelope.payloadType}", "payloadType"
        )
    try:
        envelope.require(*(signed_by or envelope.signers))
        parse_json(envelope.payload_bytes)
        document = kind.model_validate_json(envelope.payload_bytes)
    except (SignatureRefused, KeyRefused) as error:
        raise DocumentRefused(str(error), "signatures") from error
    except EncodingError as error:
        raise DocumentRefused(str(error), "payload") from error
    except ValidationError as error:
        raise refused_by_validation(error) from error
    if not signed_by and author(document) not in envelope.signers:
        raise DocumentRefused(f"not signed by {kind.SIGNED_BY}", "signatures")
    return document


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


def refused_by_validation(error: ValidationError) -> DocumentRefused:
    """Return pydantic's first complaint as one that names its field."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return DocumentRefused(f"{field}: {message}" if field else message, field)
