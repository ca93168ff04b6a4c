"""One job, one image: what its tag meant when it first ran is what every later run uses."""

from __future__ import annotations

import pytest

from sublet_broker.market.metering import HEARD_SLACK_MS
from sublet_broker.market.resuming import IMAGE_WAIT_MS, IMAGE_WITNESSES
from sublet_contracts.documents import Lease, sign_document
from sublet_contracts.export import verify_export
from sublet_contracts.reasons import Reason
from sublet_contracts.states import JobState, LeaseState
from sublet_contracts.wire import Assign, LeaseAnswer, RunChanged
from tests.service.world import AgentDouble, World

TAG = "train:1"
MEANT = "docker.io/library/train@sha256:" + "a" * 64
MOVED = "docker.io/library/train@sha256:" + "b" * 64
ID = "sha256:" + "c" * 64


def meaning(world: World, name: str, image: str, price_ucr: int = 1) -> AgentDouble:
    """An agent to which the tag means this image."""
    agent = world.agent(name, price_ucr_per_device_hour=price_ucr)
    agent.tag_means = image
    return agent


@pytest.mark.parametrize("image", [MEANT, ID])
def test_the_first_to_sign_pins_the_job_and_whoever_takes_over_has_it_in_the_lease(
    image: str,
) -> None:
    world = World()
    first = meaning(world, "alice", image)
    renter = world.renter()
    job = renter.run(image=TAG)
    assert first.the_run.lease.image == "", "nobody had looked"
    assert renter.view(job).image_pinned == image
    second = meaning(world, "bob", MOVED)
    first.durable(first.the_run, 100)
    first.die()
    first.leave()
    world.pass_ms(12_000)
    assert (second.prepared, second.prepared_image) == ([job], image)
    world.pass_ms(10_000)
    run = second.the_run
    assert (run.lease.image, run.image) == (image, image)
    world.pass_ms(1_000)
    second.durable(run, 200)
    second.succeed(run)
    world.settle_down()
    view = renter.view(job)
    assert (view.state, view.image_pinned) == (JobState.SUCCEEDED, image)
    data = world.broker.views.export(renter.party, job).model_dump_json().encode()
    assert verify_export(data, broker=world.key.party).problems == []
    world.audit()


def test_an_image_by_digest_is_pinned_to_nothing_and_nothing_can_be_said_of_it() -> None:
    world = World()
    agent = meaning(world, "alice", "")
    renter = world.renter()
    job = renter.run()
    assert renter.view(job).image_pinned == ""
    agent.tag_means = MEANT
    other = meaning(world, "bob", MEANT)
    job = renter.run()
    assert other.the_run.job_id == job, "it believes so"
    run = next(run for run in renter.view(job).runs)
    assert run.lease_state is LeaseState.PROPOSED, "the broker does not take it"


def test_another_image_than_the_leases_is_not_taken() -> None:
    world = World()
    first = meaning(world, "alice", MEANT)
    renter = world.renter()
    job = renter.run(image=TAG)
    first.die()
    first.leave()
    second = world.agent("bob")
    offered: list[Assign] = []
    second.assigned = offered.append  # type: ignore[method-assign]
    world.pass_ms(22_000)
    lease = offered[0].lease
    signed = lease.countersigned(second.key)
    for image in (MOVED, ""):
        second.tell(LeaseAnswer(lease=lease.id, signed=signed, image=image))
        assert renter.view(job).runs[-1].lease_state is LeaseState.PROPOSED
    second.tell(LeaseAnswer(lease=lease.id, signed=signed, image=MEANT))
    assert renter.view(job).runs[-1].lease_state is LeaseState.ACTIVE


def test_a_checkpoint_of_another_image_counts_for_nothing() -> None:
    world = World()
    agent = meaning(world, "alice", MEANT)
    renter = world.renter()
    job = renter.run(image=TAG)
    run = agent.the_run
    world.pass_ms(5_000)
    for image in ("", MOVED):
        run.image = image
        agent.checkpoint(run, 10)
        world.settle_down()
        assert "it was made with" in run.verdicts[-1].detail
    run.image = MEANT
    agent.durable(run, 10)
    assert renter.view(job).durable_step == 10


@pytest.mark.parametrize("reason", [Reason.PULL_FAILED, Reason.IMAGE_NOT_ALLOWED])
def test_who_can_not_look_up_is_passed_over_and_costs_nothing(reason: Reason) -> None:
    world = World()
    broken = world.agent("alice", price_ucr_per_device_hour=1)
    broken.image_trouble = reason
    meaning(world, "bob", MEANT, price_ucr=2)
    renter = world.renter()
    job = renter.run(image=TAG)
    view = renter.view(job)
    assert [run.reason for run in view.runs] == [reason, None]
    assert "the registry says so" in view.runs[0].detail
    assert view.runs[0].charge_ucr == 0
    lines = world.broker.views.logs(renter.party, job)
    assert [(line.stream, line.text) for line in lines] == [
        ("sublet", f"{reason}: image 'train:1': the registry says so")
    ]
    assert world.broker.money.statement(renter.party, job).charges == ()
    assert view.state is JobState.RUNNING


def test_that_nobody_finds_it_ends_the_job_after_three_have_said_so() -> None:
    world = World()
    for number in range(IMAGE_WITNESSES + 1):
        world.agent(f"agent-{number}").image_trouble = Reason.IMAGE_UNKNOWN
    renter = world.renter()
    job = renter.run(image=TAG)
    world.pass_ms(5_000)
    view = renter.view(job)
    assert (view.state, view.reason) == (JobState.FAILED, Reason.IMAGE_UNAVAILABLE)
    assert len(view.runs) == IMAGE_WITNESSES
    assert view.charged_ucr == 0
    world.audit()


def test_an_image_that_only_its_first_machine_knows_does_not_hold_the_job_up() -> None:
    """Also where that machine has lied: nothing durable was made with it."""
    world = World()
    first = meaning(world, "alice", MOVED)
    renter = world.renter()
    job = renter.run(image=TAG)
    second = meaning(world, "bob", MEANT)
    second.image_trouble = Reason.IMAGE_UNKNOWN
    first.die()
    first.leave()
    world.pass_ms(22_000)
    view = renter.view(job)
    assert (view.runs[1].reason, view.image_pinned) == (Reason.IMAGE_UNKNOWN, "")
    second.image_trouble = None
    world.pass_ms(10_000)
    assert second.the_run.image == MEANT
    assert renter.view(job).image_pinned == MEANT


def test_what_is_durable_keeps_its_image_and_waits_for_whoever_has_it() -> None:
    world = World()
    first = meaning(world, "alice", ID)
    renter = world.renter()
    job = renter.run(image=TAG)
    first.durable(first.the_run, 10)
    second = meaning(world, "bob", MEANT)
    second.image_trouble = Reason.IMAGE_UNKNOWN
    first.die()
    first.leave()
    world.pass_ms(30_000 + IMAGE_WAIT_MS)
    view = renter.view(job)
    assert (view.state, view.reason) == (JobState.PAUSED, Reason.IMAGE_UNAVAILABLE)
    assert view.image_pinned == ID


def test_an_export_in_which_a_job_goes_on_with_another_image_does_not_verify() -> None:
    world = World()
    first = meaning(world, "alice", MEANT)
    renter = world.renter()
    job = renter.run(image=TAG)
    run = first.the_run
    world.pass_ms(5_000)
    first.durable(run, 10)
    first.die()
    first.leave()
    second = world.agent("bob")
    world.pass_ms(22_000)
    world.pass_ms(1_000)
    second.succeed(second.the_run)
    world.settle_down()
    export = world.broker.views.export(renter.party, job)
    true = export.model_dump_json().encode()
    assert verify_export(true, broker=world.key.party).problems == []
    leases = list(export.leases)
    document = Lease.model_validate_json(leases[1].payload_bytes)
    assert document.image == MEANT
    moved = document.model_copy(update={"image": MOVED})
    leases[1] = sign_document(moved, world.key, second.key).envelope
    forged = export.model_copy(update={"leases": tuple(leases)}).model_dump_json().encode()
    problems = verify_export(forged, broker=world.key.party).problems
    assert "lease 2 goes on with another image than the one that made its checkpoint" in problems


# -- what a pull costs -----------------------------------------------------------------------------

MINUTE_MS = 60_000


def pulled_for(minutes: int, **job: object) -> tuple[World, AgentDouble, str]:
    """Let a job's pull take so long."""
    world = World()
    agent = world.agent("alice", expires_ms=world.now_ms + 86_400_000)
    agent.first_state = "pulling"
    renter = world.renter()
    id = renter.run(**job)
    run = agent.the_run
    run.started_ms = world.now_ms + 10**9
    world.pass_ms(minutes * MINUTE_MS, every_ms=3_000)
    return world, agent, id


def test_a_pull_of_fifteen_minutes_costs_five() -> None:
    world, agent, job = pulled_for(15)
    run = agent.the_run
    agent.starts(run, 5 * MINUTE_MS)
    world.pass_ms(MINUTE_MS)
    agent.durable(run, 10)
    agent.succeed(run)
    world.settle_down()
    renter = world.renter(credits_ucr=0)
    assert renter.view(job).charged_ucr == 6 * MINUTE_MS, "a micro-credit each device-ms"
    (charge,) = world.broker.money.statement(renter.party, job).charges
    assert (charge.cum_device_ms, charge.lost_device_ms) == (6 * MINUTE_MS, 0)
    data = world.broker.views.export(renter.party, job).model_dump_json().encode()
    assert verify_export(data, broker=world.key.party).problems == []
    world.audit()


@pytest.mark.parametrize("says", [True, False])
def test_the_brokers_clock_gives_a_pull_its_ten_minutes_for_nothing(says: bool) -> None:
    """Whoever claims all of it, as his pull's or as his run's, is paid what has passed beyond."""
    world, agent, job = pulled_for(15)
    run = agent.the_run
    agent.starts(run, 15 * MINUTE_MS)
    world.pass_ms(MINUTE_MS)
    agent.receipt(run, pull_device_ms=15 * MINUTE_MS if says else 0)
    agent.world.broker.jobs.cancel(world.renter(credits_ucr=0).party, job)
    world.settle_down()
    run.stopped_ms = world.now_ms
    agent.send(
        RunChanged(lease=run.id, epoch=1, state="exited", cum_device_ms=0, reason=Reason.CANCELLED)
    )
    final = 15 * MINUTE_MS if says else 0
    agent.receipt(run, final=Reason.CANCELLED, pull_device_ms=final)
    world.settle_down()
    (charge,) = world.broker.money.statement(world.renter(credits_ucr=0).party, job).charges
    passed_ms = 16 * MINUTE_MS
    tolerated_ms = 1_000 + passed_ms // 1_000
    slack_ms = 0 if says else HEARD_SLACK_MS + 3_000
    assert charge.reason is Reason.CANCELLED
    assert 0 <= charge.cum_device_ms - 6 * MINUTE_MS <= tolerated_ms + slack_ms


def test_a_pull_is_paid_by_what_is_durable_and_not_where_nothing_is() -> None:
    for durable in (False, True):
        world, agent, job = pulled_for(15)
        run = agent.the_run
        agent.starts(run, 5 * MINUTE_MS)
        world.pass_ms(MINUTE_MS)
        if durable:
            agent.durable(run, 10)
        world.pass_ms(MINUTE_MS)
        agent.exit(run, Reason.RECLAIMED)
        world.settle_down()
        charges = world.broker.money.statement(world.renter(credits_ucr=0).party, job).charges
        assert charges[0].charged_ucr == (6 * MINUTE_MS if durable else 0)


def test_a_pull_that_fails_or_is_cancelled_costs_nothing() -> None:
    for reason in (Reason.PULL_FAILED, Reason.CANCELLED):
        world, agent, job = pulled_for(30)
        run = agent.the_run
        renter = world.renter(credits_ucr=0)
        if reason is Reason.CANCELLED:
            world.broker.jobs.cancel(renter.party, job)
            world.settle_down()
        agent.exit(run, reason)
        world.settle_down()
        charge = world.broker.money.statement(renter.party, job).charges[0]
        assert (charge.reason, charge.cum_device_ms, charge.charged_ucr) == (reason, 0, 0)


def test_a_receipt_that_charges_more_of_the_hold_for_its_pull_than_may_be_counts_for_nothing() -> (
    None
):
    world, agent, job = pulled_for(90, budget_ucr=40 * MINUTE_MS)
    run = agent.the_run
    agent.starts(run, 10 * MINUTE_MS + 1)
    agent.exit(run, Reason.JOB_FAILED, 1)
    world.pass_ms(MINUTE_MS)
    (charge,) = world.broker.money.statement(world.renter(credits_ucr=0).party, job).charges
    assert charge.charged_ucr == 0
    events = world.broker.views.events(world.renter(credits_ucr=0).party, job).events
    assert any("charged for its pull" in event.detail for event in events)
