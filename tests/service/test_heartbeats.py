"""Heartbeats: what changes only figures costs no commit, and what changes more costs one."""

from __future__ import annotations

import pytest

from sublet_broker.adapters.memory.store import MemoryStore, MemoryTransaction
from sublet_broker.market.facts import RunFact
from sublet_broker.service.errors import StaleInstance
from sublet_broker.service.ports import StorageFull
from sublet_broker.service.unit_of_work.heartbeats import WRITE_EVERY_MS
from sublet_contracts.states import JobState, RunState
from tests.service.world import AgentDouble, RenterDouble, World


class CountingStore(MemoryStore):
    """Counts the commits that change something."""

    commits = 0
    looks = 0
    full = False

    def snapshot(self) -> MemoryTransaction:
        self.looks += 1
        return super().snapshot()

    def _commit(self, tx: MemoryTransaction) -> None:
        if self.full and tx.sheet:
            raise StorageFull("full")
        self.commits += bool(tx.sheet)
        super()._commit(tx)


class Town(World):
    new_store = CountingStore
    store: CountingStore

    def commits_of(self, beats: int, agent: AgentDouble) -> int:
        """Return how many commits so many heartbeats make, a second apart."""
        before = self.store.commits
        for _ in range(beats):
            self.clock.ms += 1_000
            agent.beat()
        return self.store.commits - before


def running() -> tuple[Town, AgentDouble, RenterDouble, str]:
    world = Town()
    agent, renter = world.agent("alice"), world.renter()
    job = renter.run()
    world.pass_ms(2_000)
    assert renter.view(job).state is JobState.RUNNING
    return world, agent, renter, job


def stored(world: Town, agent: AgentDouble) -> RunFact:
    with world.store.snapshot() as tx:
        (run,) = tx.find(RunFact, {"provider": agent.party})
    return run


def test_figures_are_seen_at_once_and_written_seldom() -> None:
    world, agent, renter, job = running()
    (run,) = agent.runs.values()
    world.commits_of(1, agent)
    run.step = 7
    assert world.commits_of(20, agent) <= 1
    (shown,) = renter.view(job).runs
    assert (shown.step, shown.last_seen_ms) == (7, world.now_ms)
    assert world.commits_of(WRITE_EVERY_MS // 1_000, agent) == 1
    assert stored(world, agent).step == 7


def test_silence_counts_from_the_last_heartbeat_whether_written_or_not() -> None:
    world, agent, _, _ = running()
    world.pass_ms(25_000)
    agent.awake = False
    world.pass_ms(8_000)
    assert stored(world, agent).state is RunState.RUNNING
    world.pass_ms(2_000)
    assert stored(world, agent).state is RunState.UNKNOWN
    agent.awake = True
    world.pass_ms(1_000)
    assert stored(world, agent).state is RunState.RUNNING


def test_who_was_replaced_is_refused_though_nothing_is_written() -> None:
    world, agent, _, _ = running()
    world.pass_ms(3_000)
    older, agent.instance = agent.instance, "2" * 32
    agent.join()
    world.commits_of(2, agent)
    agent.instance = older
    with pytest.raises(StaleInstance):
        agent.beat()


def test_after_an_order_the_next_heartbeat_is_looked_at_whole() -> None:
    world, agent, renter, job = running()
    world.pass_ms(3_000)
    assert world.commits_of(3, agent) == 0
    world.broker.jobs.cancel(renter.party, job)
    agent.obeys = False
    assert world.commits_of(1, agent) == 1
    world.pass_ms(60_000)
    assert renter.view(job).state is JobState.CANCELLED
    world.audit()


def test_a_broker_that_is_restarted_knows_again_with_the_next_heartbeat() -> None:
    world, agent, renter, job = running()
    (run,) = agent.runs.values()
    world.pass_ms(3_000)
    run.step = 9
    world.commits_of(2, agent)
    world.restart_broker()
    agent.join()
    world.commits_of(1, agent)
    assert renter.view(job).runs[-1].step == 9


def test_a_sweep_looks_at_the_database_only_when_something_may_be_due() -> None:
    world, agent, renter, job = running()
    world.pass_ms(10_000)

    def looks_in(sweeps: int) -> int:
        before = world.store.looks
        for _ in range(sweeps):
            world.clock.ms += 100
            world.broker.supervision.sweep()
        return world.store.looks - before

    agent.beat()
    world.broker.supervision.sweep()
    assert looks_in(20) <= 3
    world.broker.jobs.cancel(renter.party, job)
    assert looks_in(1) >= 1


def test_who_could_not_be_heard_for_a_full_disk_is_not_given_up() -> None:
    """Seed 401217: a run ended while the disk was full. That could not be written down, the next
    heartbeat did not name it any more, and so it counted as silent since long ago, and as lost."""
    world, agent, renter, job = running()
    (run,) = agent.runs.values()
    agent.beat()
    for _ in range(8):
        assert not world.commits_of(1, agent)  # heard, and not written down
    world.store.full = True
    with pytest.raises(StorageFull):
        agent.succeed(run)
    world.clock.ms += 12_100
    world.store.full = False
    world.broker.supervision.sweep()
    assert stored(world, agent).state is RunState.RUNNING
    agent.flush()
    assert stored(world, agent).state is RunState.EXITED
    assert renter.view(job).state is JobState.RUNNING  # until its last receipt comes
