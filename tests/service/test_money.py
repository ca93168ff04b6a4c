"""Money and epochs: holds, edges, receipts that lie, and what the renter wants meanwhile."""

from __future__ import annotations

import itertools

import pytest

from sublet_broker.service.errors import Refusal
from sublet_contracts.api import NextStep
from sublet_contracts.export import verify_export
from sublet_contracts.reasons import Reason
from sublet_contracts.states import JobState
from sublet_contracts.wire import ReceiptIssued
from tests.service.world import PRICE, AgentDouble, RenterDouble, World


def test_the_same_job_sent_twice_is_one_job_and_one_hold() -> None:
    world = World()
    world.agent("alice")
    renter = world.renter(credits_ucr=15_000_000)
    signed = renter.job(budget_ucr=10_000_000)
    first = world.broker.jobs.submit(renter.party, signed.envelope)
    second = world.broker.jobs.submit(renter.party, signed.envelope)
    assert first.id == second.id
    assert renter.balance_ucr() == 5_000_000
    world.audit()


def test_two_jobs_cannot_hold_the_same_money() -> None:
    world = World()
    world.agent("alice")
    renter = world.renter(credits_ucr=15_000_000)
    renter.submit(budget_ucr=10_000_000)
    with pytest.raises(Refusal) as refused:
        renter.submit(budget_ucr=10_000_000)
    assert refused.value.code == "over_balance"
    assert refused.value.field == "budget_ucr"
    assert renter.balance_ucr() == 5_000_000
    world.audit()


@pytest.mark.parametrize("stops_after_ms", [0, 10_000, 29_000, 200_000])
def test_the_budget_is_never_passed_by_one_micro_credit(stops_after_ms: int) -> None:
    """Whenever the run stops after its drain was ordered, even if it never does."""
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run(budget_ucr=100_000)  # 100 s of it
    run = agent.the_run
    agent.obeys = False
    ordered_ms = None
    for _ in range(400):
        world.pass_ms(1_000)
        if run.orders and ordered_ms is None:
            ordered_ms = world.now_ms
            assert run.orders[0].desired == "drain"
            assert run.orders[0].reason is Reason.BUDGET_EXHAUSTED
            assert run.cum_ms(world.now_ms) <= 61_000
        waited = ordered_ms is not None and world.now_ms - ordered_ms >= stops_after_ms
        if waited and run.id in agent.runs:
            agent.exit(run, Reason.BUDGET_EXHAUSTED, 75)
            world.settle_down()
    view = renter.view(job)
    assert view.settled_ucr <= 100_000
    if stops_after_ms < 60_000:
        assert view.state is JobState.PAUSED
        assert view.reason is Reason.BUDGET_EXHAUSTED
        assert view.settled_ucr == min(100_000, run.cum_ms(world.now_ms))
    else:
        # It never stopped: lost, and paid for what is durable, which is nothing.
        assert view.runs[0].reason is Reason.PROVIDER_LOST
        assert view.settled_ucr == 0
    world.audit()


def test_a_drained_budget_pauses_and_topping_up_resumes_from_the_durable_step() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run(budget_ucr=100_000)
    run = agent.the_run
    world.pass_ms(62_000)
    assert run.orders
    agent.durable(run, 70)
    agent.exit(run, Reason.BUDGET_EXHAUSTED, 75)
    world.settle_down()
    view = renter.view(job)
    assert view.state is JobState.PAUSED
    assert view.held_ucr == 100_000 - view.settled_ucr
    with pytest.raises(Refusal) as refused:
        world.broker.jobs.resume(renter.party, job)
    assert refused.value.code == "budget_used_up"
    with pytest.raises(Refusal):
        world.broker.jobs.resume(renter.party, job, renter.amendment(job, 90_000))
    amendment = renter.amendment(job, 300_000)
    world.broker.jobs.resume(renter.party, job, amendment)
    world.broker.jobs.resume(renter.party, job, amendment)  # twice is once
    world.settle_down()
    again = agent.the_run
    assert again.lease.start_step == 70
    assert again.lease.hold_ucr == 300_000 - view.settled_ucr
    world.pass_ms(30_000)
    agent.succeed(again)
    world.settle_down()
    view = renter.view(job)
    assert view.state is JobState.SUCCEEDED
    assert renter.balance_ucr() == 100_000_000 - view.settled_ucr
    world.audit()


def test_pause_and_resume_keep_the_work() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = agent.the_run
    world.pass_ms(20_000)
    world.broker.jobs.pause(renter.party, job)
    world.settle_down()
    assert [(o.desired, o.reason) for o in run.orders] == [("drain", Reason.PAUSED_BY_RENTER)]
    agent.durable(run, 40)
    agent.exit(run, Reason.PAUSED_BY_RENTER, 75)
    world.settle_down()
    assert renter.view(job).state is JobState.PAUSED
    world.pass_ms(60_000)
    assert not agent.runs
    world.broker.jobs.resume(renter.party, job)
    world.settle_down()
    assert agent.the_run.lease.start_step == 40
    assert renter.view(job).settled_ucr == 20_000
    world.audit()


def test_a_pause_that_is_taken_back_before_it_happened_goes_on() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = agent.the_run
    world.broker.jobs.pause(renter.party, job)
    world.broker.jobs.resume(renter.party, job)
    world.settle_down()
    agent.exit(run, Reason.PAUSED_BY_RENTER, 75)
    world.settle_down()
    assert agent.the_run.lease.epoch == 2
    world.audit()


def _queued(world: World, renter: RenterDouble) -> str:
    busy = renter.run()
    assert world.broker.views.job(renter.party, busy).state is JobState.RUNNING
    return renter.run()


def _starting(world: World, renter: RenterDouble) -> str:
    world.agents[0].answers = False
    return renter.run()


def _running(world: World, renter: RenterDouble) -> str:
    return renter.run()


def _recovering(world: World, renter: RenterDouble) -> str:
    job = renter.run()
    world.agents[0].die()
    world.pass_ms(25_000)
    return job


def _paused(world: World, renter: RenterDouble) -> str:
    job = _recovering(world, renter)
    world.broker.jobs.pause(renter.party, job)
    return job


@pytest.mark.parametrize("reach", [_queued, _starting, _running, _recovering, _paused])
def test_a_job_can_be_cancelled_in_every_state(reach: object) -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    assert callable(reach)
    job: str = reach(world, renter)
    state = renter.view(job).state
    assert state is JobState(reach.__name__.removeprefix("_"))
    settled = renter.view(job).settled_ucr
    world.broker.jobs.cancel(renter.party, job)
    world.broker.jobs.cancel(renter.party, job)
    world.settle_down()
    for run in list(agent.runs.values()):
        if run.orders:
            assert run.orders[0].reason is Reason.CANCELLED
            agent.exit(run, Reason.CANCELLED, 75)
    world.settle_down()
    view = renter.view(job)
    assert view.state is JobState.CANCELLED
    assert view.held_ucr == 0
    assert view.settled_ucr == settled
    with pytest.raises(Refusal):
        world.broker.jobs.resume(renter.party, job)
    world.audit()


def test_an_agent_that_does_not_stop_is_told_harder_and_then_given_up() -> None:
    world = World()
    agent = world.agent("alice")
    agent.obeys = False
    renter = world.renter()
    job = renter.run()
    run = agent.the_run
    world.broker.jobs.cancel(renter.party, job)
    world.pass_ms(31_000)
    assert [order.desired for order in run.orders] == ["drain", "stop"]
    world.pass_ms(32_000)
    view = renter.view(job)
    assert view.state is JobState.CANCELLED
    assert view.settled_ucr == 0
    world.audit()


def _forked(world: World, agent: AgentDouble) -> None:
    run = agent.the_run
    world.pass_ms(30_000)
    agent.durable(run, 10)
    world.pass_ms(10_000)
    other = agent.make_receipt(run, cum_device_ms=39_000)
    agent.receipt(run)
    agent.receipt(run)
    agent.tell(ReceiptIssued(receipt=other.envelope))


def test_two_histories_of_one_lease_are_kept_and_paid_up_to_where_they_agree() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    second = world.agent("bob")
    run = agent.the_run
    _forked(world, agent)
    world.settle_down()
    charge = world.broker.money.statement(renter.party, job).charges[0]
    assert charge.reason is Reason.EVIDENCE_OF_FRAUD
    assert charge.charged_ucr == 30_000
    assert run.id in agent.past  # told to stop
    assert second.the_run.lease.start_step == 10
    second.succeed(second.the_run)
    world.settle_down()
    data = world.broker.views.export(renter.party, job).model_dump_json().encode()
    assert verify_export(data).problems == []
    world.audit()


def test_a_second_history_that_comes_after_the_settlement_changes_nothing() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = agent.the_run
    world.pass_ms(10_000)
    other = agent.make_receipt(run, cum_device_ms=5_000)
    agent.succeed(run)
    world.settle_down()
    before = renter.view(job)
    agent.tell(ReceiptIssued(receipt=other.envelope))
    agent.tell(ReceiptIssued(receipt=other.envelope))
    assert renter.view(job).settled_ucr == before.settled_ucr == 10_000
    events = world.broker.views.events(renter.party, job).events
    assert [e.reason for e in events if e.kind == "receipt"].count(Reason.EVIDENCE_OF_FRAUD) == 1
    world.audit()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3])
def test_the_settlement_is_the_same_under_any_order_and_duplication(order: tuple[int, ...]) -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = agent.the_run
    made = []
    for number in range(4):
        world.pass_ms(5_000)
        final = Reason.JOB_FAILED if number == 3 else None
        signed = agent.make_receipt(run, final=final)
        run.sequence, run.head = signed.document.sequence, signed.id
        made.append(signed)
    for number in (*order, *order):
        agent.send(ReceiptIssued(receipt=made[number].envelope))
    world.settle_down(3)
    run.sequence -= 1
    run.head = made[2].id
    agent.exit(run, Reason.JOB_FAILED, 1)
    world.settle_down()
    assert agent.waiting == []
    assert renter.view(job).settled_ucr == 20_000
    world.audit()


def test_claims_beyond_the_brokers_clock_are_cut() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = agent.the_run
    world.pass_ms(10_000)
    run.started_ms -= 3_600_000  # an hour that never was
    agent.exit(run, Reason.JOB_FAILED, 1)
    world.settle_down()
    tolerated = world.settings.clock_tolerance_ms + world.settings.clock_tolerance_ppm // 100
    assert renter.view(job).settled_ucr <= 10_000 + tolerated
    data = world.broker.views.export(renter.party, job).model_dump_json().encode()
    assert verify_export(data).problems == []
    world.audit()


def test_what_is_computed_while_the_brokers_clock_is_held_back_counts() -> None:
    """Its wall clock was set back by ten minutes: until they meet, it goes at half its pace."""
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = agent.the_run
    world.pass_ms(60_000)
    world.clock.held_back_ms += 60_000
    run.started_ms -= 60_000
    saved = agent.durable(run, 10)
    assert saved.document.cum_device_ms == 120_000
    agent.exit(run, Reason.JOB_FAILED, 1)
    world.settle_down()
    assert renter.view(job).settled_ucr == 120_000
    world.audit()


@pytest.mark.parametrize(
    "lie", [{"charge_ucr": 10}, {"durable_device_ms": 5_000}, {"durable_checkpoint": "a" * 64}]
)
def test_a_receipt_that_does_not_add_up_is_dropped(lie: dict[str, object]) -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = agent.the_run
    world.pass_ms(10_000)
    signed = agent.make_receipt(run, **lie)
    agent.send(ReceiptIssued(receipt=signed.envelope))
    assert agent.waiting == []
    assert world.broker.views.receipts(renter.party, job).receipts == ()
    agent.receipt(run)
    assert len(world.broker.views.receipts(renter.party, job).receipts) == 1


def test_a_checkpoint_that_is_not_there_is_not_paid() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = agent.the_run
    world.pass_ms(10_000)
    agent.checkpoint(run, 100, upload=False)
    world.settle_down()
    assert [verdict.durable for verdict in run.verdicts] == [False]
    assert renter.view(job).durable_step == 0


def test_nobody_gets_a_strangers_content_by_its_hash() -> None:
    world = World()
    agent = world.agent("alice")
    second = world.agent("bob")
    renter = world.renter()
    other = world.renter("other")
    renter.run()
    other.run()
    secret = {"model.bin": b"the other's weights"}
    second.durable(second.the_run, 10, content=secret)
    agent.checkpoint(agent.the_run, 10, upload=False, content=secret)
    world.settle_down()
    assert [verdict.durable for verdict in agent.the_run.verdicts] == [False]


def test_receipts_beyond_what_the_job_accepts_wait_for_the_renters_signature() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run(budget_ucr=1_000_000, accept_receipts_up_to_ucr=100_000)
    assert agent.the_run.lease.hold_ucr == 100_000
    run = agent.the_run
    world.pass_ms(62_000)
    agent.durable(run, 60)
    agent.exit(run, Reason.BUDGET_EXHAUSTED, 75)
    world.settle_down()
    assert renter.view(job).state is JobState.PAUSED
    view = renter.view(job)
    assert "signature" in view.says
    assert view.next_step is NextStep.SIGN_RECEIPTS
    with pytest.raises(Refusal) as refused:
        world.broker.jobs.resume(renter.party, job)
    assert refused.value.code == "receipts_unsigned"
    assert renter.cosign(job) == 1
    assert renter.cosign(job) == 0
    world.broker.jobs.resume(renter.party, job)
    world.settle_down()
    assert agent.the_run.lease.hold_ucr == 100_000
    agent.succeed(agent.the_run)
    world.settle_down()
    data = world.broker.views.export(renter.party, job).model_dump_json().encode()
    assert verify_export(data).problems == []
    world.audit()


def test_only_the_operator_deposits_and_only_once() -> None:
    world = World()
    renter = world.renter(credits_ucr=0)
    with pytest.raises(Refusal) as refused:
        world.broker.accounts.deposit(renter.party, renter.job().envelope)
    assert refused.value.code == "not_operator"
    world.fund(renter.party, 5)
    world.fund(renter.party, 5)
    assert renter.balance_ucr() == 10
    world.audit()


def test_the_price_is_the_offers_and_the_fee_comes_out_of_it() -> None:
    world = World()
    agent = world.agent("alice", price_ucr_per_device_hour=1_234_567)
    renter = world.renter()
    job = renter.run(max_price_ucr_per_device_hour=PRICE)
    world.pass_ms(12_345)
    agent.succeed(agent.the_run)
    world.settle_down()
    charged = 1_234_567 * 12_345 // 3_600_000
    assert renter.view(job).settled_ucr == charged
    assert world.broker.money.earnings(agent.party).earned_ucr == charged - charged * 5 // 100
    world.audit()
