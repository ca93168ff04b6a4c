"""The auditor's ledger: kept anew from every transfer and reservation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set as AbstractSet
from typing import Any

from tests.simulation.models import never


class Ledger:
    """Of one market. `documents`: the ids of all that is logged, which transfers must cite."""

    def __init__(self, documents: AbstractSet[str]) -> None:
        self._documents = documents
        self.debits: dict[str, int] = defaultdict(int)
        self.credits: dict[str, int] = defaultdict(int)
        self.reserved: dict[str, int] = defaultdict(int)
        self.pendings: dict[str, list[Any]] = {}

    def held(self, job: str) -> int:
        """Return what is held for a job."""
        account = f"job:{job}:held"
        return self.credits[account] - self.debits[account]

    def finished(self) -> None:
        """Everything has come to its end."""
        for id, pending in self.pendings.items():
            never(pending[2] == "open", f"reservation {id[:8]} was never resolved")
        total = sum(self.credits.values()) - sum(self.debits.values())
        never(total != 0, f"debits and credits differ by {total}")

    def transfer(self, old: Any, new: Any) -> None:
        never(old is not None or new is None, "a transfer was changed")
        never(new.amount_ucr <= 0, "a transfer of nothing")
        never(new.cites not in self._documents, "a transfer cites no logged document")
        self.debits[new.debit] += new.amount_ucr
        self.credits[new.credit] += new.amount_ucr

    def pending(self, old: Any, new: Any) -> None:
        never(new is None, "a reservation was deleted")
        known = self.pendings.get(new.id)
        if known is None:
            never(new.state != "open", "a reservation began resolved")
            self.pendings[new.id] = [new.account, new.amount_ucr, "open"]
            self.reserved[new.account] += new.amount_ucr
            return
        never((known[0], known[1]) != (new.account, new.amount_ucr), "a reservation changed")
        if known[2] != new.state:
            never(known[2] != "open", f"a reservation resolved again: {known[2]}, {new.state}")
            known[2] = new.state
            self.reserved[new.account] -= new.amount_ucr

    def account(self, old: Any, new: Any) -> None:
        never(new is None, "an account was deleted")
        mine = (self.debits[new.id], self.credits[new.id], self.reserved[new.id])
        stored = (new.debits_ucr, new.credits_ucr, new.pending_ucr)
        never(mine != stored, f"account {new.id} is {stored}, its transfers give {mine}")
        free = mine[1] - mine[0] - mine[2]
        never(new.id != "world" and free < 0, f"account {new.id} is overdrawn by {-free}")
