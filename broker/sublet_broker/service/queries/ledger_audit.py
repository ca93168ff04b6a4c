"""The audit: every invariant of the ledger, checked against all that was ever written, and the sums
that are kept against what they stand for."""

from collections import Counter

from sublet_broker.market import ledger
from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import (
    AccountFact,
    JobFact,
    LeaseFact,
    LogEntryFact,
    PendingFact,
    SettlementFact,
    TallyFact,
    TransferFact,
)
from sublet_broker.service.leases.settlement import pending_of
from sublet_broker.service.ports import Transaction
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.tallies import TALLIES_OF
from sublet_contracts.documents import Settlement
from sublet_contracts.states import JOB, LeaseState, is_terminal


class LedgerAudit:
    """The books, audited."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def breaches(self) -> list[str]:
        """Return every invariant that doesn't hold: none. Reads the whole ledger."""
        with self._context.read() as snapshot:
            return audit(snapshot.tx)


def audit(tx: Transaction) -> list[str]:
    """Return each breach in words; empty: the books are right."""
    transfers = tx.find(TransferFact)
    pendings = tx.find(PendingFact)
    found = ledger.breaches(tx.find(AccountFact), transfers, pendings)
    found += _uncited(tx, transfers)
    leases = tx.find(LeaseFact)
    found += _pendings(pendings, leases)
    found += _charges(tx, leases)
    found += _jobs(tx, leases)
    found += _tallies(tx)
    return found


def _tallies(tx: Transaction) -> list[str]:
    added: Counter[str] = Counter()
    for kind, tallies in TALLIES_OF.items():
        for tally in tallies:
            if tally.is_count:
                added[tally.id()] = tx.count(kind, tally.where)
        sums = [tally for tally in tallies if not tally.is_count]
        for fact in tx.find(kind) if sums else ():
            for tally in sums:
                id, amount = tally.counts(fact)
                added[id] += amount
    kept = {tally.id: tally.value for tally in tx.find(TallyFact)}
    return [
        f"the sum {id} is kept as {kept.get(id, 0)}, and is {added.get(id, 0)}"
        for id in sorted({*kept, *added})
        if kept.get(id, 0) != added.get(id, 0)
    ]


def _uncited(tx: Transaction, transfers: list[TransferFact]) -> list[str]:
    logged = {entry.document for entry in tx.find(LogEntryFact)}
    return [
        f"transfer {t.id} cites {t.cites}, which is not in the log"
        for t in transfers
        if t.cites not in logged
    ]


def _pendings(pendings: list[PendingFact], leases: list[LeaseFact]) -> list[str]:
    found: list[str] = []
    by_id = {pending.id: pending for pending in pendings}
    if len(by_id) != len(leases):
        found.append(f"{len(by_id)} reservations for {len(leases)} leases")
    for lease in leases:
        pending = by_id.get(pending_of(lease.id))
        if pending is None:
            found.append(f"lease {lease.id} has no reservation")
            continue
        is_open = pending.state == ledger.OPEN
        if is_open is (lease.state is LeaseState.CLOSED):
            found.append(f"lease {lease.id} is {lease.state}, its reservation {pending.state}")
        if pending.amount_ucr != lease.hold_ucr:
            found.append(f"lease {lease.id}: its reservation is not its hold")
    return found


def _charges(tx: Transaction, leases: list[LeaseFact]) -> list[str]:
    found: list[str] = []
    by_id = {lease.id: lease for lease in leases}
    settled: dict[str, int] = {}
    for fact in tx.find(SettlementFact):
        document = accepted(fact.envelope, Settlement)
        lease = by_id[fact.lease]
        if fact.lease in settled:
            found.append(f"lease {fact.lease} was settled twice")
        settled[fact.lease] = document.charged_ucr
        if document.charged_ucr > lease.hold_ucr:
            found.append(f"lease {lease.id} was charged beyond its hold")
        moved = [tx.get(TransferFact, t.id) for t in document.transfers]
        if any(t is None or t.cites != fact.id for t in moved):
            found.append(f"settlement {fact.id} lists transfers that were not made for it")
        if sum(t.amount_ucr for t in moved if t is not None) != document.charged_ucr:
            found.append(f"settlement {fact.id} moved another amount than it charged")
    for lease in leases:
        over = lease.state is LeaseState.CLOSED and lease.active_ms is not None
        if over is not (lease.id in settled):
            found.append(f"lease {lease.id} is {lease.state}, settled: {lease.id in settled}")
    return found


def _jobs(tx: Transaction, leases: list[LeaseFact]) -> list[str]:
    found: list[str] = []
    for job in tx.find(JobFact):
        mine = [lease for lease in leases if lease.job == job.id]
        live = [lease for lease in mine if lease.state is not LeaseState.CLOSED]
        held = ledger.balance_ucr(tx.get(AccountFact, ledger.held(job.id)))
        if len(live) > 1:
            found.append(f"job {job.id} has {len(live)} holders")
        if sorted(lease.epoch for lease in mine) != list(range(1, job.epoch + 1)):
            found.append(f"job {job.id}: its epochs are not 1 to {job.epoch}")
        if job.settled_ucr > job.budget_ucr:
            found.append(f"job {job.id} was charged beyond its budget")
        if job.accepted_ucr > job.accept_ucr:
            found.append(f"job {job.id} was charged beyond what its renter accepts unsigned")
        expected = 0 if is_terminal(JOB, job.state) else job.budget_ucr - job.settled_ucr
        if held != expected:
            found.append(f"job {job.id}: {held} ucr are held, {expected} should be")
        if is_terminal(JOB, job.state) and live:
            found.append(f"job {job.id} has ended and is still leased")
    return found
