"""Money as its owners see it: statements, balances, earnings."""

from sublet_broker.market import ledger
from sublet_broker.market.facts import (
    AccountFact,
    ChainFact,
    JobFact,
    LeaseFact,
    SettlementFact,
    TransferFact,
)
from sublet_broker.service.queries.job_view import charge_of
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.job_lookup import own_job
from sublet_broker.service.unit_of_work.unit_of_work import (
    UnitOfWork,
)
from sublet_contracts.api import (
    BalanceView,
    Charge,
    EarningsView,
    LedgerLine,
    StatementView,
)
from sublet_contracts.reasons import Fault
from sublet_contracts.rules import charge_ucr, fee_ucr
from sublet_contracts.states import LeaseState


def _lost_work_charged_ucr(charge: Charge, lease: LeaseFact, durable_device_ms: int) -> int:
    """Return what was charged beyond durable progress where the provider was at fault: 0."""
    if charge.fault not in (Fault.PROVIDER, Fault.BROKER):
        return 0
    due = charge_ucr(lease.price_ucr_per_device_hour, durable_device_ms)
    return max(0, charge.charged_ucr - due)


def promised_ucr(snapshot: UnitOfWork, lease: LeaseFact) -> int:
    """Return what the provider would get if the lease ended well now."""
    chain = snapshot.get(ChainFact, lease.id)
    if chain is None:
        return 0
    charge = min(charge_ucr(lease.price_ucr_per_device_hour, chain.cum_device_ms), lease.hold_ucr)
    return charge - fee_ucr(charge, lease.fee_bps)


def _lines(snapshot: UnitOfWork, account: str) -> list[LedgerLine]:
    lines: list[LedgerLine] = []
    for side, sign in (("debit", -1), ("credit", 1)):
        found = snapshot.find(
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


class Money:
    """Accounts and charges."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def statement(self, caller: str, ref: str) -> StatementView:
        """Return every charge of a job, with the receipt it rests on."""
        with self._context.read() as snapshot:
            job = own_job(snapshot, caller, ref)
            settled = snapshot.find(SettlementFact, {"job": job.id}, order_by="settled_ms")
            charges = tuple(charge_of(snapshot, fact) for fact in settled)
            held = ledger.balance_ucr(snapshot.get(AccountFact, ledger.held(job.id)))
            released = snapshot.get(TransferFact, ledger.transfer_id("release", job.id))
            lost_work = sum(
                _lost_work_charged_ucr(
                    charge,
                    snapshot.must(LeaseFact, charge.lease),
                    snapshot.must(ChainFact, charge.lease).durable_device_ms,
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

    def balance(self, caller: str) -> BalanceView:
        """Return the caller's account and its latest movements."""
        accounts = (ledger.available(caller), ledger.earned(caller))
        with self._context.read() as snapshot:
            available = snapshot.get(AccountFact, accounts[0])
            earned = snapshot.get(AccountFact, accounts[1])
            held = sum(
                ledger.balance_ucr(snapshot.get(AccountFact, ledger.held(job.id)))
                for job in snapshot.find(JobFact, {"renter": caller, "ended_ms": None})
            )
            lines: list[LedgerLine] = []
            for account in accounts:
                lines += _lines(snapshot, account)
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
        with self._context.read() as snapshot:
            settled = snapshot.find(SettlementFact, {"provider": caller}, order_by="settled_ms")
            charges = tuple(charge_of(snapshot, fact) for fact in settled)
            pending = 0
            for lease in snapshot.find(LeaseFact, {"provider": caller, "state": LeaseState.ACTIVE}):
                pending += promised_ucr(snapshot, lease)
            earned = ledger.balance_ucr(snapshot.get(AccountFact, ledger.earned(caller)))
        return EarningsView(
            party=caller, earned_ucr=earned, pending_ucr=pending, charges=charges[-1000:]
        )
