"""What a renter sees of his checkpoints: a page at a time, with what each of them cost."""

from __future__ import annotations

import pytest

from sublet_contracts.api import CheckpointsPage
from sublet_contracts.reasons import Reason
from sublet_contracts.states import CheckpointState
from sublet_contracts.wire import RunUpload
from tests.service.world import AgentDouble, RenterDouble, World


def begun(**changes: object) -> tuple[World, AgentDouble, RenterDouble, str]:
    world = World()
    agent, renter = world.agent("alice"), world.renter()
    return world, agent, renter, renter.run(**changes)


def steps(page: CheckpointsPage) -> list[int]:
    return [c.step for c in page.checkpoints]


def test_each_tells_what_was_sent_the_stall_and_the_time_until_it_was_durable() -> None:
    world, agent, renter, job = begun()
    world.pass_ms(60_000)
    run = agent.the_run
    signed = agent.checkpoint(
        run, 5, content={"model": b"12345"}, sent_bytes=2, took_ms=4_000, stall_ms=300
    )
    (found,) = world.broker.views.checkpoints(renter.party, job).checkpoints
    assert (found.state, found.durable_after_ms) == (CheckpointState.UPLOADED, None)
    world.clock.ms += 1_500
    world.settle_down(2)
    (found,) = world.broker.views.checkpoints(renter.party, job).checkpoints
    assert (found.id, found.sent_bytes, found.total_bytes) == (signed.id, 2, 5)
    assert (found.stall_ms, found.durable_after_ms) == (300, 5_500)
    assert (found.provider, found.provider_name) == (agent.party, "alice")


def test_what_an_agent_claims_beside_its_document_is_bounded() -> None:
    world, agent, renter, job = begun()
    world.pass_ms(10_000)
    huge = 2**53 - 1
    agent.durable(
        agent.the_run, 5, content={"m": b"12345"}, sent_bytes=huge, took_ms=huge, stall_ms=huge
    )
    (found,) = world.broker.views.checkpoints(renter.party, job).checkpoints
    assert found.sent_bytes == 5
    assert found.stall_ms is not None
    assert found.stall_ms <= 10_000
    assert found.durable_after_ms is not None
    assert found.durable_after_ms <= 11_000


def test_pages_leave_none_out_however_many_came_at_once() -> None:
    world, agent, renter, job = begun()
    run = agent.the_run
    for step in range(1, 10):
        agent.checkpoint(run, step)  # three of them in each millisecond
        world.clock.ms += step % 3 == 0
    world.settle_down(2)
    look = world.broker.views.checkpoints
    everything = steps(look(renter.party, job))
    assert sorted(everything, reverse=True) == list(range(9, 0, -1))
    for limit in range(1, 11):
        seen: list[int] = []
        before_ms: int | None = None
        for _ in range(20):
            page = look(renter.party, job, before_ms=before_ms, limit=limit)
            assert page.total == 9
            seen += steps(page)
            before_ms = page.next_before_ms
            if before_ms is None:
                break
        assert sorted(seen) == list(range(1, 10)), limit


def test_a_kind_is_asked_for_by_itself() -> None:
    world, agent, renter, job = begun(outputs="/out")
    agent.durable(agent.the_run, 1)
    agent.succeed(agent.the_run, b"weights")
    world.settle_down()
    look = world.broker.views.checkpoints
    assert {c.kind for c in look(renter.party, job).checkpoints} == {"checkpoint", "outputs"}
    page = look(renter.party, job, kind="checkpoint")
    assert ({c.kind for c in page.checkpoints}, page.total) == ({"checkpoint"}, 1)
    assert look(renter.party, job, kind="nonsense").checkpoints == ()


@pytest.mark.parametrize("limit", [1, 100])
def test_it_says_where_a_resume_would_start_whatever_is_on_the_page(limit: int) -> None:
    world, agent, renter, job = begun()
    look = world.broker.views.checkpoints
    assert look(renter.party, job).resumes_from is None
    run = agent.the_run
    for step in (1, 2, 3, 4):
        world.pass_ms(3_000)
        agent.durable(run, step)
    world.pass_ms(3_000)
    agent.checkpoint(run, 9, upload=False)
    world.settle_down(2)
    page = look(renter.party, job, limit=limit)
    assert page.checkpoints[0].state is CheckpointState.REJECTED
    assert page.resumes_from is not None
    assert page.resumes_from.step == 4
    gone = next(c for c in look(renter.party, job).checkpoints if c.step == 1)
    assert (gone.kept, gone.detail) == (False, "its content is no longer kept")
    agent.exit(run, Reason.RECLAIMED, 75)
    world.settle_down()
    assert agent.the_run.lease.start_step == 4
    world.broker.jobs.cancel(renter.party, job)
    world.settle_down()
    agent.exit(agent.the_run, Reason.CANCELLED, 75)
    world.settle_down()
    assert look(renter.party, job).resumes_from is None
    world.audit()


def test_what_is_on_its_way_is_seen_until_it_is_not() -> None:
    world, agent, renter, job = begun()
    run = agent.the_run
    run.uploads = RunUpload(
        kind="checkpoint",
        step=400,
        total_bytes=4_000,
        there_bytes=1_000,
        sent_bytes=600,
        bytes_per_s=200,
        age_ms=700,
    )
    world.pass_ms(3_000)
    seen = renter.view(job).runs[-1].upload
    assert seen is not None
    assert (seen.step, seen.there_bytes, seen.left_ms) == (400, 1_000, 15_000)
    assert seen.measured_ms == world.now_ms - 700
    run.uploads = run.uploads.model_copy(update={"bytes_per_s": 0})
    world.pass_ms(3_000)
    stalled = renter.view(job).runs[-1].upload
    assert stalled is not None
    assert stalled.left_ms is None
    run.uploads = None
    world.pass_ms(3_000)
    assert renter.view(job).runs[-1].upload is None


def test_what_has_arrived_is_not_on_its_way_whatever_the_last_heartbeat_said() -> None:
    world, agent, renter, job = begun()
    run = agent.the_run
    figures = {"total_bytes": 5, "there_bytes": 4, "sent_bytes": 4, "bytes_per_s": 1, "age_ms": 0}
    for step in (1, 2):
        run.uploads = RunUpload.model_validate({"kind": "checkpoint", "step": step, **figures})
        world.pass_ms(3_000)
    agent.checkpoint(run, 1)
    assert renter.view(job).runs[-1].upload is not None
    agent.checkpoint(run, 2)
    assert renter.view(job).runs[-1].upload is None
