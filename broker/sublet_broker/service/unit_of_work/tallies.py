"""Tallies: sums over facts that are kept up in the transactions that change them.

Each is declared here once. The unit of work keeps it, the ledger audit adds it up anew, and
/metrics shows it if it is a TallyMetric; none of them names it. So a new one is one declaration in
TALLIES, and a scrape costs the same on a database of any size. It holds for every fact that is
written through UnitOfWork (put, add, delete), which all use-cases do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sublet_broker.market import ledger, losses
from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import (
    AccountFact,
    AgentFact,
    BlobFact,
    Fact,
    JobFact,
    LeaseFact,
    OfferFact,
    ReceiptFact,
    SettlementFact,
    TransferFact,
)
from sublet_broker.service.unit_of_work.metrics import Metric, MetricType
from sublet_contracts.documents import Settlement
from sublet_contracts.reasons import Fault, Reason
from sublet_contracts.states import JOB, JobState, LeaseState, is_terminal

F = TypeVar("F", bound=Fact)

COUNTED_BYTES = 65_536
"""The least that content counts for, so that rows are bounded by bytes."""


@dataclass(frozen=True, kw_only=True)
class Tally(Generic[F]):
    """What the facts of one kind come to: one integer for each group of them.

    `where`: the fields of a fact that counts at all, with their values. `amount`: what it counts
    for; 1 unless said. `group`: the sum to which it goes; "" unless said. Both read nothing but the
    fact.
    """

    name: str
    of: type[F]
    where: Mapping[str, object] = field(default_factory=dict)
    amount: Callable[[F], int] | None = None
    group: Callable[[F], str] | None = None

    def id(self, group: str = "") -> str:
        """Return the id under which a group's sum is stored (TallyFact)."""
        return f"{self.name}:{group}" if group else self.name

    def counts(self, fact: F) -> tuple[str, int]:
        """Return the id of the sum to which the fact goes, and what it counts for there."""
        group = self.group(fact) if self.group else ""
        if any(getattr(fact, name) != value for name, value in self.where.items()):
            return self.id(group), 0
        return self.id(group), self.amount(fact) if self.amount else 1

    @property
    def is_count(self) -> bool:
        """Whether the database can count it, without reading each fact."""
        return self.amount is None and self.group is None


@dataclass(frozen=True, kw_only=True)
class TallyMetric(Metric, Tally[F]):
    """A tally that /metrics shows. With a label, `groups` are all its values, and each is shown
    from the start. The stored integer is divided by `per_unit` to get the metric's unit."""

    groups: tuple[str, ...] = ("",)
    per_unit: int = 1


def counted_bytes(size_bytes: int) -> int:
    """Return what content of this size counts for."""
    return max(size_bytes, COUNTED_BYTES)


def _settlement(fact: SettlementFact) -> Settlement:
    return accepted(fact.envelope, Settlement)


def _account_kind(account: AccountFact) -> str:
    return account.id.rsplit(":", 1)[-1]


LIVE_JOBS = Tally(
    name="live_jobs",
    of=JobFact,
    amount=lambda job: int(not is_terminal(JOB, job.state)),
    group=lambda job: job.renter,
)
"""A renter's jobs that haven't ended."""

STORED_BYTES = Tally(
    name="stored_bytes",
    of=BlobFact,
    amount=lambda blob: counted_bytes(blob.size_bytes),
    group=lambda blob: blob.scope,
)
"""What a scope's content counts for."""

LEASED_MACHINE_MS = Tally(
    name="leased_machine_ms",
    of=LeaseFact,
    where={"state": LeaseState.CLOSED},
    amount=losses.machine_ms,
)
"""For how long closed leases had their machines."""

LOSSES = Tally(
    name="losses",
    of=LeaseFact,
    where={"state": LeaseState.CLOSED},
    amount=losses.losses,
)
"""Closed leases whose machine was lost without notice."""

TRANSFERRED = TallyMetric(
    name="sublet_ledger_transferred_microcredits_total",
    type=MetricType.COUNTER,
    help="Amounts of all transfers.",
    of=TransferFact,
    amount=lambda transfer: transfer.amount_ucr,
)
DEBITS = TallyMetric(
    name="sublet_ledger_debits_microcredits_total",
    type=MetricType.COUNTER,
    help="Amounts debited to accounts.",
    of=AccountFact,
    amount=lambda account: account.debits_ucr,
)
CREDITS = TallyMetric(
    name="sublet_ledger_credits_microcredits_total",
    type=MetricType.COUNTER,
    help="Amounts credited to accounts.",
    of=AccountFact,
    amount=lambda account: account.credits_ucr,
)
BALANCES = TallyMetric(
    name="sublet_ledger_balance_microcredits",
    type=MetricType.GAUGE,
    help="Balances by kind of account; world is what deposits came from, so they add up to 0.",
    labels=("account",),
    of=AccountFact,
    amount=ledger.balance_ucr,
    group=_account_kind,
    groups=("available", "held", "earned", "fees", "world"),
)

TALLIES: tuple[Tally[Any], ...] = (
    LIVE_JOBS,
    STORED_BYTES,
    LEASED_MACHINE_MS,
    LOSSES,
    TRANSFERRED,
    DEBITS,
    CREDITS,
    BALANCES,
    TallyMetric(
        name="sublet_jobs",
        type=MetricType.GAUGE,
        help="Jobs by state.",
        labels=("state",),
        of=JobFact,
        group=lambda job: job.state,
        groups=tuple(JobState),
    ),
    TallyMetric(
        name="sublet_offers_open",
        type=MetricType.GAUGE,
        help="Offers that are open.",
        of=OfferFact,
        where={"open": True},
    ),
    TallyMetric(
        name="sublet_agents_connected",
        type=MetricType.GAUGE,
        help="Agents that the market counts as connected.",
        of=AgentFact,
        where={"connected": True},
    ),
    TallyMetric(
        name="sublet_leases_active",
        type=MetricType.GAUGE,
        help="Leases that are active.",
        of=LeaseFact,
        where={"state": LeaseState.ACTIVE},
    ),
    TallyMetric(
        name="sublet_receipts_total",
        type=MetricType.COUNTER,
        help="Receipts taken up.",
        of=ReceiptFact,
    ),
    TallyMetric(
        name="sublet_settlements_total",
        type=MetricType.COUNTER,
        help="Leases settled, by the reason for which they ended.",
        labels=("reason",),
        of=SettlementFact,
        group=lambda fact: _settlement(fact).reason,
        groups=tuple(Reason),
    ),
    TallyMetric(
        name="sublet_recoveries_total",
        type=MetricType.COUNTER,
        help="Leases settled that ended by the provider's or the broker's fault.",
        of=SettlementFact,
        amount=lambda fact: int(_settlement(fact).fault in (Fault.PROVIDER, Fault.BROKER)),
    ),
    TallyMetric(
        name="sublet_lost_device_seconds_total",
        type=MetricType.COUNTER,
        help="Device time that was used and is paid by nobody.",
        of=SettlementFact,
        amount=lambda fact: _settlement(fact).lost_device_ms,
        per_unit=1000,
    ),
)


def _by_kind() -> dict[type[Fact], tuple[Tally[Any], ...]]:
    found: dict[type[Fact], tuple[Tally[Any], ...]] = {}
    for tally in TALLIES:
        found[tally.of] = (*found.get(tally.of, ()), tally)
    return found


TALLIES_OF = _by_kind()
"""The tallies over each kind of fact."""
