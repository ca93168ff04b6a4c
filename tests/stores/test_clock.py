"""The broker's clock never goes back, and its stopwatch goes by time alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from sublet_broker.adapters.clock import STOPWATCH_COUNTER, Mark, SteadyClock, SystemEntropy
from sublet_broker.adapters.sql.store import CLOCK_COUNTER, SqlStore
from sublet_broker.market.facts import AccountFact, CounterFact


@dataclass
class Machine:
    """A machine whose clocks the test moves."""

    wall: int = 1_000_000
    boot: int = 50

    def clock(self, after: Mark | None = None) -> SteadyClock:
        return SteadyClock(after, wall_ms=lambda: self.wall, since_boot_ms=lambda: self.boot)


def test_it_follows_the_time_since_boot_and_no_jump() -> None:
    machine = Machine()
    clock = machine.clock()
    assert clock.now_ms() == 1_000_000
    machine.boot += 10
    machine.wall += 10
    assert clock.now_ms() == 1_000_010
    for jump in (-600_000, 1_200_000):
        machine.wall += jump
        assert clock.now_ms() == 1_000_010
    assert clock.ahead_of_wall_ms() == -600_000


def test_it_meets_the_wall_clock_again_without_a_jump() -> None:
    for error in (600_000, -600_000):
        machine = Machine(wall=10_000_000 + error)
        clock = machine.clock()
        machine.wall -= error
        seen = [clock.now_ms()]
        for _ in range(1_080 + 600):  # 540 s at a half, 60 s at a tenth
            machine.boot += 1_000
            machine.wall += 1_000
            seen.append(clock.now_ms())
        steps = {after - before for before, after in pairwise(seen)}
        assert steps == ({500, 900} if error > 0 else {1_500, 1_100})
        assert clock.ahead_of_wall_ms() == 0


def test_it_starts_after_what_was_seen_before() -> None:
    machine = Machine()
    clock = machine.clock(Mark(1_600_000, 1_600_000, None))
    assert clock.now_ms() == 1_600_000
    machine.boot += 10
    assert clock.now_ms() == 1_600_005  # ahead of the wall clock: slower
    assert machine.clock(Mark(5, 5, None)).now_ms() == 1_000_000


@pytest.mark.parametrize("jump", [-600_000, 86_400_000])
def test_the_stopwatch_heeds_no_step_of_the_clock(jump: int) -> None:
    machine = Machine(wall=10_000_000)
    clock = machine.clock()
    assert clock.stopwatch_ms() == clock.now_ms() == 10_000_000
    machine.wall += jump
    machine.boot += 1_000
    clock.now_ms()
    machine.boot += 1_000
    assert clock.stopwatch_ms() == 10_002_000
    assert clock.now_ms() != clock.stopwatch_ms()


@pytest.mark.parametrize("jump", [-600_000, 0, 600_000])
def test_the_stopwatch_counts_while_no_broker_runs(jump: int) -> None:
    machine = Machine(wall=10_000_000)
    mark = machine.clock().mark()
    machine.boot += 30_000
    machine.wall += 30_000 + jump
    assert machine.clock(mark).stopwatch_ms() == 10_030_000
    # Started anew, the machine has only its wall clock to tell, and time never goes back.
    machine.boot = 7
    rebooted = machine.clock(replace(mark, since_boot_ms=None))
    assert rebooted.stopwatch_ms() == 10_000_000 + max(0, 30_000 + jump)


def test_each_commit_keeps_the_mark(sql_store: SqlStore) -> None:
    clock = SteadyClock.resume(sql_store)
    with sql_store.transaction() as tx:
        tx.put(AccountFact("world", clock.now_ms(), 0))
        seen = clock.now_ms()
    with sql_store.snapshot() as tx:
        mark = tx.get(CounterFact, CLOCK_COUNTER)
        stopwatch = tx.get(CounterFact, STOPWATCH_COUNTER)
    assert mark is not None
    assert mark.value >= seen
    assert stopwatch is not None
    assert stopwatch.value >= seen
    assert SteadyClock.resume(sql_store).stopwatch_ms() >= stopwatch.value


def test_after_a_restart_with_the_wall_clock_set_back(sql_store: SqlStore) -> None:
    future = SteadyClock().now_ms() + 3_600_000
    with sql_store.transaction() as tx:
        tx.put(CounterFact(CLOCK_COUNTER, future))
    clock = SteadyClock.resume(sql_store)
    assert clock.now_ms() >= future
    assert clock.stopwatch_ms() >= future  # as it was before there was one: it begins here
    with sql_store.transaction() as tx:
        tx.put(AccountFact("world"))
    assert SteadyClock.resume(sql_store).now_ms() >= future


def test_entropy() -> None:
    entropy = SystemEntropy()
    drawn = {entropy.hex(16) for _ in range(100)}
    assert len(drawn) == 100
    assert all(len(bytes.fromhex(one)) == 16 for one in drawn)
