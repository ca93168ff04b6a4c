"""The main job from submission to settlement, and its recoveries."""

from __future__ import annotations

import pytest

from sublet_broker.service.errors import Refusal
from sublet_broker.service.ports import StorageFull, StoreAway
from sublet_contracts.api import NextStep
from sublet_contracts.export import verify_export
from sublet_contracts.reasons import Fault, Reason
from sublet_contracts.states import JobState, LeaseState, RunState
from tests.service.world import World


def test_a_job_runs_and_both_sides_are_settled_to_the_micro_credit() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter(credits_ucr=10_000_000)
    job = renter.run(outputs="/out")
    assert renter.view(job).state is JobState.RUNNING
    assert renter.balance_ucr() == 0
    run = agent.the_run
    world.pass_ms(60_000)
    agent.durable(run, 100)
    world.pass_ms(30_500)
    agent.succeed(run)
    world.settle_down()

    view = renter.view(job)
    assert view.state is JobState.SUCCEEDED
    assert view.charged_ucr == view.settled_ucr == 90_500
    assert view.outputs is not None
    assert view.held_ucr == 0
    assert renter.balance_ucr() == 10_000_000 - 90_500
    earned = world.broker.money.earnings(agent.party)
    assert earned.earned_ucr == 90_500 - 90_500 * 500 // 10_000
    assert len(agent.settled) == 1
    statement = world.broker.money.statement(renter.party, job)
    assert [charge.charged_ucr for charge in statement.charges] == [90_500]
    assert statement.released_ucr == 10_000_000 - 90_500
    world.audit()


def test_a_lost_machine_costs_only_what_is_durable_and_the_job_goes_on_elsewhere() -> None:
    world = World()
    first = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    second = world.agent("bob")
    run = first.the_run
    world.pass_ms(60_000)
    saved = first.durable(run, 100)
    world.pass_ms(30_000)
    first.receipt(run)
    first.die()
    world.pass_ms(10_000)
    assert renter.view(job).runs[0].run_state is RunState.UNKNOWN
    assert second.prepared == [job]
    world.pass_ms(12_000)

    again = second.the_run
    assert again.lease.start_step == 100
    assert again.lease.start_checkpoint == saved.id
    assert again.lease.epoch == 2
    view = renter.view(job)
    assert view.state is JobState.RUNNING
    assert view.recoveries == 1
    assert view.runs[0].reason is Reason.PROVIDER_LOST
    charge = world.broker.money.statement(renter.party, job).charges[0]
    assert charge.fault is Fault.PROVIDER
    assert charge.cum_device_ms == 90_000
    assert charge.charged_ucr == 60_000
    assert charge.lost_device_ms == 30_000
    world.pass_ms(5_000)
    second.succeed(again)
    world.settle_down()
    view = renter.view(job)
    assert view.state is JobState.SUCCEEDED
    assert view.charged_ucr == 60_000 + again.cum_ms(world.now_ms)
    world.audit()


def test_what_a_job_does_before_it_runs_is_said_as_it_is() -> None:
    world = World()
    first = world.agent("alice")
    first.first_state = "restoring"
    renter = world.renter()
    job = renter.run()
    assert renter.view(job).says == "the machine fetches its inputs"
    first.starts(first.the_run)
    second = world.agent("bob")
    second.first_state = "restoring"
    first.die()
    world.pass_ms(22_000)
    anew = "begins anew elsewhere, for nothing of it was durable: the machine fetches its inputs"
    assert renter.view(job).says == anew
    run = second.the_run
    second.starts(run)
    second.durable(run, 100)
    third = world.agent("carol")
    third.first_state = "restoring"
    second.die()
    world.pass_ms(22_000)
    assert renter.view(job).says == "goes on from step 100: the machine restores the checkpoint"


def test_recovery_begins_at_the_tick_that_finds_the_loss() -> None:
    world = World()
    first = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    second = world.agent("bob")
    first.die()
    world.pass_ms(21_000)
    assert second.the_run.job_id == job


def test_a_zombie_is_refused_everywhere_and_told_to_stop() -> None:
    world = World()
    zombie = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    second = world.agent("bob")
    run = zombie.the_run
    world.pass_ms(5_000)
    zombie.awake = zombie.connected = False
    world.pass_ms(25_000)
    assert second.the_run.lease.epoch == 2

    zombie.awake = True
    zombie.join()
    assert zombie.held_at_welcome == []
    with pytest.raises(Refusal) as refused:
        zombie.upload(run, {"model.bin": b"from the past"})
    assert refused.value.code == "stale_epoch"
    zombie.checkpoint(run, 500, upload=False)
    zombie.receipt(run)
    zombie.beat()
    world.settle_down()
    assert not run.verdicts[0].durable
    assert run.id in zombie.past  # it was told to stop, and did
    view = renter.view(job)
    assert view.durable_step == 0
    assert view.runs[0].charge_ucr == 0
    assert view.state is JobState.RUNNING
    world.audit()


def test_a_reclaim_loses_nothing_and_pays_for_the_durable_work() -> None:
    world = World()
    first = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    second = world.agent("bob")
    run = first.the_run
    world.pass_ms(40_000)
    first.withdraw()
    first.durable(run, 80)
    first.exit(run, Reason.RECLAIMED, 75)
    world.settle_down()
    assert second.the_run.lease.start_step == 80
    view = renter.view(job)
    assert view.runs[0].reason is Reason.RECLAIMED
    assert view.lost_device_ms == 0
    assert view.settled_ucr == 40_000
    world.audit()


def test_twenty_five_blips_cause_no_recovery() -> None:
    world = World()
    agent = world.agent("alice")
    second = world.agent("bob", price_ucr_per_device_hour=3_600_000)
    renter = world.renter()
    job = renter.run()
    agent, second = (agent, second) if agent.runs else (second, agent)
    for _ in range(25):
        agent.leave()
        agent.awake = False
        world.pass_ms(15_000)
        assert second.prepared == [job]
        agent.awake = True
        agent.join()
        world.pass_ms(6_000)
        assert second.prepared == []
    view = renter.view(job)
    assert view.recoveries == 0
    assert len(view.runs) == 1
    agent.awake = agent.connected = False
    world.pass_ms(30_000)
    assert renter.view(job).recoveries == 1
    assert second.the_run.job_id == job
    world.audit()


def test_a_durable_checkpoint_shows_as_progress_before_the_next_heartbeat() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    agent.durable(agent.the_run, 60)
    assert (renter.view(job).step, renter.view(job).durable_step) == (60, 60)


@pytest.mark.parametrize("trouble", [StorageFull("full"), StoreAway("away")])
def test_a_verdict_that_cannot_be_written_down_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    world = World()
    agents = [world.agent("alice"), world.agent("bob")]
    renter = world.renter()
    jobs = [renter.run(), renter.run()]
    for agent in agents:
        agent.checkpoint(agent.the_run, 60)

    def away() -> None:
        raise trouble

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "transaction", away)
        with pytest.raises(type(trouble)):
            world.broker.supervision.verdicts()
    assert [renter.view(job).durable_step for job in jobs] == [0, 0]
    # The verifier has nothing more to tell: what it told is still known.
    world.settle_down()
    assert [renter.view(job).durable_step for job in jobs] == [60, 60]


def test_a_job_is_matched_after_the_database_was_away(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    first = renter.run()
    second = renter.submit()
    agent.succeed(agent.the_run)

    def away() -> None:
        raise StoreAway("away")

    for _ in range(3):
        world.broker.settling.settle_due()
        agent.pump()
        with monkeypatch.context() as patch:
            patch.setattr(world.store, "snapshot", away)
            with pytest.raises(StoreAway):
                world.broker.scheduling.tick()
    world.settle_down()
    assert renter.view(first).state is JobState.SUCCEEDED
    assert renter.view(second).state is JobState.RUNNING


def test_a_successor_that_rejoins_is_asked_again() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    second = world.agent("bob")
    agent.die()
    world.clock.ms += 10_000
    second.beat()
    world.step()  # bob is asked, and loses the notice with its connection
    second.join()
    second.pump()
    assert second.prepared == [job]


def test_a_closed_socket_alone_only_prepares() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    second = world.agent("bob")
    agent.leave()
    world.settle_down(1)
    assert renter.view(job).runs[0].run_state is RunState.UNKNOWN
    assert second.prepared == [job]
    agent.join()
    agent.beat()
    assert renter.view(job).runs[0].run_state is RunState.RUNNING


def test_a_restarted_broker_preempts_nobody() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    world.clock.ms += 15 * 60_000  # the broker was away for a quarter of an hour
    world.restart_broker()
    world.settle_down()
    world.pass_ms(15_000)
    agent.join()
    assert agent.held_at_welcome == [(agent.the_run.id, 1)]
    world.pass_ms(60_000)
    view = renter.view(job)
    assert view.recoveries == 0
    assert view.state is JobState.RUNNING
    agent.succeed(agent.the_run)
    world.settle_down()
    assert renter.view(job).state is JobState.SUCCEEDED
    assert renter.view(job).settled_ucr == 16 * 60_000 + 15_000
    world.audit()


def test_a_broker_that_stood_still_preempts_nobody() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    world.clock.ms += 15 * 60_000  # suspended; what the agents sent waits in its sockets
    world.broker.supervision.was_away()
    world.broker.supervision.sweep()
    world.pass_ms(15_000)
    view = renter.view(job)
    assert (view.recoveries, view.state) == (0, JobState.RUNNING)
    # That was one period of grace, and no more.
    agent.die()
    world.pass_ms(60_000)
    assert renter.view(job).recoveries == 1


def test_an_agent_that_has_forgotten_its_run_loses_the_job_by_its_silence() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    agent.runs.clear()
    agent.accepts_leases = False
    world.pass_ms(25_000)
    assert renter.view(job).runs[0].reason is Reason.RUN_VANISHED


def test_refused_and_unanswered_leases_cost_nobody_anything() -> None:
    world = World()
    refuses = world.agent("alice", price_ucr_per_device_hour=1000)
    refuses.accepts_leases = False
    silent = world.agent("bob", price_ucr_per_device_hour=2000)
    silent.answers = False
    good = world.agent("carol")
    renter = world.renter()
    job = renter.submit()
    world.pass_ms(20_000)
    assert good.the_run.job_id == job
    view = renter.view(job)
    assert [run.reason for run in view.runs] == [
        Reason.LEASE_REFUSED,
        Reason.LEASE_UNANSWERED,
        None,
    ]
    assert view.settled_ucr == 0
    assert view.runs[0].lease_state is LeaseState.CLOSED
    world.audit()


def test_a_provider_that_goes_on_refusing_is_asked_less_and_less_often() -> None:
    world = World()
    agent = world.agent("alice")
    agent.accepts_leases = False
    renter = world.renter()
    job = renter.submit()
    world.pass_ms(600_000)
    # At once, then after 4, 8, 16, 32 and 60 s, and each minute from then on.
    assert 12 <= len(renter.view(job).runs) <= 18
    agent.accepts_leases = True
    world.pass_ms(61_000)
    assert agent.the_run.job_id == job
    world.audit()


def test_success_without_its_outputs_is_no_success() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run(outputs="/out")
    world.pass_ms(10_000)
    agent.exit(agent.the_run, Reason.SUCCEEDED, 0)
    world.settle_down()
    assert renter.view(job).state is JobState.RUNNING  # they may still come
    agent.accepts_leases = False
    world.pass_ms(25_000)
    view = renter.view(job)
    assert view.runs[0].reason is Reason.RUN_VANISHED
    assert view.settled_ucr == 0
    world.audit()


def test_attempts_without_progress_pause_the_job() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    for _ in range(300):
        if renter.view(job).state is JobState.PAUSED:
            break
        if agent.runs:
            agent.exit(agent.the_run, Reason.START_FAILED)
        world.pass_ms(1_000)
    view = renter.view(job)
    assert view.state is JobState.PAUSED
    assert view.reason is Reason.NO_PROGRESS
    assert len(view.runs) == 5
    assert view.next_step is NextStep.READ_LOGS
    world.broker.jobs.resume(renter.party, job)
    world.settle_down()
    assert agent.the_run.lease.epoch == 6
    world.audit()


def test_a_job_that_fails_is_paid_for_and_not_tried_again() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    world.pass_ms(3_000)
    agent.exit(agent.the_run, Reason.JOB_FAILED, 1)
    world.settle_down()
    view = renter.view(job)
    assert view.state is JobState.FAILED
    assert view.settled_ucr == 3_000
    assert view.held_ucr == 0
    world.audit()


def test_an_end_that_nobody_ordered_is_the_providers() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    world.pass_ms(30_000)
    agent.exit(agent.the_run, Reason.BUDGET_EXHAUSTED, 75)
    world.settle_down()
    view = renter.view(job)
    assert view.runs[0].reason is Reason.RUN_KILLED
    assert view.runs[0].charge_ucr == 0


@pytest.mark.parametrize("flipped", [False, True])
def test_an_export_verifies_offline_until_a_byte_is_flipped(flipped: bool) -> None:
    world = World()
    first = world.agent("alice")
    renter = world.renter()
    job = renter.run(outputs="/out")
    second = world.agent("bob")
    run = first.the_run
    for step in range(1, 6):
        world.pass_ms(20_000)
        first.durable(run, step * 10)
    world.pass_ms(7_000)
    first.receipt(run)
    first.die()
    world.pass_ms(22_000)
    world.broker.jobs.resume(renter.party, job, renter.amendment(job, 12_000_000))
    world.pass_ms(5_000)
    second.succeed(second.the_run)
    world.settle_down()
    assert renter.view(job).state is JobState.SUCCEEDED
    assert renter.cosign(job) == 2
    data = world.broker.views.export(renter.party, job).model_dump_json().encode()
    if not flipped:
        verdict = verify_export(data, broker=world.key.party)
        assert verdict.problems == []
        assert verdict.leases == 2
        assert verdict.charged_ucr == renter.view(job).settled_ucr
        return
    for position in range(200, len(data), 997):
        changed = bytearray(data)
        changed[position] ^= 1
        if bytes(changed[position : position + 1]).isspace() or data[position : position + 1] in (
            b'"',
            b",",
            b":",
            b"{",
            b"}",
            b"[",
            b"]",
        ):
            continue
        assert not verify_export(bytes(changed), broker=world.key.party).holds, position
