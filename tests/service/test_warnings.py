"""Told before it hurts: what a renter is warned of while his job runs, and when a job is paused."""

from __future__ import annotations

import pytest

from sublet_contracts.api import EventView, JobView
from sublet_contracts.documents import DocumentRefused
from sublet_contracts.job_warnings import WARNINGS, WarningCode
from sublet_contracts.reasons import Fault, Reason
from sublet_contracts.states import JobState
from sublet_contracts.wire import DeviceUsage, RunUsage
from tests.service.world import AgentDouble, RenterDouble, RunDouble, World

MINUTE_MS = 60_000
INTERVAL_MS = 120_000
GPU_UNKNOWN = RunUsage(age_ms=0, devices=(DeviceUsage(id="gpu-0"),))


class Town(World):
    """One job on one machine, and another machine to go on with."""

    def begin(
        self, *, total_steps: int = 1000, **changes: object
    ) -> tuple[AgentDouble, RenterDouble, str]:
        agent, renter = self.agent("alice"), self.renter()
        agent.total_steps = total_steps
        job = renter.run(**{"checkpoint_interval_ms": INTERVAL_MS, **changes})
        self.pass_ms(1_000)
        assert renter.view(job).state is JobState.RUNNING
        return agent, renter, job

    def steps(self, run: RunDouble, span_ms: int, *, each_ms: int = 10_000) -> None:
        """Let time pass in which the job tells a new step each so often."""
        for _ in range(span_ms // each_ms):
            run.step += 1
            self.pass_ms(each_ms)

    def until_ordered(self, run: RunDouble) -> None:
        """Let time pass until the broker wants something of the run, at most ten minutes."""
        for _ in range(120):
            if run.orders:
                return
            self.pass_ms(5_000)


def codes(view: JobView) -> list[str]:
    return [warning.code for warning in view.warnings]


def told(world: World, renter: RenterDouble, job: str) -> list[EventView]:
    page = world.broker.views.events(renter.party, job, limit=1000)
    return [event for event in page.events if event.kind == "warning"]


def resumed(world: Town) -> tuple[AgentDouble, RenterDouble, str, RunDouble]:
    """Return a job that was lost at step 40 and goes on from there on another machine."""
    agent, renter, job = world.begin()
    agent.durable(agent.the_run, 40)
    agent.die()
    other = world.agent("bob")
    world.pass_ms(30_000)
    assert other.the_run.lease.start_step == 40
    return other, renter, job, other.the_run


# -- nothing saved -------------------------------------------------------------------------------


def test_within_a_minute_of_the_first_interval_it_is_told_that_nothing_was_saved() -> None:
    world = Town()
    agent, renter, job = world.begin()
    world.steps(agent.the_run, INTERVAL_MS)
    assert codes(renter.view(job)) == []
    world.steps(agent.the_run, MINUTE_MS)
    (warning,) = renter.view(job).warnings
    assert warning.code == WarningCode.NOTHING_SAVED
    assert 0 <= warning.since_ms - (world.now_ms - MINUTE_MS) <= MINUTE_MS
    assert warning.facts["at_risk_ms"] == agent.the_run.cum_ms(world.now_ms)
    assert warning.facts["at_risk_ucr"] == warning.facts["at_risk_ms"], "a micro-credit each ms"
    assert "a loss now costs 3 m 1 s of work (0.181 credits, unless" in warning.says
    (event,) = told(world, renter, job)
    assert (event.before, event.after, event.epoch) == ("", "nothing_saved", 1)
    assert "nothing that could be resumed has been saved yet" in event.detail
    # The longer, the more it costs; and nobody is told twice.
    world.steps(agent.the_run, 10 * MINUTE_MS)
    (later,) = renter.view(job).warnings
    assert later.facts["at_risk_ms"] > warning.facts["at_risk_ms"] + 9 * MINUTE_MS
    assert later.since_ms == warning.since_ms
    assert len(told(world, renter, job)) == 1


def test_it_is_over_once_something_durable_is_there() -> None:
    world = Town()
    agent, renter, job = world.begin()
    world.steps(agent.the_run, INTERVAL_MS + MINUTE_MS)
    assert codes(renter.view(job)) == ["nothing_saved"]
    agent.durable(agent.the_run, 30)
    world.pass_ms(2_000)
    view = renter.view(job)
    assert codes(view) == []
    assert [(e.before, e.after) for e in told(world, renter, job)] == [
        ("", "nothing_saved"),
        ("nothing_saved", "over"),
    ]
    assert view.durable_ms is not None
    assert view.durable_step == 30
    assert view.unsaved_device_ms <= 3_000


def test_what_saves_in_time_is_never_warned() -> None:
    world = Town()
    agent, renter, job = world.begin()
    for _ in range(10):
        world.steps(agent.the_run, INTERVAL_MS)
        agent.durable(agent.the_run, agent.the_run.step)
    assert told(world, renter, job) == []


def test_the_file_that_the_job_seems_to_save_to_is_named() -> None:
    world = Town()
    agent, renter, job = world.begin()
    world.steps(agent.the_run, 3 * MINUTE_MS)
    assert renter.view(job).warnings[0].about == ""
    agent.the_run.saved_file = "/out/state.pkl"
    world.pass_ms(10_000)
    assert renter.view(job).warnings[0].about == "/out/state.pkl"
    assert len(told(world, renter, job)) == 1


def test_a_checkpoint_that_is_refused_is_nothing_saved() -> None:
    world = Town()
    agent, renter, job = world.begin()
    agent.checkpoint(agent.the_run, 5, upload=False)
    world.steps(agent.the_run, INTERVAL_MS + MINUTE_MS)
    assert codes(renter.view(job)) == ["nothing_saved"]


def test_warnings_are_over_with_their_run() -> None:
    world = Town()
    agent, renter, job = world.begin()
    world.steps(agent.the_run, INTERVAL_MS + MINUTE_MS)
    agent.succeed(agent.the_run)
    world.pass_ms(2_000)
    assert renter.view(job).state is JobState.SUCCEEDED
    assert renter.view(job).warnings == ()
    assert [(e.before, e.after) for e in told(world, renter, job)][-1] == ("nothing_saved", "over")


def test_a_restart_of_the_broker_tells_nothing_twice_and_takes_nothing_back() -> None:
    world = Town()
    agent, renter, job = world.begin()
    run = agent.the_run
    world.steps(run, 3 * MINUTE_MS)
    world.pass_ms(20 * MINUTE_MS)
    before = codes(renter.view(job))
    assert sorted(before) == ["nothing_saved", "stands_still"]
    world.restart_broker()
    agent.join()
    world.pass_ms(5 * MINUTE_MS)
    assert codes(renter.view(job)) == before
    assert len(told(world, renter, job)) == 2
    run.step += 1
    world.pass_ms(10_000)
    assert codes(renter.view(job)) == ["nothing_saved"]


# -- saves that stopped, checkpoints unread, steps that begin again --------------------------------


def test_a_job_that_goes_on_without_saving_is_warned_and_one_that_saves_again_is_not() -> None:
    world = Town()
    agent, renter, job = world.begin()
    world.steps(agent.the_run, MINUTE_MS)
    agent.durable(agent.the_run, 6)
    world.steps(agent.the_run, 5 * MINUTE_MS)
    assert codes(renter.view(job)) == []
    world.steps(agent.the_run, 2 * MINUTE_MS)
    (warning,) = renter.view(job).warnings
    assert warning.code == "saves_stopped"
    assert warning.facts["durable_step"] == 6
    assert 6 * MINUTE_MS < warning.facts["at_risk_ms"] <= 7 * MINUTE_MS + 2_000
    agent.durable(agent.the_run, agent.the_run.step)
    world.pass_ms(2_000)
    assert codes(renter.view(job)) == []


def test_a_checkpoint_that_the_script_never_opens_is_told_and_one_that_it_opens_is_not() -> None:
    world = Town()
    _agent, renter, job, run = resumed(world)
    run.opened = False
    run.step += 1
    world.pass_ms(MINUTE_MS // 2)
    assert codes(renter.view(job)) == []
    world.pass_ms(MINUTE_MS // 2 + 10_000)
    (warning,) = renter.view(job).warnings
    assert (warning.code, warning.facts) == ("checkpoint_unread", {"start_step": 40})
    assert "step 40" in warning.says
    run.opened = True
    world.pass_ms(10_000)
    assert codes(renter.view(job)) == []
    run.opened = False  # Whatever is said later: it was opened.
    world.pass_ms(MINUTE_MS)
    assert codes(renter.view(job)) == []


def test_a_script_that_loads_its_checkpoint_late_is_not_told_that_it_never_did() -> None:
    """Imports, a model and a compiler may take minutes before anything is restored."""
    world = Town()
    _agent, renter, job, run = resumed(world)
    run.opened = False
    world.pass_ms(14 * MINUTE_MS)
    run.opened = True
    world.steps(run, 3 * MINUTE_MS)
    assert "checkpoint_unread" not in {event.after for event in told(world, renter, job)}


@pytest.mark.parametrize("work", ["durable", "behind", "nothing"])
def test_what_goes_on_without_its_checkpoint_is_told_by_what_it_does(work: str) -> None:
    world = Town()
    agent, renter, job, run = resumed(world)
    run.opened = False
    world.pass_ms(3 * MINUTE_MS)
    assert "checkpoint_unread" not in codes(renter.view(job))
    if work == "durable":
        agent.durable(run, 41)
    elif work == "behind":
        run.step = 1
    else:
        world.pass_ms(12 * MINUTE_MS)
    world.pass_ms(10_000)
    assert "checkpoint_unread" in codes(renter.view(job))


def test_where_it_cannot_be_known_nothing_is_said_of_opening() -> None:
    world = Town()
    _agent, renter, job, run = resumed(world)
    world.steps(run, 3 * MINUTE_MS)
    assert codes(renter.view(job)) == []


def test_a_step_that_starts_at_0_again_after_a_resume_is_told_once() -> None:
    world = Town()
    _agent, renter, job, run = resumed(world)
    run.step = 0
    world.steps(run, MINUTE_MS, each_ms=5_000)
    (warning,) = renter.view(job).warnings
    assert warning.code == "began_again"
    assert warning.facts == {"start_step": 40, "step": 12}
    assert renter.view(job).step == 40, "what was reached is not taken back"
    run.step = 40
    world.pass_ms(10_000)
    assert codes(renter.view(job)) == []
    for _ in range(5):
        run.step = 0
        world.pass_ms(MINUTE_MS)
        run.step = 41
        world.pass_ms(MINUTE_MS)
    again = [e.after for e in told(world, renter, job) if "began_again" in (e.before, e.after)]
    assert again == ["began_again", "over"], "falling back again and again is no news"


def test_a_first_run_begins_at_0_and_that_is_right() -> None:
    world = Town()
    agent, renter, job = world.begin()
    world.steps(agent.the_run, 2 * MINUTE_MS)
    assert codes(renter.view(job)) == []


# -- standing still ------------------------------------------------------------------------------


def test_a_step_that_stands_still_is_told_after_ten_minutes_and_over_with_the_next() -> None:
    world = Town()
    agent, renter, job = world.begin()
    agent.durable(agent.the_run, 1)
    world.steps(agent.the_run, MINUTE_MS)
    world.pass_ms(9 * MINUTE_MS)
    assert "stands_still" not in codes(renter.view(job))
    world.pass_ms(2 * MINUTE_MS)
    (warning,) = [w for w in renter.view(job).warnings if w.code == "stands_still"]
    assert warning.facts["step"] == agent.the_run.step
    assert 10 * MINUTE_MS <= warning.facts["still_ms"] <= 12 * MINUTE_MS
    assert "paused" not in warning.says, "it has named no time to be paused after"
    agent.the_run.step += 1
    world.pass_ms(10_000)
    assert "stands_still" not in codes(renter.view(job))
    world.pass_ms(60 * MINUTE_MS)
    assert renter.view(job).state is JobState.RUNNING, "without a wish nobody is paused"


def test_slow_steps_are_no_standing_still() -> None:
    world = Town()
    agent, renter, job = world.begin()
    world.steps(agent.the_run, 90 * MINUTE_MS, each_ms=9 * MINUTE_MS)
    world.steps(agent.the_run, 60 * MINUTE_MS, each_ms=20 * MINUTE_MS)
    assert "stands_still" not in [event.after for event in told(world, renter, job)]


def test_a_gpu_at_0_percent_is_told_and_one_that_computes_is_not() -> None:
    world = Town()
    agent, renter, job = world.begin()
    run = agent.the_run

    def at(percent: int | None) -> RunUsage:
        return RunUsage(age_ms=0, devices=(DeviceUsage(id="gpu-0", utilization_percent=percent),))

    run.usage = at(0)
    agent.durable(run, 1)
    world.steps(run, 4 * MINUTE_MS)
    agent.durable(run, run.step)
    world.steps(run, 5 * MINUTE_MS)
    agent.durable(run, run.step)
    assert codes(renter.view(job)) == []
    world.steps(run, 2 * MINUTE_MS)
    (warning,) = renter.view(job).warnings
    assert warning.code == "devices_idle"
    assert warning.facts["idle_ms"] >= 10 * MINUTE_MS
    run.usage = at(3)
    world.pass_ms(10_000)
    assert codes(renter.view(job)) == []
    run.usage = at(None)
    for _ in range(4):
        world.steps(run, 4 * MINUTE_MS)
        agent.durable(run, run.step)
    assert codes(renter.view(job)) == [], "a driver that doesn't tell says nothing against it"


# -- the policy ----------------------------------------------------------------------------------


def test_a_job_that_stands_still_for_as_long_as_it_says_is_checkpointed_and_paused() -> None:
    world = Town()
    agent, renter, job = world.begin(stall_ms=30 * MINUTE_MS)
    run = agent.the_run
    agent.durable(run, 1)
    world.steps(run, MINUTE_MS)
    agent.log(run, 0, "waiting for the other workers")
    for number in range(29):
        world.pass_ms(MINUTE_MS)
        agent.log(run, number + 1, "still waiting")
    assert run.orders == []
    (warning,) = [w for w in renter.view(job).warnings if w.code == "stands_still"]
    assert "after 30 m it is paused" in warning.says
    world.until_ordered(run)
    (order,) = run.orders
    assert (order.desired, order.reason, order.grace_ms) == ("drain", Reason.STALLED, 30_000)
    agent.checkpoint(run, run.step)
    world.settle_down(2)
    agent.exit(run, Reason.STALLED, 75)
    world.pass_ms(5_000)
    view = renter.view(job)
    assert (view.state, view.reason) == (JobState.PAUSED, Reason.STALLED)
    assert view.says.startswith("the job showed no sign of life")
    (bill,) = world.broker.money.statement(renter.party, job).charges
    assert (bill.reason, bill.fault) == (Reason.STALLED, Fault.RENTER)
    assert bill.lost_device_ms == 0, "its time was used, whatever it did with it"
    world.broker.jobs.resume(renter.party, job)
    world.settle_down()
    assert agent.the_run.lease.start_step == run.step
    world.audit()


def test_a_restart_of_the_broker_only_begins_the_count_anew() -> None:
    world = Town()
    agent, _renter, _job = world.begin(stall_ms=10 * MINUTE_MS, total_steps=0)
    run = agent.the_run
    world.steps(run, MINUTE_MS)
    world.pass_ms(6 * MINUTE_MS)
    world.restart_broker()
    agent.join()
    world.pass_ms(6 * MINUTE_MS)
    assert run.orders == []
    world.until_ordered(run)
    assert [order.reason for order in run.orders] == [Reason.STALLED]


def test_every_sign_counts_for_a_job_that_tells_no_steps() -> None:
    world = Town()
    agent, renter, job = world.begin(stall_ms=10 * MINUTE_MS, total_steps=0)
    run = agent.the_run
    for number in range(30):
        world.pass_ms(MINUTE_MS)
        agent.log(run, number, "epoch")
    assert run.orders == []
    run.usage = RunUsage(age_ms=0, cpu_millis=900)
    world.pass_ms(30 * MINUTE_MS)
    assert run.orders == [], "it computes"
    for unknown in (None, RunUsage(age_ms=0), GPU_UNKNOWN):
        run.usage = unknown
        world.pass_ms(30 * MINUTE_MS)
    assert run.orders == [], "its machine can't tell"
    run.usage, quiet_ms = RunUsage(age_ms=0, cpu_millis=2), world.now_ms
    world.pass_ms(6 * MINUTE_MS)
    assert "silent" in codes(renter.view(job))
    world.until_ordered(run)
    assert world.now_ms - quiet_ms >= 10 * MINUTE_MS
    assert [order.reason for order in run.orders] == [Reason.STALLED]


def test_after_its_last_step_a_job_may_take_its_time_to_save() -> None:
    world = Town()
    agent, _renter, _job = world.begin(stall_ms=10 * MINUTE_MS)
    run = agent.the_run
    run.usage = RunUsage(age_ms=0, cpu_millis=900)
    run.step = 999
    world.pass_ms(10_000)
    run.step = 1000
    world.pass_ms(30 * MINUTE_MS)
    assert run.orders == []


def test_silence_of_the_machine_is_no_standing_still_of_the_job() -> None:
    world = Town()
    agent, _renter, _job = world.begin(stall_ms=10 * MINUTE_MS, patience_ms=60 * MINUTE_MS)
    run = agent.the_run
    world.steps(run, MINUTE_MS)
    agent.leave()
    world.pass_ms(15 * MINUTE_MS)
    run.step += 80
    agent.join()
    world.pass_ms(2 * MINUTE_MS)
    assert run.orders == []


def test_output_of_a_silence_comes_after_it() -> None:
    world = Town()
    agent, _renter, _job = world.begin(
        stall_ms=10 * MINUTE_MS, patience_ms=60 * MINUTE_MS, total_steps=0
    )
    run = agent.the_run
    run.usage = RunUsage(age_ms=0, cpu_millis=2)
    agent.log(run, 0, "epoch 1")
    agent.leave()
    world.pass_ms(15 * MINUTE_MS)
    agent.join()
    world.pass_ms(5_000)
    agent.log(run, 1, "epoch 2", "epoch 3")
    world.pass_ms(2 * MINUTE_MS)
    assert run.orders == []


def test_a_run_that_its_machine_holds_still_has_not_stalled() -> None:
    world = Town()
    agent, _renter, _job = world.begin(stall_ms=10 * MINUTE_MS)
    run = agent.the_run
    world.steps(run, MINUTE_MS)
    run.stopped_ms = world.now_ms  # its device time goes no further
    world.pass_ms(20 * MINUTE_MS)
    assert run.orders == []


def test_an_agent_cannot_say_by_itself_that_a_job_has_stalled() -> None:
    world = Town()
    agent, renter, job = world.begin(stall_ms=10 * MINUTE_MS)
    agent.durable(agent.the_run, 3)
    world.pass_ms(MINUTE_MS)
    agent.exit(agent.the_run, Reason.STALLED, 75)
    world.pass_ms(10_000)
    (bill,) = world.broker.money.statement(renter.party, job).charges
    assert bill.reason is Reason.RUN_KILLED
    assert renter.view(job).state is not JobState.PAUSED


def test_a_stall_is_at_least_a_minute() -> None:
    world = Town()
    renter = world.renter()
    for wrong in (1, 59_999, -1):
        with pytest.raises((ValueError, DocumentRefused), match="stall_ms"):
            renter.job(stall_ms=wrong)


# -- the table -----------------------------------------------------------------------------------


def test_each_warning_has_words_a_rule_and_facts() -> None:
    from sublet_broker.market.warnings import _RULES

    assert set(WARNINGS) == set(WarningCode) == set(_RULES)
    for code, kind in WARNINGS.items():
        facts = dict.fromkeys(kind.facts, 61_000)
        assert all((kind.says(facts), kind.begins, kind.ends)), code
        assert len(kind.mark) <= 14, "it stands in a table"
