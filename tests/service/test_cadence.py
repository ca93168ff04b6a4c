"""How often a job is asked for a checkpoint: what is told of it, and how often machines go."""

from __future__ import annotations

import pytest

from sublet_broker.market.losses import SUPPOSED_MS
from sublet_contracts.documents import DocumentRefused
from sublet_contracts.reasons import Reason
from sublet_contracts.rules import charge_ucr
from sublet_contracts.wire import RunCadence
from tests.service.test_warnings import MINUTE_MS, Town, codes, resumed, told

DAY_MS = 86_400_000


def cadence(interval_ms: int = 2 * MINUTE_MS, **changes: int | str) -> RunCadence:
    plain = {"interval_ms": interval_ms, "rests_on": "measured", "most_lost_ms": interval_ms}
    return RunCadence.model_validate(plain | changes)


# -- what is told --------------------------------------------------------------------------------


def test_the_most_that_a_loss_costs_is_shown_in_time_and_money() -> None:
    world = Town()
    agent, renter, job = world.begin(checkpoint_interval_ms=0)
    agent.durable(agent.the_run, 1)
    agent.the_run.cadence = cadence(
        190_000, cost_ms=210, durable_after_ms=9_000, most_lost_ms=199_000
    )
    world.pass_ms(2_000)
    (run,) = renter.view(job).runs
    assert run.cadence is not None
    shown = run.cadence
    assert (shown.interval_ms, shown.auto, shown.rests_on) == (190_000, True, "measured")
    assert (shown.cost_ms, shown.durable_after_ms) == (210, 9_000)
    assert shown.most_lost_ms == 199_000
    assert shown.most_lost_ucr == charge_ucr(run.price_ucr_per_device_hour, 199_000)


def test_it_is_never_less_than_what_is_lost_now() -> None:
    world = Town()
    agent, renter, job = world.begin(checkpoint_interval_ms=0)
    agent.the_run.cadence = cadence(MINUTE_MS)
    world.pass_ms(10 * MINUTE_MS)
    view = renter.view(job)
    shown = view.runs[0].cadence
    assert shown is not None
    assert shown.most_lost_ms == view.unsaved_device_ms > 9 * MINUTE_MS
    assert shown.most_lost_ucr == view.unsaved_ucr


def test_no_more_is_believed_of_an_agent_than_a_week_and_the_hold() -> None:
    world = Town()
    agent, renter, job = world.begin(checkpoint_interval_ms=0)
    agent.the_run.cadence = cadence(2**53 - 1, most_lost_ms=2**53 - 1, unanswered_ms=2**53 - 1)
    world.pass_ms(2_000)
    view = renter.view(job)
    shown = view.runs[0].cadence
    assert shown is not None
    assert shown.most_lost_ms == 7 * DAY_MS
    assert shown.most_lost_ucr <= view.held_ucr


def test_it_is_gone_with_the_run() -> None:
    world = Town()
    agent, renter, job = world.begin(checkpoint_interval_ms=0)
    agent.the_run.cadence = cadence()
    world.pass_ms(2_000)
    agent.succeed(agent.the_run)
    world.pass_ms(2_000)
    assert renter.view(job).runs[0].cadence is None


@pytest.mark.parametrize("interval_ms", [1, 999, 86_400_001, -1])
def test_an_interval_is_auto_or_a_second_to_a_day(interval_ms: int) -> None:
    renter = Town().renter()
    with pytest.raises((ValueError, DocumentRefused), match="checkpoint_interval_ms"):
        renter.job(checkpoint_interval_ms=interval_ms)


# -- one that is asked for and never comes ---------------------------------------------------------


def test_nothing_saved_is_told_within_two_of_the_first_intervals() -> None:
    world = Town()
    agent, renter, job = world.begin(checkpoint_interval_ms=0)
    world.steps(agent.the_run, 2 * MINUTE_MS)
    assert codes(renter.view(job)) == ["nothing_saved"]


def test_a_checkpoint_that_was_asked_for_and_never_came_is_told_within_two_intervals() -> None:
    world = Town()
    agent, renter, job = world.begin(checkpoint_interval_ms=0)
    run = agent.the_run
    agent.durable(run, 1)
    for waited_ms in range(0, 4 * MINUTE_MS, 10_000):
        run.cadence = cadence(unanswered_ms=waited_ms, spacing_ms=MINUTE_MS)
        world.steps(run, 10_000)
        if waited_ms < 3 * MINUTE_MS:
            assert codes(renter.view(job)) == []
    (warning,) = renter.view(job).warnings
    assert warning.code == "save_unanswered"
    assert warning.facts["unanswered_ms"] == 230_000
    assert "a checkpoint was asked for 3 m 50 s ago and none has come" in warning.says
    run.cadence = cadence()
    world.pass_ms(2_000)
    assert codes(renter.view(job)) == []
    assert [(e.before, e.after) for e in told(world, renter, job)] == [
        ("", "save_unanswered"),
        ("save_unanswered", "over"),
    ]


def test_one_that_is_durable_before_its_agent_says_that_it_was_found_is_no_such_one() -> None:
    world = Town()
    agent, renter, job = world.begin(checkpoint_interval_ms=0)
    run = agent.the_run
    run.cadence = cadence(unanswered_ms=4 * MINUTE_MS)
    world.steps(run, 5 * MINUTE_MS)
    assert codes(renter.view(job)) == ["nothing_saved"]
    agent.durable(run, run.step)
    world.pass_ms(12_000)
    run.cadence = cadence()
    world.pass_ms(12_000)
    assert [e.after for e in told(world, renter, job)] == ["nothing_saved", "over"]


def test_of_a_script_that_went_on_and_does_not_answer_it_is_told_as_well() -> None:
    world = Town()
    _agent, renter, job, run = resumed(world)
    run.cadence = cadence(rests_on="job", unanswered_ms=179_000)
    world.steps(run, 4 * MINUTE_MS)
    assert codes(renter.view(job)) == []
    run.cadence = cadence(rests_on="job", unanswered_ms=180_000)
    world.pass_ms(15_000)
    assert codes(renter.view(job)) == ["save_unanswered"]


def test_a_job_that_saves_at_times_of_its_own_is_not_warned_before_those() -> None:
    world = Town()
    agent, renter, job = world.begin(checkpoint_interval_ms=0)
    agent.durable(agent.the_run, 1)
    agent.the_run.cadence = cadence(spacing_ms=10 * MINUTE_MS, unanswered_ms=5 * MINUTE_MS)
    world.steps(agent.the_run, 5 * MINUTE_MS)
    assert codes(renter.view(job)) == []


# -- how often machines are lost -------------------------------------------------------------------


def test_a_new_market_is_taken_to_lose_a_machine_a_day() -> None:
    world = Town()
    agent, _renter, _job = world.begin()
    assert agent.loss_every_ms == [SUPPOSED_MS] == [DAY_MS]


def test_machines_that_were_lost_are_told_with_the_next_lease() -> None:
    world = Town()
    agent, _renter, _job = world.begin()
    world.steps(agent.the_run, 10 * MINUTE_MS)
    agent.die()
    other = world.agent("bob")
    world.pass_ms(60_000)
    (every_ms,) = other.loss_every_ms
    ran_ms = 2 * every_ms - DAY_MS  # one loss, and the one that is supposed
    assert 10 * MINUTE_MS <= ran_ms <= 12 * MINUTE_MS


def test_what_ends_well_or_in_order_is_time_and_no_loss() -> None:
    world = Town()
    agent, renter, _job = world.begin()
    agent.durable(agent.the_run, 1)
    world.steps(agent.the_run, 10 * MINUTE_MS)
    agent.exit(agent.the_run, Reason.RECLAIMED, 75)
    world.pass_ms(MINUTE_MS)
    agent.succeed(agent.the_run)
    world.pass_ms(2_000)
    renter.run()
    world.pass_ms(2_000)
    assert agent.loss_every_ms[0] == DAY_MS < agent.loss_every_ms[1] < agent.loss_every_ms[2]
    assert agent.loss_every_ms[-1] - DAY_MS <= 12 * MINUTE_MS
