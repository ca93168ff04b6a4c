"""The figures of the market for /metrics."""

from dataclasses import dataclass

from sublet_broker.market.facts import (
    AgentFact,
    LeaseFact,
    OfferFact,
)
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.unit_of_work import (
    CREDITS,
    DEBITS,
    LOST_DEVICE_MS,
    MOVED,
    RECEIPTS,
    RECOVERIES,
    SETTLEMENTS,
    UnitOfWork,
    balances_of,
    jobs_in,
)
from sublet_contracts.states import JobState, LeaseState


@dataclass(frozen=True)
class Gauge:
    """One figure for /metrics."""

    name: str
    value: int
    help: str
    labels: tuple[tuple[str, str], ...] = ()


def _gauges(snapshot: UnitOfWork) -> list[Gauge]:
    """Read sums that are kept, and count what is few: a scrape costs the same on a big database."""
    count, tally = snapshot.tx.count, snapshot.tally
    gauges = [
        Gauge("sublet_jobs", tally(jobs_in(state)), "jobs by state", (("state", state),))
        for state in JobState
    ]
    kinds = ("available", "held", "earned", "fees", "world")
    sums = {kind: tally(balances_of(kind)) for kind in kinds}
    gauges += [
        Gauge("sublet_ledger_ucr", amount, "balances by kind of account", (("account", kind),))
        for kind, amount in sums.items()
    ]
    moved, debits, credits = tally(MOVED), tally(DEBITS), tally(CREDITS)
    discrepancy = max(abs(debits - moved), abs(credits - moved), abs(sum(sums.values())))
    gauges += [
        Gauge("sublet_offers_open", count(OfferFact, {"open": True}), "open offers"),
        Gauge("sublet_agents_connected", count(AgentFact, {"connected": True}), "agents"),
        Gauge("sublet_leases_active", count(LeaseFact, {"state": LeaseState.ACTIVE}), "leases"),
        Gauge("sublet_recoveries_total", tally(RECOVERIES), "leases that ended by another's fault"),
        Gauge("sublet_lost_device_ms_total", tally(LOST_DEVICE_MS), "device time that nobody paid"),
        Gauge("sublet_receipts_total", tally(RECEIPTS), "receipts kept"),
        Gauge("sublet_settlements_total", tally(SETTLEMENTS), "leases settled"),
        Gauge("sublet_ledger_debits_ucr", debits, "sum of all debits"),
        Gauge("sublet_ledger_credits_ucr", credits, "sum of all credits"),
        Gauge(
            "sublet_ledger_discrepancy_ucr",
            discrepancy,
            "transfers against debits, credits and balances: 0, or the ledger is wrong",
        ),
    ]
    return gauges


class Metrics:
    """What is counted."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def gauges(self) -> list[Gauge]:
        """Return the figures of the market for /metrics."""
        with self._context.read() as snapshot:
            return _gauges(snapshot)
