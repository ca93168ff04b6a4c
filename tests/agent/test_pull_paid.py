"""What a long pull costs: nothing for ten minutes, nothing if no run comes of it, then its time."""

from __future__ import annotations

import pytest

from sublet_agent.core import effects, events
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.effects import Step
from sublet_agent.core.metering import MOST_BETWEEN_TICKS_MS
from sublet_agent.core.records import RunRecord
from sublet_agent.core.run import PREPARED_SAVE_MS
from sublet_agent.core.run_phases import RunPhase
from sublet_contracts.documents import versions_read
from sublet_contracts.reasons import Reason
from sublet_contracts.rules import charge_ucr, device_ms_within
from sublet_contracts.wire import Order
from tests.agent.test_core import BROKER, PRICE, World, receipts_of, terms, wanted

MINUTE_MS = 60_000


def passes(world: World, span_ms: int, *, every_ms: int = 1_000) -> list[Step]:
    steps = []
    for _ in range(span_ms // every_ms):
        world.now += every_ms
        steps.append(world.do(events.Tick()))
    return steps


def lines(steps: list[Step]) -> list[str]:
    return [effect.text for step in steps for effect in wanted(step, effects.AddLogLine)]


def started(world: World, lease_id: str, ran_ms: int = 0) -> Step:
    world.do(events.ImageReady(lease_id))
    world.do(events.Restored(lease_id))
    began_ms = world.now
    if ran_ms:
        world.now += ran_ms
    return world.do(events.Observed(lease_id, running=True, started_ms=began_ms, ran_ms=ran_ms))


def record(world: World, lease_id: str) -> RunRecord:
    return world.core.runs[lease_id].record


@pytest.mark.parametrize("minutes", [0, 1, 10])
def test_ten_minutes_are_free(minutes: int) -> None:
    world = World()
    world.do(events.Joined(BROKER.party, broker_reads=versions_read()))
    lease_id, _ = world.assign(world.job(), hold_ucr=10**9)
    said = lines(passes(world, minutes * MINUTE_MS))
    step = started(world, lease_id, 5_000)
    assert record(world, lease_id).cum_device_ms == 5_000
    assert record(world, lease_id).pull_device_ms == 0
    assert lines([step]) == []
    assert len(said) == (minutes == 10), "told when it begins to cost"


def test_the_eleventh_minute_counts_once_the_run_starts_and_the_renter_is_told() -> None:
    world = World()
    world.do(events.Joined(BROKER.party, broker_reads=versions_read()))
    lease_id, _ = world.assign(world.job(), hold_ucr=10**9)
    said = lines(passes(world, 15 * MINUTE_MS))
    assert record(world, lease_id).cum_device_ms == 0, "nothing before it starts"
    (line,) = said
    assert line.startswith("it is not ready after 10 m: the time from now until it starts counts")
    step = started(world, lease_id, 60_000)
    assert record(world, lease_id).cum_device_ms == 5 * MINUTE_MS + 60_000
    assert lines([step]) == ["it took 15 m to get ready: 5 m count as device time"]
    passes(world, 31_000)
    receipt = receipts_of(world)[-1]
    assert (receipt.cum_device_ms, receipt.pull_device_ms) == (6 * MINUTE_MS, 5 * MINUTE_MS)
    assert receipt.charge_ucr == charge_ucr(PRICE, 6 * MINUTE_MS)


@pytest.mark.parametrize("how", ["fails", "cancelled"])
def test_a_pull_of_which_no_run_comes_costs_nothing(how: str) -> None:
    world = World()
    lease_id, _ = world.assign(world.job(), hold_ucr=10**9)
    passes(world, 45 * MINUTE_MS)
    if how == "fails":
        world.do(events.PreparationFailed(lease_id, Reason.PULL_FAILED, "cut off"))
    else:
        reason = Reason.CANCELLED
        order = Order(lease=lease_id, epoch=1, desired="stop", reason=reason, grace_ms=0)
        world.do(events.MessageArrived(order))
    receipt = receipts_of(world)[-1]
    assert receipt.final
    assert (receipt.cum_device_ms, receipt.pull_device_ms, receipt.charge_ucr) == (0, 0, 0)


def test_at_most_a_quarter_of_the_hold_and_the_job_is_not_stopped_for_it() -> None:
    world = World()
    lease_id, _ = world.assign(world.job(), hold_ucr=60_000)
    whole = device_ms_within(PRICE, 60_000)
    assert whole is not None
    passes(world, 3 * 60 * MINUTE_MS, every_ms=5_000)
    started(world, lease_id)
    assert record(world, lease_id).cum_device_ms == whole // 4
    (step,) = passes(world, 1_000)
    assert record(world, lease_id).phase is RunPhase.RUNNING
    assert not wanted(step, effects.AskStop)


def test_what_nobody_looked_at_and_a_clock_that_jumps_count_for_nothing() -> None:
    world = World()
    lease_id, _ = world.assign(world.job(), hold_ucr=10**9)
    passes(world, 12 * MINUTE_MS)
    for jump_ms in (MOST_BETWEEN_TICKS_MS + 1, 86_400_000, -86_400_000):
        world.now += jump_ms
        world.do(events.Tick())
    assert record(world, lease_id).prepared_ms == 12 * MINUTE_MS


def test_a_run_that_nobody_saw_begin_is_not_paid_twice() -> None:
    """The engine hangs right after it has started it: ticks pass, and it runs."""
    world = World()
    lease_id, _ = world.assign(world.job(), hold_ucr=10**9)
    passes(world, 15 * MINUTE_MS)
    world.do(events.ImageReady(lease_id))
    world.do(events.Restored(lease_id))
    passes(world, 2 * MINUTE_MS)
    world.now += 500
    ran_ms = 2 * MINUTE_MS + 500
    began_ms = world.now - ran_ms
    world.do(events.Observed(lease_id, running=True, started_ms=began_ms, ran_ms=ran_ms))
    assert record(world, lease_id).pull_device_ms == 5 * MINUTE_MS
    assert record(world, lease_id).cum_device_ms == 7 * MINUTE_MS + 500


def test_a_restart_of_the_agent_keeps_what_was_counted() -> None:
    world = World()
    lease_id, _ = world.assign(world.job(), hold_ucr=10**9)
    steps = passes(world, 12 * MINUTE_MS)
    saved = [step.save.runs[lease_id] for step in steps if lease_id in step.save.runs]
    assert len(saved) == 12 * MINUTE_MS // PREPARED_SAVE_MS
    again = AgentCore(terms(), world.core.key, world.core.saved.model_copy(deep=True))
    again.started([], world.now + 3_600_000)
    again.handle(events.Tick(), world.now + 3_600_000)
    assert again.runs[lease_id].record.prepared_ms == 12 * MINUTE_MS


def test_the_next_checkpoint_is_asked_for_by_when_the_run_began() -> None:
    world = World()
    lease_id, _ = world.assign(world.job(checkpoint_interval_ms=60_000), hold_ucr=10**9)
    passes(world, 30 * MINUTE_MS)
    started(world, lease_id, 10_000)
    world.do(events.CheckpointFound(lease_id, 1))
    assert record(world, lease_id).local_checkpoints == {1: 20 * MINUTE_MS + 10_000}
    assert record(world, lease_id).interval_began_ms == 10_000
    for ran_ms, due in ((69_000, False), (70_000, True)):
        world.ran(lease_id, ran_ms)
        assert bool(wanted(world.do(events.Tick()), effects.AskSave)) == due
