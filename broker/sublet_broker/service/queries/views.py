"""Views: what callers may see, put together from facts. Nothing here changes anything.

Renters see their own jobs only; for everybody else those don't exist.
"""

from dataclasses import dataclass

from sublet_broker.market import ledger
from sublet_broker.market.facts import (
    AccountFact,
    AgentFact,
    ChainFact,
    CheckpointFact,
    EventFact,
    JobFact,
    LeaseFact,
    LogLineFact,
    OfferFact,
    ReceiptFact,
    SettlementFact,
    TransferFact,
)
from sublet_broker.service.errors import invalid
from sublet_broker.service.queries.export import Exporter, chain_receipts
from sublet_broker.service.queries.job_view import charge_of, job_view
from sublet_broker.service.queries.ledger_audit import audit
from sublet_broker.service.unit_of_work.context import Core
from sublet_broker.service.unit_of_work.job_lookup import own_job
from sublet_broker.service.unit_of_work.unit_of_work import (
    CREDITS,
    DEBITS,
    LOST_DEVICE_MS,
    MOVED,
    RECEIPTS,
    RECOVERIES,
    SETTLEMENTS,
    Work,
    balances_of,
    jobs_in,
)
from sublet_contracts.api import (
    BalanceView,
    BrokerInfo,
    Charge,
    CheckpointsPage,
    CheckpointView,
    EarningsView,
    EventsPage,
    EventView,
    JobLogLine,
    JobsPage,
    JobView,
    LedgerLine,
    LogView,
    ReceiptsPage,
    StatementView,
)
from sublet_contracts.export import Export
from sublet_contracts.reasons import Fault
from sublet_contracts.rules import charge_ucr, fee_ucr
from sublet_contracts.states import JobState, LeaseState

MAX_JOBS = 1000
MAX_EVENTS = 1000
MAX_LINES = 5000


@dataclass(frozen=True)
class Gauge:
    """One figure for /metrics."""

    name: str
    value: int
    help: str
    labels: tuple[tuple[str, str], ...] = ()


class Views:
    """What can be looked at."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._exporter = Exporter(core)

    def info(self, version: str) -> BrokerInfo:
        """Return who this broker is."""
        settings = self._core.settings
        return BrokerInfo(
            broker=self._core.party,
            version=version,
            time_ms=self._core.ports.clock.now_ms(),
            fee_bps=settings.fee_bps,
            heartbeat_ms=settings.heartbeat_ms,
            image_policy=settings.image_policy,
            max_blob_bytes=settings.max_blob_bytes,
        )

    def job(self, caller: str, ref: str) -> JobView:
        """Return a job."""
        with self._core.read() as look:
            return job_view(look, own_job(look, caller, ref))

    def jobs(
        self, caller: str, state: str | None = None, name: str | None = None, limit: int = 100
    ) -> JobsPage:
        """Return the caller's jobs, newest first."""
        where: dict[str, object] = {"renter": caller}
        if state:
            if state not in set(JobState):
                raise invalid(
                    "bad_state",
                    "No such state",
                    f"{state[:40]!r} is not a job's state",
                    field="state",
                    fix=f"one of {', '.join(JobState)}",
                )
            where["state"] = JobState(state)
        if name:
            where["name"] = name
        with self._core.read() as look:
            found = look.find(
                JobFact,
                where,
                order_by="submitted_ms",
                descending=True,
                limit=max(1, min(limit, MAX_JOBS)),
            )
            return JobsPage(jobs=tuple(job_view(look, job) for job in found))

    def events(self, caller: str, ref: str, after: int = 0, limit: int = 500) -> EventsPage:
        """Return a job's history after event number `after`."""
        with self._core.read() as look:
            job = own_job(look, caller, ref)
            found = look.find(
                EventFact,
                {"job": job.id},
                after=("id", after),
                order_by="id",
                limit=max(1, min(limit, MAX_EVENTS)),
            )
        views = tuple(
            EventView(
                id=e.id,
                time_ms=e.time_ms,
                job=e.job,
                lease=e.lease or None,
                epoch=e.epoch,
                kind=e.kind,
                before=e.before,
                after=e.after,
                reason=e.reason,
                detail=e.detail,
            )
            for e in found
        )
        return EventsPage(events=views, next_after=views[-1].id if views else after)

    def logs(self, caller: str, ref: str, after: int = 0, limit: int = 1000) -> list[JobLogLine]:
        """Return a job's log lines after cursor `after`."""
        with self._core.read() as look:
            job = own_job(look, caller, ref)
            lines = look.find(
                LogLineFact,
                {"job": job.id},
                after=("id", after),
                order_by="id",
                limit=max(1, min(limit, MAX_LINES)),
            )
        return [
            JobLogLine(
                cursor=line.id,
                epoch=line.epoch,
                number=line.number,
                time_ms=line.time_ms,
                stream=line.stream,
                text=line.text,
            )
            for line in lines
        ]

    def checkpoints(self, caller: str, ref: str) -> CheckpointsPage:
        """Return a job's checkpoints and outputs, newest first."""
        with self._core.read() as look:
            job = own_job(look, caller, ref)
            found = look.find(
                CheckpointFact, {"job": job.id}, order_by="created_ms", descending=True
            )
        return CheckpointsPage(
            checkpoints=tuple(
                CheckpointView(
                    id=c.id,
                    kind=c.kind,
                    step=c.step,
                    epoch=c.epoch,
                    state=c.state,
                    index_sha256=c.index_sha256,
                    total_bytes=c.total_bytes,
                    created_ms=c.created_ms,
                    durable_ms=c.durable_ms,
                    detail=c.detail if c.kept else "its content is no longer kept",
                )
                for c in found
            )
        )

    def statement(self, caller: str, ref: str) -> StatementView:
        """Return every charge of a job, with the receipt it rests on."""
        with self._core.read() as look:
            job = own_job(look, caller, ref)
            settled = look.find(SettlementFact, {"job": job.id}, order_by="settled_ms")
            charges = tuple(charge_of(look, fact) for fact in settled)
            held = ledger.balance_ucr(look.get(AccountFact, ledger.held(job.id)))
            released = look.get(TransferFact, ledger.transfer_id("release", job.id))
            lost_work = sum(
                _lost_work_charged_ucr(
                    charge,
                    look.must(LeaseFact, charge.lease),
                    look.must(ChainFact, charge.lease).durable_device_ms,
                )
                for charge in charges
            )
        return StatementView(
            job=job.id,
            name=job.name,
            state=job.state,
            budget_ucr=job.budget_ucr,
            held_ucr=held,
            charged_ucr=job.settled_ucr,
            released_ucr=released.amount_ucr if released else 0,
            lost_work_charged_ucr=lost_work,
            charges=charges,
        )

    def receipts(self, caller: str, ref: str, unsigned: bool = False) -> ReceiptsPage:
        """Return a job's receipts, oldest first. `unsigned`: of each lease the newest one, where
        the renter hasn't signed it: cumulative, it stands for all before it."""
        with self._core.read() as look:
            job = own_job(look, caller, ref)
            leases = look.find(LeaseFact, {"job": job.id}, order_by="epoch")
            shown: list[ReceiptFact] = []
            for lease in leases:
                chain = chain_receipts(look, lease.id)
                if unsigned:
                    chain = [r for r in chain[-1:] if not r.countersigned]
                shown += chain
        wanted = {receipt.lease for receipt in shown}
        return ReceiptsPage(
            receipts=tuple(receipt.envelope for receipt in shown),
            leases={lease.id: lease.envelope for lease in leases if lease.id in wanted},
        )

    def export(self, caller: str, ref: str) -> Export:
        """Return all documents of a job with their proofs: what verify_export checks offline."""
        with self._core.read() as look:
            return self._exporter.export(look, own_job(look, caller, ref))

    def log(self, since: int) -> LogView:
        """Return the log's head, and the proof that it only grew since it had that many entries."""
        with self._core.read() as look:
            return self._exporter.since(look, since)

    def balance(self, caller: str) -> BalanceView:
        """Return the caller's account and its latest movements."""
        accounts = (ledger.available(caller), ledger.earned(caller))
        with self._core.read() as look:
            available = look.get(AccountFact, accounts[0])
            earned = look.get(AccountFact, accounts[1])
            held = sum(
                ledger.balance_ucr(look.get(AccountFact, ledger.held(job.id)))
                for job in look.find(JobFact, {"renter": caller, "ended_ms": None})
            )
            lines: list[LedgerLine] = []
            for account in accounts:
                lines += _lines(look, account)
        lines.sort(key=lambda line: (line.time_ms, line.cites, line.account), reverse=True)
        return BalanceView(
            party=caller,
            available_ucr=ledger.balance_ucr(available),
            held_ucr=held,
            earned_ucr=ledger.balance_ucr(earned),
            lines=tuple(lines[:100]),
        )

    def earnings(self, caller: str) -> EarningsView:
        """Return what the caller has earned as a provider, and what open receipts promise."""
        with self._core.read() as look:
            settled = look.find(SettlementFact, {"provider": caller}, order_by="settled_ms")
            charges = tuple(charge_of(look, fact) for fact in settled)
            pending = 0
            for lease in look.find(LeaseFact, {"provider": caller, "state": LeaseState.ACTIVE}):
                pending += promised_ucr(look, lease)
            earned = ledger.balance_ucr(look.get(AccountFact, ledger.earned(caller)))
        return EarningsView(
            party=caller, earned_ucr=earned, pending_ucr=pending, charges=charges[-1000:]
        )

    def audit(self) -> list[str]:
        """Return every invariant that doesn't hold: empty. Reads the whole ledger."""
        with self._core.read() as look:
            return audit(look.tx)

    def gauges(self) -> list[Gauge]:
        """Return the figures of the market for /metrics."""
        with self._core.read() as look:
            return _gauges(look)


def _lost_work_charged_ucr(charge: Charge, lease: LeaseFact, durable_device_ms: int) -> int:
    """Return what was charged beyond durable progress where the provider was at fault: 0."""
    if charge.fault not in (Fault.PROVIDER, Fault.BROKER):
        return 0
    due = charge_ucr(lease.price_ucr_per_device_hour, durable_device_ms)
    return max(0, charge.charged_ucr - due)


def promised_ucr(look: Work, lease: LeaseFact) -> int:
    """Return what the provider would get if the lease ended well now."""
    chain = look.get(ChainFact, lease.id)
    if chain is None:
        return 0
    charge = min(charge_ucr(lease.price_ucr_per_device_hour, chain.cum_device_ms), lease.hold_ucr)
    return charge - fee_ucr(charge, lease.fee_bps)


def _lines(look: Work, account: str) -> list[LedgerLine]:
    lines: list[LedgerLine] = []
    for side, sign in (("debit", -1), ("credit", 1)):
        found = look.find(
            TransferFact, {side: account}, order_by="time_ms", descending=True, limit=100
        )
        lines += [
            LedgerLine(
                time_ms=t.time_ms,
                account=account,
                amount_ucr=sign * t.amount_ucr,
                cites=t.cites,
                memo=t.memo,
            )
            for t in found
        ]
    return lines


def _gauges(look: Work) -> list[Gauge]:
    """Read sums that are kept, and count what is few: a scrape costs the same on a big database."""
    count, tally = look.tx.count, look.tally
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
