"""What the market shows on /metrics: its tallies, and whether the ledger's agree."""

from sublet_broker.market.facts import TallyFact
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.metrics import Metric, MetricType, Sample
from sublet_broker.service.unit_of_work.tallies import (
    BALANCES,
    CREDITS,
    DEBITS,
    TALLIES,
    TRANSFERRED,
    TallyMetric,
)

SHOWN = tuple(tally for tally in TALLIES if isinstance(tally, TallyMetric))

LEDGER_DISCREPANCY = Metric(
    name="sublet_ledger_discrepancy_microcredits",
    type=MetricType.GAUGE,
    help="Transfers against debits, credits and balances; 0, or the ledger is wrong.",
)


class MarketMetrics:
    """The market's metrics."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def samples(self) -> list[Sample]:
        """Return all of them. One question by key: it costs the same on a database of any size."""
        ids = tuple(metric.id(group) for metric in SHOWN for group in metric.groups)
        with self._context.read() as snapshot:
            sums = {tally.id: tally.value for tally in snapshot.find(TallyFact, {"id": ids})}
        found = [
            Sample(
                metric,
                sums.get(metric.id(group), 0) / metric.per_unit,
                (group,) if metric.labels else (),
            )
            for metric in SHOWN
            for group in metric.groups
        ]
        transferred, debits, credits = (sums.get(t.id(), 0) for t in (TRANSFERRED, DEBITS, CREDITS))
        balance = sum(sums.get(BALANCES.id(group), 0) for group in BALANCES.groups)
        wrong_by = max(abs(debits - transferred), abs(credits - transferred), abs(balance))
        return [*found, Sample(LEDGER_DISCREPANCY, wrong_by)]
