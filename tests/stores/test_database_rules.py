"""The rules that the database holds by itself, should the code ever forget one."""

from __future__ import annotations

from typing import Any

import pytest

from sublet_broker.adapters.sql.store import SqlStore
from sublet_broker.market.facts import (
    AccountFact,
    CounterFact,
    DepositFact,
    EventFact,
    Fact,
    JobFact,
    LeaseFact,
    LogEntryFact,
    PendingFact,
    SettlementFact,
    TransferFact,
)
from sublet_broker.service.ports import RuleBroken
from sublet_contracts.states import LeaseState
from tests.stores.samples import filled

ACTIVE, CLOSED = LeaseState.ACTIVE, LeaseState.CLOSED
ENTRY = LogEntryFact(1, "d" * 64)
TRANSFER = TransferFact("t", "world", "alice", 5, "deposit", "", 1)
EVENT = EventFact(1, 1, "j", "l", 1, "job", "queued", "starting", None, "")


def lease(id: str, **changes: Any) -> LeaseFact:
    made: LeaseFact = filled(LeaseFact, id=id, **{"job": "j", "epoch": 1, **changes})
    return made


def pending(state: str, **changes: Any) -> PendingFact:
    made: PendingFact = filled(PendingFact, id="p", state=state, **changes)
    return made


FORBIDDEN: dict[str, tuple[list[Fact], Fact]] = {
    "an overdraft": ([], AccountFact("alice", debits_ucr=6, credits_ucr=5)),
    "a reservation above the balance": ([], AccountFact("alice", 0, 5, pending_ucr=6)),
    "a negative reservation": ([], AccountFact("alice", 0, 5, pending_ucr=-1)),
    "a negative total": ([], AccountFact("world", -1, 0)),
    "a negative transfer": ([], TransferFact("t", "a", "b", -1, "d", "", 1)),
    "a transfer to itself": ([], TransferFact("t", "a", "a", 1, "d", "", 1)),
    "a transfer that cites nothing": ([], TransferFact("t", "a", "b", 1, "", "", 1)),
    "a changed transfer": ([TRANSFER], TransferFact("t", "world", "alice", 6, "deposit", "", 1)),
    "a changed event": ([EVENT], EventFact(1, 2, "j", "l", 1, "job", "a", "b", None, "")),
    "a changed log entry": ([ENTRY], LogEntryFact(1, "e" * 64)),
    "a changed deposit": ([filled(DepositFact, id="d")], filled(DepositFact, id="d", party="x")),
    "a lease settled twice": (
        [filled(SettlementFact, id="a", lease="l")],
        filled(SettlementFact, id="b", lease="l"),
    ),
    "two holders of one job": (
        [lease("a", state=ACTIVE)],
        lease("b", epoch=2, state=LeaseState.PROPOSED),
    ),
    "one epoch twice": ([lease("a", state=CLOSED)], lease("b", state=CLOSED)),
    "a pending posted after it was voided": ([pending("void")], pending("posted")),
    "a pending voided after it was posted": ([pending("posted")], pending("void")),
    "a pending of another amount": ([pending("open")], pending("posted", amount_ucr=1)),
    "a pending in no known state": ([], pending("maybe")),
    "a job beyond its budget": ([], filled(JobFact, budget_ucr=5, settled_ucr=6)),
    "a counter that falls": ([CounterFact("events", 5)], CounterFact("events", 4)),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_the_database_refuses(sql_store: SqlStore, case: str) -> None:
    before, broken = FORBIDDEN[case]
    with sql_store.transaction() as tx:
        for fact in before:
            tx.put(fact)
    with pytest.raises(RuleBroken), sql_store.transaction() as tx:
        tx.put(broken)
    with sql_store.snapshot() as tx:
        assert tx.find(type(broken)) == [fact for fact in before if type(fact) is type(broken)]
    with sql_store.transaction() as tx:  # and goes on
        tx.put(CounterFact("after", 1))


@pytest.mark.parametrize("fact", [TRANSFER, EVENT, ENTRY, CounterFact("events", 1)])
def test_history_can_not_be_deleted(sql_store: SqlStore, fact: Fact) -> None:
    with sql_store.transaction() as tx:
        tx.put(fact)
    with pytest.raises(RuleBroken), sql_store.transaction() as tx:
        tx.delete(type(fact), *(getattr(fact, name) for name in fact.KEY))


def test_what_is_allowed(sql_store: SqlStore) -> None:
    with sql_store.transaction() as tx:
        tx.put(AccountFact("world", debits_ucr=5, credits_ucr=0))
        tx.put(AccountFact("alice", 0, 5, pending_ucr=5))
        tx.put(AccountFact("alice", 5, 5, pending_ucr=0))
        tx.put(pending("open"))
        tx.put(pending("posted"))
        tx.put(lease("a", state=ACTIVE))
        tx.put(lease("a", state=CLOSED))
        tx.put(lease("b", epoch=2, state=ACTIVE))
        tx.put(lease("c", job="k", state=ACTIVE))
