"""What every store promises: ports.Store, in memory, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sublet_broker.market import facts
from sublet_broker.market.facts import (
    FACTS,
    AccountFact,
    BlobFact,
    ContentFact,
    CounterFact,
    EventFact,
    Fact,
    JobFact,
    LogLineFact,
    OutboxFact,
    RunFact,
)
from sublet_broker.service.ports import AlreadyThere, Store
from sublet_contracts.states import JobState, RunState
from tests.stores.samples import ODD_TEXT, filled, sparse


class Boom(Exception):
    """A use-case that fails."""


def key_of(fact: Fact) -> tuple[Any, ...]:
    return tuple(getattr(fact, name) for name in fact.KEY)


def sound(kind: type[Fact], make: Any) -> Any:
    """Return a sample of `kind` that keeps the rules which databases hold."""
    match kind:
        case facts.AccountFact:
            return make(kind, id="world", credits_ucr=3)
        case facts.TransferFact:
            return make(kind, debit="a", credit="b")
        case _:
            return make(kind)


def job(number: int, **changes: Any) -> JobFact:
    made: JobFact = sparse(
        JobFact,
        **{"id": f"{number:064x}", "state": JobState.QUEUED, "submitted_ms": number, **changes},
    )
    return made


def line(number: int, job: str = "j") -> LogLineFact:
    return LogLineFact(job, number, "l", 1, number, number * 10, "stdout", f"line {number}", 0)


@pytest.mark.parametrize("make", [filled, sparse])
@pytest.mark.parametrize("kind", FACTS, ids=lambda kind: kind.__name__)
def test_a_fact_comes_back_as_it_was(store: Store, kind: type[Fact], make: Any) -> None:
    fact = sound(kind, make)
    with store.transaction() as tx:
        tx.add(fact)
        assert tx.get(kind, *key_of(fact)) == fact
    with store.snapshot() as tx:
        assert tx.get(kind, *key_of(fact)) == fact
        assert tx.find(kind) == [fact]
        assert type(tx.find(kind)[0]) is kind


def test_what_is_not_there_is_none(store: Store) -> None:
    with store.snapshot() as tx:
        assert tx.get(JobFact, "0" * 64) is None
        assert tx.find(JobFact) == []


def test_put_replaces_and_add_refuses(store: Store) -> None:
    with store.transaction() as tx:
        tx.add(job(1))
        tx.put(job(1, state=JobState.STARTING))
        with pytest.raises(AlreadyThere):
            tx.add(job(1))
        # A duplicate that was caught spoils nothing.
        tx.add(job(2))
    with store.snapshot() as tx:
        assert [found.state for found in tx.find(JobFact)] == [JobState.STARTING, JobState.QUEUED]


def test_a_failed_transaction_leaves_nothing(store: Store) -> None:
    with store.transaction() as tx:
        tx.put(job(1))
    heard: list[str] = []

    def fail() -> None:
        with store.transaction() as tx:
            tx.put(job(1, state=JobState.STARTING))
            tx.add(job(2))
            tx.next("events")
            tx.after_commit(lambda: heard.append("no"))
            raise Boom

    with pytest.raises(Boom):
        fail()
    with store.transaction() as tx:
        assert tx.find(JobFact) == [job(1)]
        assert tx.next("events") == 1
    assert heard == []


def test_what_is_done_after_a_commit_sees_it(store: Store) -> None:
    seen: list[JobFact | None] = []

    def look() -> None:
        with store.snapshot() as tx:
            seen.append(tx.get(JobFact, job(1).id))
        with store.transaction() as tx:  # the writer's place is free again
            tx.put(job(2))

    with store.transaction() as tx:
        tx.put(job(1))
        tx.after_commit(look)
        assert seen == []
    assert seen == [job(1)]


def test_counters_rise_by_one_each(store: Store) -> None:
    with store.transaction() as tx:
        assert [tx.next("events"), tx.next("events"), tx.next("log")] == [1, 2, 1]
    with store.transaction() as tx:
        assert tx.next("events") == 3
        assert tx.get(CounterFact, "events") == CounterFact("events", 3)


def test_delete(store: Store) -> None:
    with store.transaction() as tx:
        tx.add(BlobFact("s", "blake3:" + "a" * 64, 3))
        tx.delete(BlobFact, "s", "blake3:" + "a" * 64)
        tx.delete(BlobFact, "s", "blake3:" + "b" * 64)  # what isn't there may be deleted, too
        assert tx.get(BlobFact, "s", "blake3:" + "a" * 64) is None


def test_many_at_once(store: Store) -> None:
    def lying(number: int, pack: str) -> ContentFact:
        return ContentFact(f"{number:064x}", 10, pack, number)

    with store.transaction() as tx:
        tx.put_all([lying(number, "a") for number in range(700)])
        tx.put_all([])
        tx.put_all([lying(number, "b") for number in range(690, 710)])
        assert len(tx.find(ContentFact, {"pack": "b"})) == 20
        tx.delete_all([lying(number, "a") for number in range(600)])
        tx.delete_all([lying(9_999, "a")])
        tx.delete_all([])
    with store.snapshot() as tx:
        found = tx.find(ContentFact)
        assert found == [lying(n, "a" if n < 690 else "b") for n in range(600, 710)]
        for change in (tx.put_all, tx.delete_all):
            with pytest.raises(TypeError):
                change(found)

    def fail() -> None:
        with store.transaction() as tx:
            tx.delete_all(found)
            raise Boom

    with pytest.raises(Boom):
        fail()
    with store.snapshot() as tx:
        assert tx.count(ContentFact) == 110


def test_find_by_fields(store: Store) -> None:
    with store.transaction() as tx:
        for number, state in enumerate([JobState.QUEUED, JobState.RUNNING, JobState.PAUSED], 1):
            tx.add(job(number, state=state, renter=f"r{number % 2}"))
        tx.add(job(4, renter=ODD_TEXT, outputs="out"))

        def numbers(**how: Any) -> list[int]:
            return [found.submitted_ms for found in tx.find(JobFact, how)]

        assert numbers(state=JobState.RUNNING) == [2]
        assert numbers(state=(JobState.RUNNING, JobState.PAUSED)) == [2, 3]
        assert numbers(state={JobState.QUEUED, JobState.PAUSED}, renter="r1") == [1, 3]
        assert numbers(state=()) == []
        assert numbers(renter=ODD_TEXT) == [4]
        assert numbers(outputs=None) == [1, 2, 3]
        assert numbers(outputs=(None, "out")) == [1, 2, 3, 4]
        assert numbers(renter="nobody") == []
        assert tx.count(JobFact) == 4
        assert tx.count(JobFact, {"state": (JobState.RUNNING, JobState.PAUSED)}) == 2
        assert tx.count(JobFact, {"state": ()}) == 0
        assert tx.count(JobFact, {"outputs": None}) == 3


def test_find_by_truth(store: Store) -> None:
    with store.transaction() as tx:
        tx.add(filled(facts.OfferFact, id="a", open=True))
        tx.add(filled(facts.OfferFact, id="b", open=False))
        assert [found.id for found in tx.find(facts.OfferFact, {"open": False})] == ["b"]
        assert [found.open for found in tx.find(facts.OfferFact)] == [True, False]


def test_pages_in_order(store: Store) -> None:
    with store.transaction() as tx:
        for number in (3, 1, 5, 2, 4):
            tx.add(line(number))
        tx.add(line(9, job="other"))

        def ids(**how: Any) -> list[int]:
            return [found.id for found in tx.find(LogLineFact, {"job": "j"}, **how)]

        assert ids() == [1, 2, 3, 4, 5]
        assert ids(after=("id", 2)) == [3, 4, 5]
        assert ids(after=("id", 1), before=("id", 4)) == [2, 3]
        assert ids(limit=2) == [1, 2]
        assert ids(after=("id", 2), limit=2) == [3, 4]
        assert ids(order_by="time_ms", descending=True, limit=2) == [5, 4]
        assert ids(limit=0) == []


def test_ties_are_ordered_by_key_and_none_stands_first(store: Store) -> None:
    with store.transaction() as tx:
        for number, started in ((4, 7), (2, None), (3, 7), (1, 5)):
            tx.add(job(number, started_ms=started))

        def numbers(**how: Any) -> list[int]:
            return [f.submitted_ms for f in tx.find(JobFact, order_by="started_ms", **how)]

        assert numbers() == [2, 1, 3, 4]
        assert numbers(descending=True) == [4, 3, 1, 2]


def test_texts_are_ordered_by_their_bytes(store: Store) -> None:
    names = ["B", "a", "Z", "é", "_", "aa", "A"]
    with store.transaction() as tx:
        for name in names:
            tx.add(OutboxFact(name, 0, "r", "t", "{}", 0))
        assert [found.id for found in tx.find(OutboxFact)] == sorted(names)


def test_a_snapshot_is_one_state_and_read_only(store: Store) -> None:
    with store.transaction() as tx:
        tx.put(AccountFact("world", 1, 1))
    with store.snapshot() as before:
        assert before.get(AccountFact, "world") == AccountFact("world", 1, 1)
        with store.transaction() as tx:  # a reader holds no writer up
            tx.put(AccountFact("world", 2, 2))
            tx.put(AccountFact("fees", 0, 9))
        assert before.get(AccountFact, "world") == AccountFact("world", 1, 1)
        assert before.find(AccountFact) == [AccountFact("world", 1, 1)]
        with pytest.raises(TypeError):
            before.put(AccountFact("world", 3, 3))
    with store.snapshot() as after:
        assert after.get(AccountFact, "world") == AccountFact("world", 2, 2)


def test_writers_do_not_overwrite_each_other(store: Store) -> None:
    rounds, writers = 25, 4

    def pay() -> None:
        for _ in range(rounds):
            with store.transaction() as tx:
                before = tx.get(AccountFact, "world") or AccountFact("world")
                tx.put(AccountFact("world", before.debits_ucr + 1, before.credits_ucr + 1))
                tx.add(EventFact(tx.next("events"), 0, "j", "l", 1, "k", "", "", None, ""))

    threads = [threading.Thread(target=pay) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.snapshot() as tx:
        assert tx.get(AccountFact, "world") == AccountFact("world", 100, 100)
        assert [event.id for event in tx.find(EventFact)] == list(range(1, 101))


def test_a_nested_transaction_is_an_error_and_not_a_deadlock(store: Store) -> None:
    with store.transaction() as tx:
        tx.put(job(1))
        with pytest.raises(RuntimeError), store.transaction():
            pass
        tx.put(job(2))
    with store.snapshot() as tx:
        assert len(tx.find(JobFact)) == 2


def test_a_missing_key_part_is_an_error(store: Store) -> None:
    with store.snapshot() as tx, pytest.raises(TypeError):
        tx.get(LogLineFact, "j")


def test_a_run_is_updated_many_times(store: Store) -> None:
    for number in range(20):
        with store.transaction() as tx:
            tx.put(filled(RunFact, id="l", state=RunState.RUNNING, last_seen_ms=number))
    with store.snapshot() as tx:
        (run,) = tx.find(RunFact, {"state": RunState.RUNNING})
        assert run.last_seen_ms == 19
