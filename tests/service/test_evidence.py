"""What a run's end is judged by, and what one machine's trouble does to a job: as stories."""

from __future__ import annotations

from sublet_broker.service.settings import Settings
from sublet_contracts.export import verify_export
from sublet_contracts.reasons import Reason
from sublet_contracts.states import JobState
from tests.service.world import AgentDouble, RenterDouble, World, gpu

DAY_MS = 86_400_000


def charges(renter: RenterDouble, job: str) -> list[tuple[Reason, int]]:
    """The settlements of a job: why, and what was charged."""
    return [
        (charge.reason, charge.charged_ucr)
        for charge in renter.world.broker.money.statement(renter.party, job).charges
    ]


def ran_ms(agent: AgentDouble) -> list[int]:
    """How long each run of the agent took, in order; a device-hour costs 3 600 000 ucr here."""
    return [run.cum_ms(0) for run in agent.past.values()]


def kill(world: World, agent: AgentDouble, ran_ms: int = 30_000) -> None:
    """Somebody kills the run, and nobody knows who."""
    world.pass_ms(ran_ms)
    agent.exit(agent.the_run, Reason.KILLED_UNATTRIBUTED, 137)
    world.settle_down(3)


def test_two_kills_that_nobody_owns_to_are_free_and_the_third_is_paid() -> None:
    world = World(Settings(fee_bps=0))
    agent = world.agent("owner", price_ucr_per_device_hour=3_600_000)
    renter = world.renter()
    job = renter.run(max_price_ucr_per_device_hour=3_600_000)
    for _ in range(3):
        kill(world, agent)
        world.pass_ms(10_000)
    assert charges(renter, job) == [
        (Reason.KILLED_UNATTRIBUTED, 0),
        (Reason.KILLED_UNATTRIBUTED, 0),
        (Reason.KILLED_TOO_OFTEN, ran_ms(agent)[-1]),
    ]
    export = world.broker.views.export(renter.party, job).model_dump_json().encode()
    assert verify_export(export, broker=world.key.party).holds
    view = renter.view(job)
    assert (view.state, view.reason) == (JobState.FAILED, Reason.KILLED_TOO_OFTEN)
    world.audit()


def test_what_is_durable_is_paid_even_when_the_kill_is_free_and_a_third_kill_pauses() -> None:
    world = World(Settings(fee_bps=0))
    agent = world.agent("owner", price_ucr_per_device_hour=3_600_000)
    renter = world.renter()
    job = renter.run(max_price_ucr_per_device_hour=3_600_000)
    for step in (1, 2, 3):
        world.pass_ms(10_000)
        agent.durable(agent.the_run, step)
        kill(world, agent)
        world.pass_ms(10_000)
    paid = charges(renter, job)
    assert [reason for reason, _ in paid] == [
        Reason.KILLED_UNATTRIBUTED,
        Reason.KILLED_UNATTRIBUTED,
        Reason.KILLED_TOO_OFTEN,
    ]
    durable_ms = [run.durable[2] for run in agent.past.values() if run.durable]
    assert [ucr for _, ucr in paid] == [*durable_ms[:2], ran_ms(agent)[-1]]
    view = renter.view(job)
    assert (view.state, view.reason) == (JobState.PAUSED, Reason.KILLED_TOO_OFTEN)
    world.audit()


def test_a_renter_has_ten_free_kills_in_a_week_whatever_the_jobs() -> None:
    world = World(Settings(fee_bps=0))
    agent = world.agent("owner", price_ucr_per_device_hour=3_600_000)
    renter = world.renter()
    seen: list[Reason] = []

    def one_more() -> None:
        job = renter.run(max_price_ucr_per_device_hour=3_600_000)
        kill(world, agent, ran_ms=5_000)
        seen.append(charges(renter, job)[-1][0])
        if renter.view(job).state is not JobState.FAILED:
            world.broker.jobs.cancel(renter.party, job)
        for run in [*agent.runs.values()]:
            agent.exit(run, Reason.CANCELLED)
        world.settle_down(4)

    for _ in range(11):
        one_more()
    assert seen == [*[Reason.KILLED_UNATTRIBUTED] * 10, Reason.KILLED_TOO_OFTEN]
    world.pass_ms(8 * DAY_MS, every_ms=DAY_MS)
    agent.announce()
    world.settle_down(4)
    one_more()
    assert seen[-1] is Reason.KILLED_UNATTRIBUTED, "after a week they no longer count"
    world.audit()


def test_a_step_that_nothing_could_be_saved_after_takes_no_checkpoints_place() -> None:
    """A provider that nobody knows says so, and every machine after it would fail to restore it."""
    world = World()
    stranger = world.agent("stranger", price_ucr_per_device_hour=3_600_000)
    renter = world.renter()
    job = renter.run(max_price_ucr_per_device_hour=3_600_000)
    world.pass_ms(10_000)
    stranger.durable(stranger.the_run, 5)
    for step in (10**15 - 1, 2**53 - 1):
        stranger.checkpoint(stranger.the_run, step)
        world.settle_down(2)
        verdict = stranger.the_run.verdicts[-1]
        assert not verdict.durable
        assert verdict.detail == (
            f"step {step}: a job could save nothing after it; at most 999999999999998"
        )
    stranger.the_run.step = 5
    stranger.exit(stranger.the_run, Reason.RUN_KILLED, 137)
    other = world.agent("other", price_ucr_per_device_hour=3_600_000)
    world.pass_ms(10_000)
    world.settle_down(3)
    holder = next(agent for agent in (stranger, other) if agent.runs)
    assert holder.the_run.lease.start_step == 5
    # The last one that a folder's name can say, and be followed by another, is taken.
    holder.durable(holder.the_run, 10**15 - 2)
    assert renter.view(job).durable_step == 10**15 - 2


def test_an_agent_that_cannot_hear_the_broker_stops_at_the_budgets_edge_and_is_paid() -> None:
    world = World(Settings(fee_bps=0))
    agent = world.agent("owner", price_ucr_per_device_hour=3_600_000)
    renter = world.renter()
    job = renter.run(
        max_price_ucr_per_device_hour=3_600_000, budget_ucr=120_000, patience_ms=600_000
    )
    run = agent.the_run
    agent.leave()
    world.pass_ms(95_000)
    agent.join()
    agent.exit(run, Reason.BUDGET_EXHAUSTED, 75)
    world.settle_down()
    assert charges(renter, job) == [(Reason.BUDGET_EXHAUSTED, ran_ms(agent)[0])]
    view = renter.view(job)
    assert (view.state, view.reason) == (JobState.PAUSED, Reason.BUDGET_EXHAUSTED)
    world.audit()


def pulls_in_vain(agent: AgentDouble, reason: Reason) -> None:
    agent.exit(agent.the_run, reason)
    agent.world.settle_down(3)


def test_an_image_that_is_not_there_is_looked_for_by_three_providers() -> None:
    world = World()
    agents = [world.agent(f"owner-{n}", price_ucr_per_device_hour=100 + n) for n in range(4)]
    for agent in agents:
        agent.first_state = "pulling"
    renter = world.renter()
    job = renter.run()
    for number, agent in enumerate(agents[:3]):
        assert [len(a.runs) for a in agents] == [int(n == number) for n in range(4)]
        assert renter.view(job).state is not JobState.FAILED
        pulls_in_vain(agent, Reason.IMAGE_UNKNOWN)
        if number == 0:
            events = world.broker.views.events(renter.party, job).events
            assert Reason.IMAGE_UNKNOWN in [event.reason for event in events], "told at the first"
    view = renter.view(job)
    assert (view.state, view.reason) == (JobState.FAILED, Reason.IMAGE_UNAVAILABLE)
    assert renter.balance_ucr() == 100_000_000
    world.audit()


def test_a_busy_registry_sends_the_job_on_and_fails_nobody() -> None:
    world = World()
    first = world.agent("cheap", price_ucr_per_device_hour=100)
    second = world.agent("dear", price_ucr_per_device_hour=200)
    first.first_state = "pulling"
    renter = world.renter()
    job = renter.run()
    pulls_in_vain(first, Reason.PULL_FAILED)
    assert renter.view(job).state is JobState.RUNNING
    assert second.the_run.job_id == job
    world.audit()


def test_a_refusal_after_a_failed_pull_does_not_hide_it() -> None:
    world = World()
    agent = world.agent("only", price_ucr_per_device_hour=100)
    agent.first_state = "pulling"
    renter = world.renter()
    job = renter.run()
    agent.accepts_leases = False
    pulls_in_vain(agent, Reason.PULL_FAILED)
    world.pass_ms(30_000)
    events = world.broker.views.events(renter.party, job).events
    assert Reason.LEASE_REFUSED in [event.reason for event in events]
    assert renter.view(job).reason is Reason.PULL_FAILED
    agent.accepts_leases, agent.first_state = True, "running"
    world.pass_ms(120_000)
    view = renter.view(job)
    assert (view.state, view.reason) == (JobState.RUNNING, None)
    world.audit()


def test_a_broken_cheapest_machine_is_asked_once_and_again_when_it_may_work() -> None:
    world = World()
    broken = world.agent("cheap", price_ucr_per_device_hour=100)
    sound = world.agent(
        "dear",
        price_ucr_per_device_hour=200,
        devices=tuple(gpu(f"GPU-{number}") for number in range(4)),
    )
    broken.first_state = "pulling"
    renter = world.renter()
    jobs = [renter.run()]
    pulls_in_vain(broken, Reason.START_FAILED)
    jobs += [renter.run(), renter.run()]
    assert not broken.runs, "the others were not sent there first"
    assert {run.job_id for run in sound.runs.values()} == set(jobs)
    broken.first_state = "running"
    world.pass_ms(20_000)
    last = renter.run()
    assert broken.the_run.job_id == last
    world.audit()


def test_who_is_set_aside_stays_so_over_a_restart_of_the_broker_and_comes_back() -> None:
    world = World()
    broken = world.agent("only", price_ucr_per_device_hour=100)
    broken.first_state = "pulling"
    renter = world.renter()
    job = renter.run()
    pulls_in_vain(broken, Reason.START_FAILED)
    world.restart_broker()
    broken.join()
    broken.announce()
    world.settle_down(4)
    assert not broken.runs
    assert renter.view(job).state is not JobState.FAILED
    broken.first_state = "running"
    world.pass_ms(20_000)
    assert broken.the_run.job_id == job
    world.audit()
