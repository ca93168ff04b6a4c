"""The first form: every kind of fact, and the rules that the database itself holds.

Revision 0001 of release 0.1.0.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Byte order on every database: the same data gives the same list everywhere.
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

# table -> what is refused there. A pending resolves exactly once; the others are append-only.
GUARDS = {
    "transfer": {"UPDATE": "", "DELETE": ""},
    "event": {"UPDATE": "", "DELETE": ""},
    "log_entry": {"UPDATE": "", "DELETE": ""},
    "deposit": {"UPDATE": "", "DELETE": ""},
    "settlement": {"UPDATE": "", "DELETE": ""},
    "pending": {
        "UPDATE": "OLD.state <> 'open' OR NEW.account <> OLD.account"
        " OR NEW.amount_ucr <> OLD.amount_ucr OR NEW.cites <> OLD.cites",
        "DELETE": "",
    },
    # One log, one history: numbers rise, so what was given out is never given out again.
    "counter": {"UPDATE": "NEW.value < OLD.value", "DELETE": ""},
}


def text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    """A text column."""
    return sa.Column(name, TEXT, nullable=nullable)


def whole(name: str, *, nullable: bool = False) -> sa.Column[int]:
    """A 64-bit integer column; a key of this type is given by us, never by the database."""
    return sa.Column(name, sa.BigInteger(), nullable=nullable, autoincrement=False)


def upgrade() -> None:
    """Make everything."""
    make_tables()
    for table, guards in GUARDS.items():
        for change, when in guards.items():
            guard(table, change, when)


def downgrade() -> None:
    """Drop everything. There was nothing before."""
    for table in reversed(TABLES):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION sublet_refuse_change")


def guard(table: str, change: str, when: str) -> None:
    """Refuse `change` (UPDATE or DELETE) on `table`, where the condition `when` holds."""
    name = f"{table}_{change.lower()}_guard"
    says = f"{table}: {change} refused, what is written stays"
    if op.get_bind().dialect.name == "sqlite":
        condition = f"WHEN {when}" if when else ""
        op.execute(
            f"CREATE TRIGGER {name} BEFORE {change} ON {table} {condition} "
            f"BEGIN SELECT RAISE(ABORT, '{says}'); END"
        )
        return
    op.execute(
        "CREATE OR REPLACE FUNCTION sublet_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$ "
        "BEGIN RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation'; "
        "END $$"
    )
    condition = f"WHEN ({when})" if when else ""
    op.execute(
        f"CREATE TRIGGER {name} BEFORE {change} ON {table} FOR EACH ROW {condition} "
        f"EXECUTE FUNCTION sublet_refuse_change('{says}')"
    )


TABLES = (
    "about",
    "account",
    "agent",
    "amendment",
    "answer",
    "blob",
    "chain",
    "checkpoint",
    "content",
    "counter",
    "deposit",
    "event",
    "job",
    "lease",
    "log_entry",
    "log_line",
    "nonce",
    "offer",
    "outbox",
    "pack",
    "party",
    "pending",
    "receipt",
    "run",
    "settlement",
    "shard",
    "tally",
    "transfer",
    "upload",
)


def make_tables() -> None:
    """One table per kind of fact, and `about`."""
    op.create_table(
        "about", text("id"), text("value"), sa.PrimaryKeyConstraint("id", name=op.f("pk_about"))
    )
    op.create_table(
        "account",
        text("id"),
        whole("debits_ucr"),
        whole("credits_ucr"),
        whole("pending_ucr"),
        sa.CheckConstraint(
            "id = 'world' OR credits_ucr - debits_ucr >= pending_ucr",
            name=op.f("ck_account_no_overdraft"),
        ),
        sa.CheckConstraint(
            "debits_ucr >= 0 AND credits_ucr >= 0 AND pending_ucr >= 0",
            name=op.f("ck_account_signs"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_account")),
    )
    op.create_table(
        "agent",
        text("id"),
        text("instance"),
        sa.Column("connected", sa.Boolean(), nullable=False),
        whole("last_seen_ms"),
        text("offer", nullable=True),
        whole("offer_sequence"),
        whole("withdrawn_sequence"),
        whole("start_failures"),
        text("start_failed_job"),
        whole("set_aside_until_ms"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_agent")),
    )
    op.create_table(
        "amendment",
        text("id"),
        text("job"),
        text("envelope"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_amendment")),
    )
    op.create_index(op.f("ix_amendment_job"), "amendment", ["job"])
    op.create_table(
        "answer",
        text("party"),
        text("key"),
        text("request_sha256"),
        whole("status"),
        text("body"),
        whole("time_ms"),
        sa.PrimaryKeyConstraint("party", "key", name=op.f("pk_answer")),
    )
    op.create_index(op.f("ix_answer_time_ms"), "answer", ["time_ms"])
    op.create_table(
        "blob",
        text("scope"),
        text("digest"),
        whole("size_bytes"),
        whole("claimed_ms"),
        whole("look_ms"),
        sa.CheckConstraint("size_bytes >= 0", name=op.f("ck_blob_size")),
        sa.PrimaryKeyConstraint("scope", "digest", name=op.f("pk_blob")),
    )
    op.create_index(op.f("ix_blob_look_ms"), "blob", ["look_ms"])
    op.create_index(op.f("ix_blob_digest"), "blob", ["digest"])
    op.create_table(
        "chain",
        text("id"),
        text("job"),
        text("state"),
        whole("sequence"),
        text("head", nullable=True),
        whole("cum_device_ms"),
        whole("durable_device_ms"),
        text("evidence"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_chain")),
    )
    op.create_index(op.f("ix_chain_job"), "chain", ["job"])
    op.create_index(op.f("ix_chain_state"), "chain", ["state"])
    op.create_table(
        "checkpoint",
        text("id"),
        text("job"),
        text("lease"),
        whole("epoch"),
        text("kind"),
        whole("step"),
        text("state"),
        text("index_digest"),
        whole("total_bytes"),
        whole("cum_device_ms"),
        whole("created_ms"),
        text("envelope"),
        whole("durable_ms", nullable=True),
        sa.Column("kept", sa.Boolean(), nullable=False),
        text("detail"),
        whole("sent_bytes"),
        whole("took_ms"),
        whole("stall_ms", nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoint")),
    )
    op.create_index(op.f("ix_checkpoint_job_kind_state"), "checkpoint", ["job", "kind", "state"])
    op.create_index(op.f("ix_checkpoint_lease"), "checkpoint", ["lease"])
    op.create_index(op.f("ix_checkpoint_state"), "checkpoint", ["state"])
    op.create_table(
        "content",
        text("digest"),
        whole("size_bytes"),
        text("pack"),
        whole("offset_bytes"),
        sa.CheckConstraint("size_bytes >= 0 AND offset_bytes >= 0", name=op.f("ck_content_size")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_content")),
    )
    op.create_index(op.f("ix_content_pack"), "content", ["pack"])
    op.create_table(
        "counter",
        text("id"),
        whole("value"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_counter")),
    )
    op.create_table(
        "deposit",
        text("id"),
        text("party"),
        text("envelope"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deposit")),
    )
    op.create_index(op.f("ix_deposit_party"), "deposit", ["party"])
    op.create_table(
        "event",
        whole("id"),
        whole("time_ms"),
        text("job"),
        text("lease"),
        whole("epoch"),
        text("kind"),
        text("before"),
        text("after"),
        text("reason", nullable=True),
        text("detail"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event")),
    )
    op.create_index(op.f("ix_event_job_id"), "event", ["job", "id"])
    op.create_index(op.f("ix_event_kind"), "event", ["kind"])
    op.create_index(op.f("ix_event_lease"), "event", ["lease"])
    op.create_table(
        "job",
        text("id"),
        text("renter"),
        text("name"),
        text("state"),
        text("envelope"),
        whole("budget_ucr"),
        whole("accept_ucr"),
        whole("submitted_ms"),
        text("reason", nullable=True),
        text("detail"),
        whole("epoch"),
        whole("settled_ucr"),
        whole("accepted_ucr"),
        whole("refusals"),
        whole("fruitless"),
        whole("unstarted"),
        text("image_unknown"),
        whole("image_unknown_since_ms"),
        whole("not_before_ms"),
        text("avoid"),
        text("prefer"),
        text("hardware_class"),
        whole("threads"),
        text("image_pinned"),
        text("wanted"),
        text("outputs", nullable=True),
        whole("started_ms", nullable=True),
        whole("ended_ms", nullable=True),
        sa.CheckConstraint(
            "settled_ucr >= 0 AND settled_ucr <= budget_ucr", name=op.f("ck_job_budget")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job")),
    )
    op.create_index(op.f("ix_job_renter_name"), "job", ["renter", "name"])
    op.create_index(op.f("ix_job_renter_submitted_ms"), "job", ["renter", "submitted_ms"])
    op.create_index(op.f("ix_job_state"), "job", ["state"])
    op.create_table(
        "lease",
        text("id"),
        text("job"),
        text("offer"),
        text("provider"),
        text("renter"),
        whole("epoch"),
        text("state"),
        text("device_ids"),
        whole("price_ucr_per_device_hour"),
        whole("fee_bps"),
        whole("hold_ucr"),
        whole("start_step"),
        text("start_checkpoint", nullable=True),
        whole("answer_by_ms"),
        whole("proposed_ms"),
        whole("proposed_stopwatch_ms"),
        text("envelope"),
        whole("active_ms", nullable=True),
        whole("closed_ms", nullable=True),
        text("reason", nullable=True),
        text("detail"),
        sa.CheckConstraint("hold_ucr >= 0 AND epoch >= 1", name=op.f("ck_lease_bounds")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lease")),
    )
    op.create_index(op.f("ix_lease_offer_state"), "lease", ["offer", "state"])
    op.create_index(op.f("ix_lease_provider_state"), "lease", ["provider", "state"])
    op.create_index(op.f("ix_lease_renter"), "lease", ["renter"])
    op.create_index(op.f("ix_lease_state"), "lease", ["state"])
    op.create_index("uq_lease_job_epoch", "lease", ["job", "epoch"], unique=True)
    op.create_index(
        "uq_lease_one_holder",
        "lease",
        ["job"],
        unique=True,
        sqlite_where=sa.text("state <> 'closed'"),
        postgresql_where=sa.text("state <> 'closed'"),
    )
    op.create_table(
        "log_entry",
        whole("id"),
        text("document"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_log_entry")),
    )
    op.create_index(op.f("ix_log_entry_document"), "log_entry", ["document"])
    op.create_table(
        "log_line",
        text("job"),
        whole("id"),
        text("lease"),
        whole("epoch"),
        whole("number"),
        whole("time_ms"),
        text("stream"),
        text("text"),
        whole("total_bytes"),
        sa.PrimaryKeyConstraint("job", "id", name=op.f("pk_log_line")),
    )
    op.create_index(op.f("ix_log_line_lease_number"), "log_line", ["lease", "number"])
    op.create_table(
        "nonce",
        text("party"),
        text("nonce"),
        whole("time_ms"),
        sa.PrimaryKeyConstraint("party", "nonce", name=op.f("pk_nonce")),
    )
    op.create_index(op.f("ix_nonce_time_ms"), "nonce", ["time_ms"])
    op.create_table(
        "offer",
        text("id"),
        text("provider"),
        whole("sequence"),
        text("pool"),
        sa.Column("open", sa.Boolean(), nullable=False),
        whole("expires_ms"),
        text("envelope"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_offer")),
    )
    op.create_index(op.f("ix_offer_open_expires_ms"), "offer", ["open", "expires_ms"])
    op.create_index(op.f("ix_offer_provider_open"), "offer", ["provider", "open"])
    op.create_table(
        "outbox",
        text("id"),
        whole("order"),
        text("recipient"),
        text("type"),
        text("body"),
        whole("created_ms"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index(op.f("ix_outbox_recipient_order"), "outbox", ["recipient", "order"])
    op.create_table(
        "pack",
        text("id"),
        whole("size_bytes"),
        whole("scrub_ms"),
        sa.CheckConstraint("size_bytes > 0", name=op.f("ck_pack_size")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pack")),
    )
    op.create_index(op.f("ix_pack_scrub_ms"), "pack", ["scrub_ms"])
    op.create_table(
        "party",
        text("id"),
        text("name"),
        whole("since_ms"),
        text("envelope"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_party")),
    )
    op.create_table(
        "pending",
        text("id"),
        text("account"),
        whole("amount_ucr"),
        text("state"),
        text("cites"),
        whole("time_ms"),
        sa.CheckConstraint("state IN ('open', 'posted', 'void')", name=op.f("ck_pending_state")),
        sa.CheckConstraint("amount_ucr >= 0", name=op.f("ck_pending_amount")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pending")),
    )
    op.create_index(op.f("ix_pending_account_state"), "pending", ["account", "state"])
    op.create_index(op.f("ix_pending_cites"), "pending", ["cites"])
    op.create_index(op.f("ix_pending_state"), "pending", ["state"])
    op.create_table(
        "receipt",
        text("id"),
        text("job"),
        text("lease"),
        whole("sequence"),
        whole("received_ms"),
        whole("received_stopwatch_ms"),
        sa.Column("countersigned", sa.Boolean(), nullable=False),
        text("envelope"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_receipt")),
    )
    op.create_index(op.f("ix_receipt_job_countersigned"), "receipt", ["job", "countersigned"])
    op.create_index(op.f("ix_receipt_lease_sequence"), "receipt", ["lease", "sequence"])
    op.create_table(
        "run",
        text("id"),
        text("job"),
        text("provider"),
        whole("epoch"),
        text("state"),
        text("desired"),
        whole("last_seen_ms"),
        text("known_state"),
        text("order_reason", nullable=True),
        whole("order_until_ms", nullable=True),
        text("reason", nullable=True),
        whole("exit_code", nullable=True),
        text("detail"),
        whole("step"),
        whole("total_steps"),
        text("metrics"),
        whole("cum_device_ms"),
        whole("running_ms", nullable=True),
        whole("preparing_ms"),
        whole("ended_ms", nullable=True),
        text("stall"),
        text("successor"),
        whole("durable_step"),
        whole("durable_ms", nullable=True),
        whole("durable_device_ms"),
        text("warnings"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run")),
    )
    op.create_index(op.f("ix_run_job"), "run", ["job"])
    op.create_index(op.f("ix_run_provider_state"), "run", ["provider", "state"])
    op.create_index(op.f("ix_run_state"), "run", ["state"])
    op.create_index(op.f("ix_run_successor"), "run", ["successor"])
    op.create_table(
        "settlement",
        text("id"),
        text("job"),
        text("lease"),
        text("provider"),
        text("renter"),
        text("reason"),
        whole("settled_ms"),
        text("envelope"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_settlement")),
    )
    op.create_index(op.f("ix_settlement_job_reason"), "settlement", ["job", "reason"])
    op.create_index(
        op.f("ix_settlement_provider_settled_ms"), "settlement", ["provider", "settled_ms"]
    )
    op.create_index(
        op.f("ix_settlement_renter_reason_settled_ms"),
        "settlement",
        ["renter", "reason", "settled_ms"],
    )
    op.create_index("uq_settlement_lease", "settlement", ["lease"], unique=True)
    op.create_table(
        "shard", text("id"), whole("epoch"), sa.PrimaryKeyConstraint("id", name=op.f("pk_shard"))
    )
    op.create_table(
        "tally", text("id"), whole("value"), sa.PrimaryKeyConstraint("id", name=op.f("pk_tally"))
    )
    op.create_table(
        "transfer",
        text("id"),
        text("debit"),
        text("credit"),
        whole("amount_ucr"),
        text("cites"),
        text("memo"),
        whole("time_ms"),
        sa.CheckConstraint("cites <> ''", name=op.f("ck_transfer_cites_a_document")),
        sa.CheckConstraint("amount_ucr >= 0", name=op.f("ck_transfer_amount")),
        sa.CheckConstraint("debit <> credit", name=op.f("ck_transfer_two_accounts")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_transfer")),
    )
    op.create_index(op.f("ix_transfer_cites"), "transfer", ["cites"])
    op.create_index(op.f("ix_transfer_credit"), "transfer", ["credit"])
    op.create_index(op.f("ix_transfer_debit"), "transfer", ["debit"])
    op.create_table(
        "upload",
        text("id"),
        text("party"),
        text("scope"),
        text("name"),
        text("body_sha256"),
        text("table"),
        whole("size_bytes"),
        whole("expires_ms"),
        sa.CheckConstraint("size_bytes > 0", name=op.f("ck_upload_size")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload")),
    )
    for column in ("party", "scope", "expires_ms"):
        op.create_index(op.f(f"ix_upload_{column}"), "upload", [column])
