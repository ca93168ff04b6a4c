"""What a run had written that did not finish: kept for its renter, and good for nothing else."""

from __future__ import annotations

import pytest

from sublet_broker.market.facts import JobFact
from sublet_broker.service.errors import Refusal
from sublet_contracts.api import NextStep
from sublet_contracts.digests import digest_of
from sublet_contracts.reasons import Reason
from sublet_contracts.states import JobState
from sublet_contracts.tree import parse_index
from tests.service.world import AgentDouble, RenterDouble, RunDouble, World

KIND = "partial-outputs"


def running(
    for_ms: int = 10_000, *, outputs: str = "/out"
) -> tuple[World, AgentDouble, RenterDouble, str, RunDouble]:
    """Return a market, its one agent and renter, and a job that has run for so long."""
    world = World()
    agent, renter = world.agent("alice"), world.renter()
    job = renter.run(outputs=outputs)
    run = agent.the_run
    world.pass_ms(for_ms)
    return world, agent, renter, job, run


def content_of(world: World, renter: RenterDouble, job: str) -> dict[str, bytes]:
    digest = renter.view(job).partial_outputs_index_digest
    assert digest is not None
    blobs = world.broker.blobs
    index = parse_index(blobs.get(renter.party, job, None, digest))
    return {
        file.path: b"".join(blobs.get(renter.party, job, None, c.digest) for c in file.chunks)
        for file in index.files
    }


def test_a_failed_job_has_what_it_had_written() -> None:
    world, agent, renter, job, run = running()
    agent.durable(run, 0, kind=KIND, content={"metrics.csv": b"1,2"})
    assert renter.view(job).state is JobState.RUNNING
    agent.exit(run, Reason.JOB_FAILED, 1)
    world.settle_down()
    view = renter.view(job)
    assert (view.state, view.next_step) == (JobState.FAILED, NextStep.DOWNLOAD_PARTIAL_OUTPUTS)
    assert (view.outputs, view.outputs_index_digest) == (None, None)
    assert content_of(world, renter, job) == {"metrics.csv": b"1,2"}
    assert view.kept_until_ms == (view.ended_ms or 0) + world.broker.context.settings.keep_ended_ms
    world.audit()


def test_they_are_no_progress_and_nothing_is_paid_for_them() -> None:
    world, agent, renter, job, run = running(60_000)
    signed = agent.durable(run, 10**6, kind=KIND)
    assert renter.view(job).durable_step == 0
    run.durable = (signed.id, 10**6, signed.document.cum_device_ms)
    agent.receipt(run)
    world.settle_down()
    events = world.broker.views.events(renter.party, job).events
    assert any("partial outputs as its progress" in event.detail for event in events)
    other = world.agent("bob")
    agent.die()
    world.pass_ms(30_000)
    world.settle_down()
    (first, *_) = renter.view(job).runs
    assert first.payable_device_ms == 0
    assert other.the_run.lease.start_step == 0
    assert other.the_run.lease.start_checkpoint is None
    world.audit()


def test_the_newest_runs_are_kept_and_displace_no_checkpoint_nor_outputs() -> None:
    world = World()
    agent, renter = world.agent("alice"), world.renter()
    job = renter.run(outputs="/out")
    for step in (1, 2, 3):
        agent.durable(agent.the_run, step)
    for attempt in (b"first", b"second"):
        run = agent.the_run
        agent.durable(run, 3, kind=KIND, content={"log": attempt})
        agent.exit(run, Reason.YIELDED, 75)
        world.settle_down()
        world.pass_ms(120_000)
        world.settle_down()
    assert content_of(world, renter, job) == {"log": b"second"}
    gone = digest_of(b"first")
    assert gone not in world.blobs.names()
    agent.succeed(agent.the_run, b"weights")
    world.settle_down()
    page = world.broker.views.checkpoints(renter.party, job).checkpoints
    kept = sorted((c.kind, c.step) for c in page if c.kept)
    assert kept[:3] == [("checkpoint", 1), ("checkpoint", 2), ("checkpoint", 3)]
    assert [kind for kind, _ in kept[3:]] == ["outputs", KIND]
    view = renter.view(job)
    assert view.next_step is NextStep.DOWNLOAD_OUTPUTS
    assert content_of(world, renter, job) == {"log": b"second"}


def test_whoever_has_lost_the_job_writes_none() -> None:
    world = World()
    agent, renter = world.agent("alice"), world.renter()
    job = renter.run(outputs="/out")
    run = agent.the_run
    agent.exit(run, Reason.JOB_FAILED, 1)
    world.settle_down()
    with pytest.raises(Refusal) as caught:
        agent.checkpoint(run, 0, kind=KIND)
    assert caught.value.code == "stale_epoch"
    agent.checkpoint(run, 0, kind=KIND, upload=False)
    world.settle_down()
    assert renter.view(job).partial_outputs is None


# -- verified late, and outputs that are none ------------------------------------------------------


def test_they_count_though_their_lease_was_closed_before_they_were_verified() -> None:
    world, agent, renter, job, run = running()
    agent.checkpoint(run, 0, kind=KIND, content={"metrics.csv": b"1,2"})
    agent.exit(run, Reason.JOB_FAILED, 1)
    assert renter.view(job).state is JobState.FAILED, "nobody waits for the verifier"
    world.settle_down()
    view = renter.view(job)
    assert view.next_step is NextStep.DOWNLOAD_PARTIAL_OUTPUTS
    assert content_of(world, renter, job) == {"metrics.csv": b"1,2"}
    world.audit()


def test_so_do_the_outputs_of_a_finished_run_that_nobody_asked_for() -> None:
    world, agent, renter, job, run = running(outputs="")
    signed = agent.checkpoint(run, 0, kind="outputs", content={"model.bin": b"weights"})
    agent.exit(run, Reason.SUCCEEDED, 0)
    view = renter.view(job)
    assert (view.state, view.outputs) == (JobState.SUCCEEDED, None)
    world.settle_down()
    view = renter.view(job)
    assert (view.outputs, view.next_step) == (signed.id, NextStep.DOWNLOAD_OUTPUTS)
    world.audit()


@pytest.mark.parametrize("late", [False, True])
def test_outputs_of_a_run_that_did_not_finish_are_nobodys(late: bool) -> None:
    world, agent, renter, job, run = running()
    agent.checkpoint(run, 0, kind="outputs", content={"model.bin": b"noise"})
    if not late:
        world.settle_down()
    agent.exit(run, Reason.JOB_FAILED, 1)
    world.settle_down()
    view = renter.view(job)
    assert (view.state, view.outputs) == (JobState.FAILED, None)
    world.audit()


def test_who_uploads_outputs_midway_is_paid_nothing_for_them_and_they_save_no_later_run() -> None:
    world, agent, renter, job, run = running(60_000)
    signed = agent.durable(run, 0, kind="outputs", content={"model.bin": b"noise"})
    assert renter.view(job).outputs is None
    with world.broker.context.read() as snapshot:
        fact = snapshot.must(JobFact, job)
    assert (fact.hardware_class, fact.threads) == ("", 0), "nothing is pinned by them"
    agent.receipt(
        run,
        durable_checkpoint=signed.id,
        durable_device_ms=signed.document.cum_device_ms,
    )
    world.settle_down()
    events = world.broker.views.events(renter.party, job).events
    assert any("names outputs as its progress" in event.detail for event in events)
    other = world.agent("bob")
    agent.die()
    world.pass_ms(30_000)
    world.settle_down()
    (first, *_) = renter.view(job).runs
    assert first.payable_device_ms == 0
    # The next one says that it has succeeded, hands nothing over, and falls silent.
    other.receipt(other.the_run, final=Reason.SUCCEEDED)
    other.die()
    world.pass_ms(60_000)
    world.settle_down()
    view = renter.view(job)
    assert (view.state, view.outputs) == (JobState.RECOVERING, None)
    world.audit()
