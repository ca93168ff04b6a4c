"""The ledger against a model that knows nothing but sums, under any sequence of commands."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sublet_broker.market import ledger
from sublet_broker.market.facts import AccountFact, Fact, PendingFact, TransferFact

NAMES = ("party:a:available", "job:j:held", "party:p:earned", ledger.FEES)
amounts = st.integers(min_value=0, max_value=120)
names = st.sampled_from(NAMES)
ids = st.integers(min_value=0, max_value=5).map(str)


class Books:
    """Facts in memory, written all or none, append-only where they must be."""

    def __init__(self) -> None:
        self.accounts: dict[str, AccountFact] = {}
        self.transfers: dict[str, TransferFact] = {}
        self.pendings: dict[str, PendingFact] = {}

    def account(self, id: str) -> AccountFact | None:
        return self.accounts.get(id)

    def transfer(self, id: str) -> TransferFact | None:
        return self.transfers.get(id)

    def pending(self, id: str) -> PendingFact | None:
        return self.pendings.get(id)

    def write(self, facts: list[Fact]) -> None:
        for fact in facts:
            match fact:
                case AccountFact():
                    self.accounts[fact.id] = fact
                case TransferFact():
                    assert fact.id not in self.transfers
                    self.transfers[fact.id] = fact
                case PendingFact():
                    before = self.pendings.get(fact.id)
                    assert before is None or before.state == ledger.OPEN
                    self.pendings[fact.id] = fact
                case _:
                    raise AssertionError(fact)

    def breaches(self) -> list[str]:
        return ledger.breaches(
            self.accounts.values(), self.transfers.values(), self.pendings.values()
        )


class LedgerMachine(RuleBasedStateMachine):
    """Deposits, transfers, reservations and their ends, possible or not, once or again."""

    def __init__(self) -> None:
        super().__init__()
        self.books = Books()
        self.balances = dict.fromkeys(NAMES, 0)
        self.reserved: dict[str, tuple[str, int]] = {}
        self.resolved: dict[str, tuple[str, int]] = {}
        self.moved: dict[str, tuple[str, str, int]] = {}
        self.count = 0

    def free(self, name: str) -> int:
        return self.balances[name] - sum(a for n, a in self.reserved.values() if n == name)

    @rule(name=names, amount=st.integers(min_value=1, max_value=100))
    def deposit(self, name: str, amount: int) -> None:
        self.count += 1
        id = ledger.transfer_id("deposit", str(self.count))
        move = ledger.Move(id, ledger.WORLD, name, amount, "doc", "")
        self.books.write(ledger.post(self.books, [move], 0))
        self.balances[name] += amount

    @rule(id=ids, debit=names, credit=names, amount=amounts)
    def transfer(self, id: str, debit: str, credit: str, amount: int) -> None:
        move = ledger.Move(id, debit, credit, amount, "doc", "")
        known = self.moved.get(id)
        try:
            facts = ledger.post(self.books, [move], 0)
        except ledger.LedgerError:
            assert known != (debit, credit, amount)
            assert known is not None or amount == 0 or debit == credit or self.free(debit) < amount
            return
        self.books.write(facts)
        if known is not None:
            assert facts == []
            assert known == (debit, credit, amount)
            return
        self.moved[id] = (debit, credit, amount)
        self.balances[debit] -= amount
        self.balances[credit] += amount

    @rule(id=ids, name=names, amount=amounts)
    def reserve(self, id: str, name: str, amount: int) -> None:
        known = self.reserved.get(id) or self.resolved.get(id)
        try:
            facts = ledger.reserve(self.books, id, name, amount, "doc", 0)
        except ledger.LedgerError:
            assert known != (name, amount)
            assert known is not None or self.free(name) < amount
            return
        self.books.write(facts)
        if known is None:
            self.reserved[id] = (name, amount)
        else:
            assert facts == []

    @rule(id=ids, share=st.integers(min_value=0, max_value=110), credit=names)
    def resolve(self, id: str, share: int, credit: str) -> None:
        known = self.reserved.get(id)
        name, amount = known or self.resolved.get(id, ("", 0))
        part = amount * share // 100
        moves = [ledger.Move(f"r{id}", name, credit, part, "doc", "")] if part else []
        try:
            facts = ledger.resolve(self.books, id, moves, 0)
        except ledger.LedgerError:
            assert known is None or part > amount or name == credit
            return
        self.books.write(facts)
        if known is None:
            assert facts == []
            return
        del self.reserved[id]
        self.resolved[id] = known
        if part:
            self.balances[name] -= part
            self.balances[credit] += part

    @invariant()
    def adds_up(self) -> None:
        assert self.books.breaches() == []
        for name, balance in self.balances.items():
            assert ledger.balance_ucr(self.books.account(name)) == balance
            assert self.free(name) == ledger.free_ucr(self.books.account(name)) >= 0


LedgerMachine.TestCase.settings = settings(max_examples=60, deadline=None)
TestLedger = LedgerMachine.TestCase


def test_a_reservation_never_resolves_twice_differently() -> None:
    books = Books()
    books.write(ledger.post(books, [ledger.Move("1", ledger.WORLD, "a", 10, "d", "")], 0))
    books.write(ledger.reserve(books, "p", "a", 10, "d", 0))
    books.write(ledger.resolve(books, "p", [], 0))
    assert ledger.resolve(books, "p", [], 0) == []
    with pytest.raises(ledger.LedgerError):
        ledger.resolve(books, "p", [ledger.Move("2", "a", "b", 1, "d", "")], 0)


def test_a_tampered_balance_is_found() -> None:
    books = Books()
    books.write(ledger.post(books, [ledger.Move("1", ledger.WORLD, "a", 10, "d", "")], 0))
    books.accounts["a"] = AccountFact("a", 0, 11, 0)
    assert len(books.breaches()) == 2
