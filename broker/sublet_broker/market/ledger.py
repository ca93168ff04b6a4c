"""The ledger: double entry in integer micro-credits, append-only.

Accounts: `world` (what deposits come from), `party:<id>:available`, `job:<id>:held`,
`party:<id>:earned`, `broker:fees`.

Rules:
- A transfer moves an amount from one account to another. Its id is made from its purpose and the
  document it cites: the same movement again is a no-op, another one under that id is an error.
- A pending reserves an amount on an account. It resolves exactly once: posted, with transfers out
  of that account of no more than it reserved, or void. What isn't moved is free again.
- No account but `world` ever falls below what is reserved on it, and nothing below zero.
- Everything is checked first and returned as facts; the caller writes all of them or none.

    submit       party:available -> job:held          the whole budget; cites the job
    amendment    party:available -> job:held          what was added
    lease        pending on job:held                  the lease's hold
    settlement   job:held -> party:earned, broker:fees; the pending is posted (void if all is 0)
    job's end    job:held -> party:available          what is left
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from sublet_broker.market.facts import AccountFact, Fact, PendingFact, TransferFact

WORLD = "world"
FEES = "broker:fees"

OPEN, POSTED, VOID = "open", "posted", "void"


class LedgerError(Exception):
    """A movement that the rules forbid; nothing was changed."""


class Overdrawn(LedgerError):
    """The account has less than the movement needs. `free_ucr`: what it has."""

    def __init__(self, account: str, free_ucr: int, amount_ucr: int) -> None:
        super().__init__(f"{account} has {free_ucr} ucr free, {amount_ucr} are needed")
        self.free_ucr = free_ucr


class Accounts(Protocol):
    """What the ledger reads."""

    def account(self, id: str) -> AccountFact | None:
        """Return the account with that name."""
        ...

    def transfer(self, id: str) -> TransferFact | None:
        """Return the transfer with that id."""
        ...

    def pending(self, id: str) -> PendingFact | None:
        """Return the pending with that id."""
        ...


@dataclass(frozen=True)
class Move:
    """A movement to be posted."""

    id: str
    debit: str
    credit: str
    amount_ucr: int
    cites: str
    memo: str


def available(party: str) -> str:
    """Return the account of what a party can spend."""
    return f"party:{party}:available"


def earned(party: str) -> str:
    """Return the account of what a provider has earned."""
    return f"party:{party}:earned"


def held(job: str) -> str:
    """Return the account of what is set aside for a job."""
    return f"job:{job}:held"


def transfer_id(purpose: str, cites: str) -> str:
    """Return the id of the movement that `cites` calls for under `purpose`."""
    return hashlib.sha256(f"sublet-transfer:{purpose}:{cites}".encode()).hexdigest()


def balance_ucr(account: AccountFact | None) -> int:
    """Return what the account holds, reserved or not."""
    return account.credits_ucr - account.debits_ucr if account else 0


def free_ucr(account: AccountFact | None) -> int:
    """Return what of the account isn't reserved."""
    return balance_ucr(account) - (account.pending_ucr if account else 0)


class _Sheet:
    """Accounts as they will be, over accounts as they are."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self.changed: dict[str, AccountFact] = {}

    def get(self, id: str) -> AccountFact:
        return self.changed.get(id) or self._accounts.account(id) or AccountFact(id)

    def put(self, account: AccountFact) -> None:
        if account.id != WORLD and free_ucr(account) < 0:
            before = self.get(account.id)
            raise Overdrawn(account.id, free_ucr(before), free_ucr(before) - free_ucr(account))
        if account.pending_ucr < 0:
            raise LedgerError(f"{account.id}: more is given back than was reserved")
        self.changed[account.id] = account

    def facts(self) -> list[Fact]:
        return [self.changed[id] for id in sorted(self.changed)]


def post(accounts: Accounts, moves: Sequence[Move], now_ms: int) -> list[Fact]:
    """Return the facts of posting `moves`; none of those that were posted before.

    Raises Overdrawn, LedgerError.
    """
    sheet = _Sheet(accounts)
    posted = _post(sheet, accounts, moves, now_ms)
    return [*posted, *sheet.facts()]


def _post(
    sheet: _Sheet, accounts: Accounts, moves: Sequence[Move], now_ms: int
) -> list[TransferFact]:
    posted: list[TransferFact] = []
    for move in moves:
        before = accounts.transfer(move.id) or next((t for t in posted if t.id == move.id), None)
        if before is not None:
            same = (before.debit, before.credit, before.amount_ucr)
            if same != (move.debit, move.credit, move.amount_ucr):
                raise LedgerError(f"transfer {move.id} was posted with other contents")
            continue
        if move.amount_ucr <= 0 or move.debit == move.credit:
            raise LedgerError(f"transfer {move.id}: {move.amount_ucr} ucr, {move.debit}")
        debit = sheet.get(move.debit)
        sheet.put(replace(debit, debits_ucr=debit.debits_ucr + move.amount_ucr))
        credit = sheet.get(move.credit)
        sheet.put(replace(credit, credits_ucr=credit.credits_ucr + move.amount_ucr))
        posted.append(
            TransferFact(
                move.id, move.debit, move.credit, move.amount_ucr, move.cites, move.memo, now_ms
            )
        )
    return posted


def reserve(
    accounts: Accounts, id: str, account: str, amount_ucr: int, cites: str, now_ms: int
) -> list[Fact]:
    """Return the facts of reserving an amount. Raises Overdrawn, LedgerError."""
    before = accounts.pending(id)
    if before is not None:
        if (before.account, before.amount_ucr, before.cites) != (account, amount_ucr, cites):
            raise LedgerError(f"pending {id} was made with other contents")
        return []
    if amount_ucr < 0:
        raise LedgerError(f"pending {id}: {amount_ucr} ucr")
    sheet = _Sheet(accounts)
    current = sheet.get(account)
    sheet.put(replace(current, pending_ucr=current.pending_ucr + amount_ucr))
    return [PendingFact(id, account, amount_ucr, OPEN, cites, now_ms), *sheet.facts()]


def resolve(accounts: Accounts, id: str, moves: Sequence[Move], now_ms: int) -> list[Fact]:
    """Return the facts of resolving a pending: posting `moves`, or voiding it where there are none.

    Again with the same moves: a no-op. Raises LedgerError.
    """
    pending = accounts.pending(id)
    if pending is None:
        raise LedgerError(f"there is no pending {id}")
    after = POSTED if moves else VOID
    if pending.state != OPEN:
        if pending.state != after or any(accounts.transfer(m.id) is None for m in moves):
            raise LedgerError(f"pending {id} was resolved before, as {pending.state}")
        return []
    moved = sum(move.amount_ucr for move in moves)
    if moved > pending.amount_ucr or any(move.debit != pending.account for move in moves):
        raise LedgerError(
            f"pending {id}: {moved} ucr are moved, {pending.amount_ucr} of {pending.account} "
            "were reserved"
        )
    sheet = _Sheet(accounts)
    current = sheet.get(pending.account)
    sheet.put(replace(current, pending_ucr=current.pending_ucr - pending.amount_ucr))
    posted = _post(sheet, accounts, moves, now_ms)
    return [replace(pending, state=after), *posted, *sheet.facts()]


def breaches(
    accounts: Iterable[AccountFact],
    transfers: Iterable[TransferFact],
    pendings: Iterable[PendingFact],
) -> list[str]:
    """Return what doesn't add up: balances against a replay from zero, sums, reservations."""
    found: list[str] = []
    debits: dict[str, int] = {}
    credits: dict[str, int] = {}
    reserved: dict[str, int] = {}
    for transfer in transfers:
        debits[transfer.debit] = debits.get(transfer.debit, 0) + transfer.amount_ucr
        credits[transfer.credit] = credits.get(transfer.credit, 0) + transfer.amount_ucr
    for pending in pendings:
        if pending.state == OPEN:
            reserved[pending.account] = reserved.get(pending.account, 0) + pending.amount_ucr
    known = {account.id: account for account in accounts}
    for id in sorted({*known, *debits, *credits, *reserved}):
        account = known.get(id, AccountFact(id))
        replayed = (debits.get(id, 0), credits.get(id, 0), reserved.get(id, 0))
        stored = (account.debits_ucr, account.credits_ucr, account.pending_ucr)
        if replayed != stored:
            found.append(
                f"account {id}: {stored} stored, {replayed} replayed (debit, credit, held)"
            )
        if id != WORLD and free_ucr(account) < 0:
            found.append(f"account {id} is overdrawn by {-free_ucr(account)} ucr")
    total_debits = sum(account.debits_ucr for account in known.values())
    total_credits = sum(account.credits_ucr for account in known.values())
    if total_debits != total_credits:
        found.append(f"debits {total_debits} are not credits {total_credits}")
    return found
