"""The database's tables: one SQLModel class per kind of fact, with the same columns.

To add a column: add the field to the fact (market/facts.py), the column here, and a migration
(migrations/versions/); tests/stores/test_tables.py and test_migrations.py hold the three together.

Enums, tuples, dicts and envelopes are kept as text (JSON where they have parts). The rules that the
database itself holds stand here as constraints; those that need a trigger (append-only tables, a
pending that resolves once) stand in the migrations.
"""

from typing import Annotated, Any

from sqlalchemy import BigInteger, CheckConstraint, Index, MetaData, Text, text
from sqlmodel import Field, SQLModel

from sublet_broker.market import facts

# Byte order on every database, so that the same data gives the same list in every store.
_TEXT: Any = Text().with_variant(Text(collation="C"), "postgresql")

Id = Annotated[str, Field(primary_key=True, sa_type=_TEXT)]
NumberId = Annotated[
    int, Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
]
Str = Annotated[str, Field(sa_type=_TEXT)]
OptionalStr = Annotated[str | None, Field(sa_type=_TEXT, nullable=True)]
Json = Annotated[str, Field(sa_type=_TEXT)]
Whole = Annotated[int, Field(sa_type=BigInteger)]
OptionalWhole = Annotated[int | None, Field(sa_type=BigInteger, nullable=True)]


class Row(SQLModel):
    """What all tables share: their own metadata, with names for every constraint."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class AboutRow(Row, table=True):
    """What the database says of itself: `written_by` is the newest release that opened it."""

    __tablename__ = "about"

    id: Id
    value: Str


class PartyRow(Row, table=True):
    """facts.PartyFact."""

    __tablename__ = "party"

    id: Id
    name: Str
    since_ms: Whole
    envelope: Json


class AgentRow(Row, table=True):
    """facts.AgentFact."""

    __tablename__ = "agent"

    id: Id
    instance: Str
    connected: bool
    last_seen_ms: Whole
    offer: OptionalStr
    offer_sequence: Whole
    withdrawn_sequence: Whole
    start_failures: Whole
    start_failed_job: Str
    set_aside_until_ms: Whole


class OfferRow(Row, table=True):
    """facts.OfferFact."""

    __tablename__ = "offer"
    __table_args__ = (Index(None, "open", "expires_ms"), Index(None, "provider", "open"))

    id: Id
    provider: Str
    sequence: Whole
    pool: Str
    open: bool
    expires_ms: Whole
    envelope: Json


class JobRow(Row, table=True):
    """facts.JobFact."""

    __tablename__ = "job"
    __table_args__ = (
        CheckConstraint("settled_ucr >= 0 AND settled_ucr <= budget_ucr", name="budget"),
        Index(None, "state"),
        Index(None, "renter", "submitted_ms"),
        Index(None, "renter", "name"),
    )

    id: Id
    renter: Str
    name: Str
    state: Str
    envelope: Json
    budget_ucr: Whole
    accept_ucr: Whole
    submitted_ms: Whole
    reason: OptionalStr
    detail: Str
    epoch: Whole
    settled_ucr: Whole
    accepted_ucr: Whole
    refusals: Whole
    fruitless: Whole
    unstarted: Whole
    image_unknown: Json
    image_unknown_since_ms: Whole
    not_before_ms: Whole
    avoid: Json
    prefer: Str
    hardware_class: Str
    threads: Whole
    image_pinned: Str
    wanted: Str
    outputs: OptionalStr
    started_ms: OptionalWhole
    ended_ms: OptionalWhole


class AmendmentRow(Row, table=True):
    """facts.AmendmentFact."""

    __tablename__ = "amendment"
    __table_args__ = (Index(None, "job"),)

    id: Id
    job: Str
    envelope: Json


class LeaseRow(Row, table=True):
    """facts.LeaseFact. One holder at a time: a job has one lease that isn't closed."""

    __tablename__ = "lease"
    __table_args__ = (
        Index(
            "uq_lease_one_holder",
            "job",
            unique=True,
            sqlite_where=text("state <> 'closed'"),
            postgresql_where=text("state <> 'closed'"),
        ),
        Index("uq_lease_job_epoch", "job", "epoch", unique=True),
        Index(None, "state"),
        Index(None, "provider", "state"),
        Index(None, "renter"),
        Index(None, "offer", "state"),
        CheckConstraint("hold_ucr >= 0 AND epoch >= 1", name="bounds"),
    )

    id: Id
    job: Str
    offer: Str
    provider: Str
    renter: Str
    epoch: Whole
    state: Str
    device_ids: Json
    price_ucr_per_device_hour: Whole
    fee_bps: Whole
    hold_ucr: Whole
    start_step: Whole
    start_checkpoint: OptionalStr
    answer_by_ms: Whole
    proposed_ms: Whole
    envelope: Json
    active_ms: OptionalWhole
    closed_ms: OptionalWhole
    reason: OptionalStr
    detail: Str
    proposed_stopwatch_ms: Whole


class RunRow(Row, table=True):
    """facts.RunFact."""

    __tablename__ = "run"
    __table_args__ = (
        Index(None, "state"),
        Index(None, "job"),
        Index(None, "provider", "state"),
        Index(None, "successor"),
    )

    id: Id
    job: Str
    provider: Str
    epoch: Whole
    state: Str
    desired: Str
    last_seen_ms: Whole
    known_state: Str
    order_reason: OptionalStr
    order_until_ms: OptionalWhole
    reason: OptionalStr
    exit_code: OptionalWhole
    detail: Str
    step: Whole
    total_steps: Whole
    metrics: Json
    cum_device_ms: Whole
    running_ms: OptionalWhole
    preparing_ms: Whole
    ended_ms: OptionalWhole
    stall: Json
    successor: Str
    durable_step: Whole
    durable_ms: OptionalWhole
    durable_device_ms: Whole
    warnings: Json


class CheckpointRow(Row, table=True):
    """facts.CheckpointFact."""

    __tablename__ = "checkpoint"
    __table_args__ = (
        Index(None, "job", "kind", "state"),
        Index(None, "lease"),
        Index(None, "state"),
    )

    id: Id
    job: Str
    lease: Str
    epoch: Whole
    kind: Str
    step: Whole
    state: Str
    index_digest: Str
    total_bytes: Whole
    cum_device_ms: Whole
    created_ms: Whole
    envelope: Json
    durable_ms: OptionalWhole
    kept: bool
    detail: Str
    sent_bytes: Whole
    took_ms: Whole
    stall_ms: OptionalWhole


class ChainRow(Row, table=True):
    """facts.ChainFact."""

    __tablename__ = "chain"
    __table_args__ = (Index(None, "state"), Index(None, "job"))

    id: Id
    job: Str
    state: Str
    sequence: Whole
    head: OptionalStr
    cum_device_ms: Whole
    durable_device_ms: Whole
    evidence: Json


class ReceiptRow(Row, table=True):
    """facts.ReceiptFact. Two of one lease and sequence may lie here: equivocation is evidence."""

    __tablename__ = "receipt"
    __table_args__ = (
        Index(None, "job", "countersigned"),
        Index(None, "lease", "sequence"),
    )

    id: Id
    job: Str
    lease: Str
    sequence: Whole
    received_ms: Whole
    countersigned: bool
    envelope: Json
    received_stopwatch_ms: Whole


class SettlementRow(Row, table=True):
    """facts.SettlementFact. A lease is settled once."""

    __tablename__ = "settlement"
    __table_args__ = (
        Index("uq_settlement_lease", "lease", unique=True),
        Index(None, "job", "reason"),
        Index(None, "provider", "settled_ms"),
        Index(None, "renter", "reason", "settled_ms"),
    )

    id: Id
    job: Str
    lease: Str
    provider: Str
    renter: Str
    reason: Str
    settled_ms: Whole
    envelope: Json


class DepositRow(Row, table=True):
    """facts.DepositFact."""

    __tablename__ = "deposit"
    __table_args__ = (Index(None, "party"),)

    id: Id
    party: Str
    envelope: Json


class AccountRow(Row, table=True):
    """facts.AccountFact. What is reserved lies within the balance; only the world may owe."""

    __tablename__ = "account"
    __table_args__ = (
        CheckConstraint("debits_ucr >= 0 AND credits_ucr >= 0 AND pending_ucr >= 0", name="signs"),
        CheckConstraint(
            "id = 'world' OR credits_ucr - debits_ucr >= pending_ucr", name="no_overdraft"
        ),
    )

    id: Id
    debits_ucr: Whole
    credits_ucr: Whole
    pending_ucr: Whole


class TransferRow(Row, table=True):
    """facts.TransferFact; append-only."""

    __tablename__ = "transfer"
    __table_args__ = (
        CheckConstraint("amount_ucr >= 0", name="amount"),
        CheckConstraint("debit <> credit", name="two_accounts"),
        CheckConstraint("cites <> ''", name="cites_a_document"),
        Index(None, "debit"),
        Index(None, "credit"),
        Index(None, "cites"),
    )

    id: Id
    debit: Str
    credit: Str
    amount_ucr: Whole
    cites: Str
    memo: Str
    time_ms: Whole


class PendingRow(Row, table=True):
    """facts.PendingFact; from open it goes to posted or void, once."""

    __tablename__ = "pending"
    __table_args__ = (
        CheckConstraint("amount_ucr >= 0", name="amount"),
        CheckConstraint("state IN ('open', 'posted', 'void')", name="state"),
        Index(None, "account", "state"),
        Index(None, "state"),
        Index(None, "cites"),
    )

    id: Id
    account: Str
    amount_ucr: Whole
    state: Str
    cites: Str
    time_ms: Whole


class EventRow(Row, table=True):
    """facts.EventFact; append-only."""

    __tablename__ = "event"
    __table_args__ = (Index(None, "job", "id"), Index(None, "lease"), Index(None, "kind"))

    id: NumberId
    time_ms: Whole
    job: Str
    lease: Str
    epoch: Whole
    kind: Str
    before: Str
    after: Str
    reason: OptionalStr
    detail: Str


class LogEntryRow(Row, table=True):
    """facts.LogEntryFact; append-only."""

    __tablename__ = "log_entry"
    __table_args__ = (Index(None, "document"),)

    id: NumberId
    document: Str


class LogLineRow(Row, table=True):
    """facts.LogLineFact."""

    __tablename__ = "log_line"
    __table_args__ = (Index(None, "lease", "number"),)

    job: Id
    id: NumberId
    lease: Str
    epoch: Whole
    number: Whole
    time_ms: Whole
    stream: Str
    text: Str
    total_bytes: Whole


class OutboxRow(Row, table=True):
    """facts.OutboxFact."""

    __tablename__ = "outbox"
    __table_args__ = (Index(None, "recipient", "order"),)

    id: Id
    order: Whole
    recipient: Str
    type: Str
    body: Json
    created_ms: Whole


class BlobRow(Row, table=True):
    """facts.BlobFact."""

    __tablename__ = "blob"
    __table_args__ = (
        CheckConstraint("size_bytes >= 0", name="size"),
        Index(None, "digest"),
        Index(None, "look_ms"),
    )

    scope: Id
    digest: Id
    size_bytes: Whole
    claimed_ms: Whole
    look_ms: Whole


class ContentRow(Row, table=True):
    """facts.ContentFact."""

    __tablename__ = "content"
    __table_args__ = (
        CheckConstraint("size_bytes >= 0 AND offset_bytes >= 0", name="size"),
        Index(None, "pack"),
    )

    digest: Id
    size_bytes: Whole
    pack: Str
    offset_bytes: Whole


class PackRow(Row, table=True):
    """facts.PackFact."""

    __tablename__ = "pack"
    __table_args__ = (
        CheckConstraint("size_bytes > 0", name="size"),
        Index(None, "scrub_ms"),
    )

    id: Id
    size_bytes: Whole
    scrub_ms: Whole


class UploadRow(Row, table=True):
    """facts.UploadFact."""

    __tablename__ = "upload"
    __table_args__ = (
        CheckConstraint("size_bytes > 0", name="size"),
        Index(None, "party"),
        Index(None, "scope"),
        Index(None, "expires_ms"),
    )

    id: Id
    party: Str
    scope: Str
    name: Str
    body_sha256: Str
    table: Str
    size_bytes: Whole
    expires_ms: Whole


class NonceRow(Row, table=True):
    """facts.NonceFact."""

    __tablename__ = "nonce"
    __table_args__ = (Index(None, "time_ms"),)

    party: Id
    nonce: Id
    time_ms: Whole


class AnswerRow(Row, table=True):
    """facts.AnswerFact."""

    __tablename__ = "answer"
    __table_args__ = (Index(None, "time_ms"),)

    party: Id
    key: Id
    request_sha256: Str
    status: Whole
    body: Str
    time_ms: Whole


class ShardRow(Row, table=True):
    """facts.ShardFact."""

    __tablename__ = "shard"

    id: Id
    epoch: Whole


class CounterRow(Row, table=True):
    """facts.CounterFact."""

    __tablename__ = "counter"

    id: Id
    value: Whole


class TallyRow(Row, table=True):
    """facts.TallyFact."""

    __tablename__ = "tally"

    id: Id
    value: Whole


ROWS: dict[type[facts.Fact], type[Row]] = {
    facts.PartyFact: PartyRow,
    facts.AgentFact: AgentRow,
    facts.OfferFact: OfferRow,
    facts.JobFact: JobRow,
    facts.AmendmentFact: AmendmentRow,
    facts.LeaseFact: LeaseRow,
    facts.RunFact: RunRow,
    facts.CheckpointFact: CheckpointRow,
    facts.ChainFact: ChainRow,
    facts.ReceiptFact: ReceiptRow,
    facts.SettlementFact: SettlementRow,
    facts.DepositFact: DepositRow,
    facts.AccountFact: AccountRow,
    facts.TransferFact: TransferRow,
    facts.PendingFact: PendingRow,
    facts.EventFact: EventRow,
    facts.LogEntryFact: LogEntryRow,
    facts.LogLineFact: LogLineRow,
    facts.OutboxFact: OutboxRow,
    facts.BlobFact: BlobRow,
    facts.ContentFact: ContentRow,
    facts.PackFact: PackRow,
    facts.UploadFact: UploadRow,
    facts.NonceFact: NonceRow,
    facts.AnswerFact: AnswerRow,
    facts.ShardFact: ShardRow,
    facts.CounterFact: CounterRow,
    facts.TallyFact: TallyRow,
}
