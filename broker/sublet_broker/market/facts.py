"""What the broker knows: one frozen record per kind of fact. A decision takes facts, returns facts.

Every kind names its key in KEY. Stores keep any kind by its fields (adapters/sql/store.py has one
table per kind with the same columns; a test holds the two together). Times are broker-clock ms.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from sublet_contracts.envelope import Envelope
from sublet_contracts.reasons import Reason
from sublet_contracts.states import (
    ChainState,
    CheckpointState,
    Desired,
    JobState,
    LeaseState,
    RunState,
)


@dataclass(frozen=True, slots=True)
class Fact:
    """What all facts share."""

    KEY: ClassVar[tuple[str, ...]] = ("id",)


@dataclass(frozen=True, slots=True)
class PartyFact(Fact):
    """A party that introduced itself."""

    id: str
    name: str
    since_ms: int
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class AgentFact(Fact):
    """A provider's agent as the broker sees it. id is the provider's party id."""

    id: str
    instance: str
    connected: bool
    last_seen_ms: int
    offer: str | None = None
    """The newest offer, if it is still open."""
    offer_sequence: int = 0
    withdrawn_sequence: int = -1
    start_failures: int = 0
    """Different jobs in a row of which it could not start a run (setting_aside.py)."""
    start_failed_job: str = ""
    """The last of them."""
    set_aside_until_ms: int = 0
    """Nothing is leased on its machine before."""


@dataclass(frozen=True, slots=True)
class OfferFact(Fact):
    """An offer. Open until it is withdrawn, replaced or expired."""

    id: str
    provider: str
    sequence: int
    pool: str
    """hardware class of its devices and region: "<class>@<region>"."""
    open: bool
    expires_ms: int
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class JobFact(Fact):
    """A job. `budget_ucr` and `accept_ucr` include amendments."""

    id: str
    renter: str
    name: str
    state: JobState
    envelope: Envelope
    budget_ucr: int
    accept_ucr: int
    submitted_ms: int
    reason: Reason | None = None
    detail: str = ""
    epoch: int = 0
    """The newest lease's epoch; the one holder is the lease that has it."""
    settled_ucr: int = 0
    accepted_ucr: int = 0
    """Settled without the renter's signature, out of accept_ucr."""
    refusals: int = 0
    """Leases in a row that no agent signed."""
    fruitless: int = 0
    """Attempts in a row that ran and made no new durable step."""
    unstarted: int = 0
    """Attempts in a row that never ran."""
    image_unknown: tuple[str, ...] = ()
    """Providers whose registry said that there is no such image, one for each attempt."""
    image_unknown_since_ms: int = 0
    """When the first of them said it."""
    not_before_ms: int = 0
    """It is not matched before (backoff after a failed attempt)."""
    avoid: tuple[str, ...] = ()
    """Providers that failed it, most recent last: tried again only when nobody else fits."""
    prefer: str = ""
    """The provider that prepared to take it over; tried first."""
    hardware_class: str = ""
    """Pinned by its first checkpoint: byte-identity holds within a class."""
    threads: int = 0
    """Pinned together with the class: the threads of arithmetic of the lease that made it."""
    image_pinned: str = ""
    """What its image's tag meant when it first ran, by content. Each later run uses that."""
    wanted: str = ""
    """What the renter asked of a live job: "", "pause" or "cancel"."""
    outputs: str | None = None
    started_ms: int | None = None
    ended_ms: int | None = None


@dataclass(frozen=True, slots=True)
class AmendmentFact(Fact):
    """A raise of a job's bounds."""

    id: str
    job: str
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class LeaseFact(Fact):
    """A lease. `envelope` carries the agent's signature once it is active."""

    id: str
    job: str
    offer: str
    provider: str
    renter: str
    epoch: int
    state: LeaseState
    device_ids: tuple[str, ...]
    price_ucr_per_device_hour: int
    fee_bps: int
    hold_ucr: int
    start_step: int
    start_checkpoint: str | None
    answer_by_ms: int
    proposed_ms: int
    envelope: Envelope
    active_ms: int | None = None
    closed_ms: int | None = None
    reason: Reason | None = None
    detail: str = ""
    proposed_stopwatch_ms: int = 0
    """What the broker's stopwatch showed when this was proposed."""


@dataclass(frozen=True, slots=True)
class RunFact(Fact):
    """The run under a lease. id is the lease's id."""

    id: str
    job: str
    provider: str
    epoch: int
    state: RunState
    desired: Desired
    last_seen_ms: int
    known_state: RunState
    """The newest state the agent reported; what it was before it fell silent."""
    order_reason: Reason | None = None
    order_until_ms: int | None = None
    """When a drain that was ordered becomes a stop."""
    reason: Reason | None = None
    exit_code: int | None = None
    detail: str = ""
    step: int = 0
    total_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    cum_device_ms: int = 0
    """As claimed; clamped by the broker's clock before anything is paid."""
    running_ms: int | None = None
    """When it was first seen running."""
    preparing_ms: int = 0
    """For how long its heartbeats have said that it had not begun yet (metering)."""
    ended_ms: int | None = None
    stall: dict[str, int] = field(default_factory=dict)
    """For how long saving had held its loop when it ended (RunStall's figures); {}: not told."""
    successor: str = ""
    """Provider that prepares to take over while this run is unknown."""
    durable_step: int = 0
    durable_ms: int | None = None
    """When the newest durable checkpoint of this run became that; None: it has none."""
    durable_device_ms: int = 0
    """Its cum_device_ms."""
    warnings: dict[str, int] = field(default_factory=dict)
    """What stands (market/warnings.py), and since when."""


@dataclass(frozen=True, slots=True)
class CheckpointFact(Fact):
    """A checkpoint or the outputs."""

    id: str
    job: str
    lease: str
    epoch: int
    kind: str
    step: int
    state: CheckpointState
    index_digest: str
    total_bytes: int
    cum_device_ms: int
    created_ms: int
    envelope: Envelope
    durable_ms: int | None = None
    kept: bool = True
    """Whether its content is still there: older ones are pruned, their documents stay."""
    detail: str = ""
    sent_bytes: int = 0
    """What was sent for it, by its agent's word."""
    took_ms: int = 0
    """From when it was whole on the provider's disk until all was here, likewise."""
    stall_ms: int | None = None
    """For how long saving it held the job's loop, by the job's word."""


@dataclass(frozen=True, slots=True)
class ChainFact(Fact):
    """A lease's receipts. id is the lease's id."""

    id: str
    job: str
    state: ChainState
    sequence: int = 0
    head: str | None = None
    cum_device_ms: int = 0
    durable_device_ms: int = 0
    evidence: tuple[str, ...] = ()
    """Receipts that contradict the chain, kept."""


@dataclass(frozen=True, slots=True)
class ReceiptFact(Fact):
    """A receipt. `countersigned`: the renter signed it too."""

    id: str
    job: str
    lease: str
    sequence: int
    received_ms: int
    countersigned: bool
    envelope: Envelope
    received_stopwatch_ms: int = 0
    """What the broker's stopwatch showed when this came."""


@dataclass(frozen=True, slots=True)
class SettlementFact(Fact):
    """How a lease was closed."""

    id: str
    job: str
    lease: str
    provider: str
    renter: str
    reason: Reason
    settled_ms: int
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class DepositFact(Fact):
    """A deposit."""

    id: str
    party: str
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class AccountFact(Fact):
    """An account's posted totals; balance = credits - debits. id is its name (ledger.py)."""

    id: str
    debits_ucr: int = 0
    credits_ucr: int = 0
    pending_ucr: int = 0
    """Reserved by open pendings out of the balance."""


@dataclass(frozen=True, slots=True)
class TransferFact(Fact):
    """A posted transfer; append-only."""

    id: str
    debit: str
    credit: str
    amount_ucr: int
    cites: str
    memo: str
    time_ms: int


@dataclass(frozen=True, slots=True)
class PendingFact(Fact):
    """A reservation on an account. Resolves exactly once: posted or void."""

    id: str
    account: str
    amount_ucr: int
    state: str
    """open, posted or void."""
    cites: str
    time_ms: int


@dataclass(frozen=True, slots=True)
class EventFact(Fact):
    """One entry of the history; append-only. id rises without gaps within the broker."""

    id: int
    time_ms: int
    job: str
    lease: str
    epoch: int
    kind: str
    before: str
    after: str
    reason: Reason | None
    detail: str


@dataclass(frozen=True, slots=True)
class LogEntryFact(Fact):
    """One leaf of the Merkle log: a document, in the order of acceptance."""

    id: int
    document: str


@dataclass(frozen=True, slots=True)
class LogLineFact(Fact):
    """One line of a run's output. id rises over all of a job's leases, in order of arrival."""

    KEY: ClassVar[tuple[str, ...]] = ("job", "id")

    job: str
    id: int
    lease: str
    epoch: int
    number: int
    time_ms: int
    stream: str
    text: str
    total_bytes: int
    """Of the job's log up to and with this line: what the log's limit counts."""


@dataclass(frozen=True, slots=True)
class OutboxFact(Fact):
    """A reliable message that its recipient hasn't acknowledged. id is its mid."""

    id: str
    order: int
    recipient: str
    type: str
    body: str
    """The message's JSON."""
    created_ms: int


@dataclass(frozen=True, slots=True)
class BlobFact(Fact):
    """Content that a scope (a renter's party id, or a job's id) may use."""

    KEY: ClassVar[tuple[str, ...]] = ("scope", "digest")

    scope: str
    digest: str
    size_bytes: int
    claimed_ms: int = 0
    """When it was last uploaded, or its uploader was told that it is here already."""
    look_ms: int = 0
    """When the sweeper asks (again) whether anything needs it."""


@dataclass(frozen=True, slots=True)
class ContentFact(Fact):
    """Where content lies that at least one scope may use; it was hashed when it came."""

    KEY: ClassVar[tuple[str, ...]] = ("digest",)

    digest: str
    size_bytes: int
    pack: str = ""
    """The pack's id; "": a file of its own."""
    offset_bytes: int = 0
    """Where it begins in the pack."""


@dataclass(frozen=True, slots=True)
class PackFact(Fact):
    """A pack that lies in the blob store, written once and under an id of its own."""

    KEY: ClassVar[tuple[str, ...]] = ("id",)

    id: str
    size_bytes: int
    scrub_ms: int
    """When all of it is to be read and hashed (again); 0: something in it was found damaged."""


@dataclass(frozen=True, slots=True)
class UploadFact(Fact):
    """A pack on its way past the broker: it has an address, and nobody has committed it."""

    KEY: ClassVar[tuple[str, ...]] = ("id",)

    id: str
    """The pack's."""
    party: str
    scope: str
    name: str
    body_sha256: str
    table: str
    """base64"""
    size_bytes: int
    expires_ms: int


@dataclass(frozen=True, slots=True)
class NonceFact(Fact):
    """A request's nonce that has been used. Forgotten when its time is too old to be accepted."""

    KEY: ClassVar[tuple[str, ...]] = ("party", "nonce")

    party: str
    nonce: str
    time_ms: int


@dataclass(frozen=True, slots=True)
class AnswerFact(Fact):
    """What a request with an idempotency key was answered."""

    KEY: ClassVar[tuple[str, ...]] = ("party", "key")

    party: str
    key: str
    request_sha256: str
    """Of method, target and body."""
    status: int
    body: str
    time_ms: int


@dataclass(frozen=True, slots=True)
class ShardFact(Fact):
    """A match shard's epoch: a shard with an older one has been replaced. id is the pool."""

    id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class CounterFact(Fact):
    """A number that only rises (events, log, outbox; the clock's high-water mark)."""

    id: str
    value: int


@dataclass(frozen=True, slots=True)
class TallyFact(Fact):
    """A sum that is kept up in the transactions that change it, so that nobody adds it up anew."""

    id: str
    value: int


FACTS: tuple[type[Fact], ...] = (
    PartyFact,
    AgentFact,
    OfferFact,
    JobFact,
    AmendmentFact,
    LeaseFact,
    RunFact,
    CheckpointFact,
    ChainFact,
    ReceiptFact,
    SettlementFact,
    DepositFact,
    AccountFact,
    TransferFact,
    PendingFact,
    EventFact,
    LogEntryFact,
    LogLineFact,
    OutboxFact,
    BlobFact,
    ContentFact,
    PackFact,
    UploadFact,
    NonceFact,
    AnswerFact,
    ShardFact,
    CounterFact,
    TallyFact,
)
