"""A machine that was started anew: what nobody had made durable on its disk is used no more."""

import pytest

from sublet_agent.core import effects, events
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.checkpoints import Stall
from sublet_agent.core.records import RunRecord, Saved
from sublet_agent.core.run_phases import RunPhase
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import CheckpointUploaded, CheckpointVerdict, Heartbeat, RunStall
from tests.agent.test_core import PROVIDER, World, only, said, terms, wanted
from tests.contracts.samples import INDEX


def found(lease_id: str, step: int) -> events.CheckpointFound:
    """A job has saved it by the protocol."""
    return events.CheckpointFound(lease_id, step, unsynced=True)


def started_again(world: World, boot: str) -> effects.Step:
    """Start the agent on what is on disk."""
    saved = Saved.model_validate_json(world.core.saved.model_dump_json())
    world.core = AgentCore(terms(), PROVIDER, saved, boot=boot)
    step, _ = world.core.started(list(saved.runs), world.now)
    world.do(events.Joined("x" * 64))
    return step


def the_record(world: World) -> RunRecord:
    return next(iter(world.core.runs.values())).record


def uploads(step: effects.Step) -> list[int]:
    return [upload.step for upload in wanted(step, effects.Upload) if upload.kind == "checkpoint"]


def test_an_agent_that_was_started_anew_alone_goes_on_with_what_is_there() -> None:
    world = World()
    lease_id = world.running()
    world.do(found(lease_id, 5))
    assert uploads(started_again(world, boot="")) == [5]


def test_what_was_on_its_way_is_not_read_again_on_a_machine_that_was_started_anew() -> None:
    world = World()
    lease_id = world.running()
    world.do(found(lease_id, 5))
    step = started_again(world, boot="another")
    assert uploads(step) == []
    (line,) = wanted(step, effects.AddLogLine)
    assert "the checkpoint of step 5" in line.text
    assert the_record(world).local_checkpoints == {}


def test_what_is_found_there_afterwards_is_not_used_either() -> None:
    world = World()
    lease_id = world.running()
    started_again(world, boot="another")
    assert uploads(world.do(found(lease_id, 5))) == []
    world.ran(lease_id, 3_000, running=False, exit_code=0)
    scanned = events.FolderScanned(lease_id, (5, 6), unsynced=(5, 6))
    assert uploads(world.do(scanned)) == []
    assert the_record(world).local_checkpoints == {}


def test_what_is_durable_off_the_machine_or_made_durable_on_it_counts() -> None:
    world = World()
    lease_id = world.running()
    uploaded = world.do(found(lease_id, 5))
    uploaded = world.do(events.Uploaded(lease_id, "checkpoint", 5, INDEX, 10))
    assert only(uploaded, CheckpointUploaded)
    world.do(events.CheckpointFound(lease_id, 6))  # noted after it was fsynced, or with hashes
    step = started_again(world, boot="another")
    assert uploads(step) == [6]
    assert not wanted(step, effects.AddLogLine)
    record = the_record(world)
    assert list(record.local_checkpoints) == [6]
    assert [awaiting.step for awaiting in record.awaiting_verdict.values()] == [5]


def test_what_the_broker_refuses_then_is_not_read_again() -> None:
    world = World()
    lease_id = world.running()
    world.do(found(lease_id, 5))
    uploaded = world.do(events.Uploaded(lease_id, "checkpoint", 5, INDEX, 10))
    started_again(world, boot="another")
    verdict = CheckpointVerdict(
        lease=lease_id,
        epoch=1,
        checkpoint=only(uploaded, CheckpointUploaded).checkpoint.id,
        kind="checkpoint",
        step=5,
        durable=False,
    )
    assert uploads(world.do(events.MessageArrived(verdict))) == []


def finished(world: World) -> str:
    """Let a job that named its outputs exit with 0; return its lease."""
    lease_id = world.running(outputs="/out")
    world.ran(lease_id, 3_000, running=False, exit_code=0)
    return lease_id


@pytest.mark.parametrize("scanned", [False, True])
def test_outputs_that_were_not_off_the_machine_are_not_taken_for_whole(scanned: bool) -> None:
    world = World()
    lease_id = finished(world)
    if scanned:
        assert kinds(world.do(events.FolderScanned(lease_id, ()))) == ["outputs"]
    step = started_again(world, boot="another")
    assert kinds(step) == []
    if not scanned:
        step = world.do(events.FolderScanned(lease_id, ()))
        assert kinds(step) == ["partial-outputs"]
    world.now += 60_000
    world.do(events.Tick())
    record = the_record(world)
    assert record.reason is Reason.RUN_VANISHED
    assert record.phase is RunPhase.ENDED
    assert record.detail == "the machine was started anew before the job's outputs were off it"


def test_what_a_job_left_without_naming_it_is_partial_then() -> None:
    world = World()
    lease_id = world.running()
    world.ran(lease_id, 3_000, running=False, exit_code=0)
    started_again(world, boot="another")
    assert kinds(world.do(events.FolderScanned(lease_id, ()))) == ["partial-outputs"]
    assert the_record(world).reason is Reason.SUCCEEDED


def test_outputs_that_were_off_it_are_the_jobs_and_are_not_read_again_if_refused() -> None:
    world = World()
    lease_id = finished(world)
    world.do(events.FolderScanned(lease_id, ()))
    sent = world.do(events.Uploaded(lease_id, "outputs", 0, INDEX, 10))
    started_again(world, boot="another")
    assert the_record(world).reason is Reason.SUCCEEDED
    verdict = CheckpointVerdict(
        lease=lease_id,
        epoch=1,
        checkpoint=only(sent, CheckpointUploaded).checkpoint.id,
        kind="outputs",
        step=0,
        durable=False,
    )
    assert kinds(world.do(events.MessageArrived(verdict))) == []


def test_outputs_are_read_again_by_an_agent_that_was_started_anew_alone() -> None:
    world = World()
    lease_id = finished(world)
    world.do(events.FolderScanned(lease_id, ()))
    assert kinds(started_again(world, boot="")) == ["outputs"]
    assert the_record(world).reason is Reason.SUCCEEDED


def kinds(step: effects.Step) -> list[str]:
    return [upload.kind for upload in wanted(step, effects.Upload)]


def test_a_run_that_had_not_started_yet_is_placed_once_more_and_saves_as_ever() -> None:
    world = World()
    lease_id, _ = world.assign(world.job())
    world.do(events.ImageReady(lease_id))
    world.do(events.Restored(lease_id))
    assert wanted(started_again(world, boot="another"), effects.Start)
    assert the_record(world).boot != world.core.boot
    step = world.do(events.Restored(lease_id))
    assert not step.effects, "its start is under way"
    assert the_record(world).phase is RunPhase.STARTING
    world.ran(lease_id, 0)
    assert uploads(world.do(found(lease_id, 5))) == [5]


def test_the_stall_is_told_to_the_broker_and_is_never_longer_than_the_run() -> None:
    world = World()
    lease_id = world.running()
    world.ran(lease_id, 10_000)
    world.do(events.StallTold(lease_id, Stall(4, 900, 200, 5_000)))
    assert stall_of(world, lease_id) == RunStall(
        saves=4, all_stall_ms=900, stall_ms=200, write_ms=5_000
    )
    world.do(events.StallTold(lease_id, Stall(4, 2**53 - 1, 2**53 - 1, 2**53 - 1)))
    assert stall_of(world, lease_id) == RunStall(
        saves=4, all_stall_ms=10_000, stall_ms=10_000, write_ms=10_000
    )


def stall_of(world: World, lease_id: str) -> RunStall | None:
    """Return what the next heartbeat says of it."""
    world.now += 3_000
    step = world.do(events.Tick())
    sent = [e.message for e in wanted(step, effects.Send) if isinstance(e.message, Heartbeat)]
    assert not said(step, Heartbeat)
    (report,) = [run for run in sent[-1].runs if run.lease == lease_id]
    return report.stall
