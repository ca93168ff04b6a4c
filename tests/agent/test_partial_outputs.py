"""What a run has written that did not finish: how long it is brought back, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from sublet_agent.core import effects, events
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.layout import Layout, RunFolders
from sublet_agent.core.partial_outputs import GIVE_UP_MS, LEAST_MS, FoundOutputs
from sublet_agent.core.run_phases import RunPhase
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import CheckpointUploaded, CheckpointVerdict, Order, RunChanged
from tests.agent.test_core import PROVIDER, World, receipts_of, said, terms, wanted
from tests.contracts.samples import INDEX

GRACE_MS = 60_000


def ended(world: World, *, asked: str = "", grace_ms: int = GRACE_MS, code: int = 1) -> str:
    """A run with outputs exits; return its lease."""
    lease_id = world.running(outputs="/out", stop_grace_ms=GRACE_MS)
    if asked:
        order = Order(
            lease=lease_id, epoch=1, desired="drain", reason=Reason(asked), grace_ms=grace_ms
        )
        world.do(events.MessageArrived(order))
    world.ran(lease_id, 3_000, running=False, exit_code=code)
    return lease_id


def scanned(world: World, lease_id: str, *steps: int) -> effects.Step:
    return world.do(events.FolderScanned(lease_id, steps))


def at(world: World, now_ms: int) -> None:
    """Time has passed."""
    world.now = now_ms
    world.do(events.Tick())


def phase(world: World, lease_id: str) -> RunPhase:
    return world.core.saved.runs[lease_id].phase


def test_a_failed_run_hands_over_what_it_had_written_before_its_end_is_told() -> None:
    world = World()
    lease_id = ended(world)
    (upload,) = wanted(scanned(world, lease_id), effects.Upload)
    assert (upload.kind, upload.until_ms) == ("partial-outputs", world.now + GRACE_MS)
    step = world.do(events.Uploaded(lease_id, "partial-outputs", upload.step, INDEX, 10))
    (message,) = said(step, CheckpointUploaded)
    assert not said(step, RunChanged)
    verdict = CheckpointVerdict(
        lease=lease_id, epoch=1, checkpoint=message.checkpoint.id, kind="partial-outputs",
        step=upload.step, durable=True,
    )  # fmt: skip
    step = world.do(events.MessageArrived(verdict))
    (told,) = said(step, RunChanged)
    assert (told.state, told.reason) == ("exited", Reason.JOB_FAILED)
    last = receipts_of(world)[-1]
    assert (last.durable_checkpoint, last.durable_device_ms) == (None, 0)


def test_checkpoints_go_first() -> None:
    world = World()
    lease_id = ended(world)
    (upload,) = wanted(scanned(world, lease_id, 7), effects.Upload)
    assert (upload.kind, upload.step) == ("checkpoint", 7)
    step = world.do(events.Uploaded(lease_id, "checkpoint", 7, INDEX, 10))
    assert [u.kind for u in wanted(step, effects.Upload)] == ["partial-outputs"]


@pytest.mark.parametrize(
    ("asked", "grace_ms", "lasts_ms"),
    [
        ("", 0, GRACE_MS),
        ("cancelled", GRACE_MS, GRACE_MS - 3_000),
        ("cancelled", 4_000, LEAST_MS),
        ("paused_by_renter", GRACE_MS, GRACE_MS - 3_000),
        ("reclaimed", GRACE_MS, LEAST_MS),
    ],
)
def test_how_long_it_may_take(asked: str, grace_ms: int, lasts_ms: int) -> None:
    """Until the stop's deadline, the job's own grace, and briefly where a successor waits."""
    world = World()
    lease_id = ended(world, asked=asked, grace_ms=grace_ms, code=75 if asked else 1)
    exited_ms = world.now
    (upload,) = wanted(scanned(world, lease_id), effects.Upload)
    assert upload.until_ms <= exited_ms + lasts_ms + 3_000
    assert upload.until_ms >= exited_ms + lasts_ms
    at(world, upload.until_ms + GIVE_UP_MS - 1)
    assert phase(world, lease_id) is RunPhase.FINISHING
    at(world, upload.until_ms + GIVE_UP_MS)
    assert phase(world, lease_id) is RunPhase.ENDED


def test_a_run_that_passed_its_disk_limit_gives_back_what_it_had() -> None:
    world = World()
    lease_id = world.running(outputs="/out")
    world.do(events.DiskUsed(lease_id, 2**60))
    world.ran(lease_id, 3_000, running=False, exit_code=137)
    (upload,) = wanted(scanned(world, lease_id, 7), effects.Upload)
    assert upload.kind == "partial-outputs"
    gone = events.UploadFailed(lease_id, "partial-outputs", upload.step, "", nothing=True)
    step = world.do(gone)
    (told,) = said(step, RunChanged)
    assert told.reason is Reason.DISK_LIMIT


def test_a_failed_upload_changes_nothing_about_the_end() -> None:
    world = World()
    lease_id = ended(world)
    scanned(world, lease_id)
    step = world.do(events.UploadFailed(lease_id, "partial-outputs", 0, "no room"))
    (told,) = said(step, RunChanged)
    assert told.reason is Reason.JOB_FAILED
    assert any("no room" in line.text for line in wanted(step, effects.AddLogLine))


def test_a_refused_one_is_not_sent_again() -> None:
    world = World()
    lease_id = ended(world)
    (upload,) = wanted(scanned(world, lease_id), effects.Upload)
    step = world.do(events.Uploaded(lease_id, "partial-outputs", upload.step, INDEX, 10))
    (message,) = said(step, CheckpointUploaded)
    verdict = CheckpointVerdict(
        lease=lease_id, epoch=1, checkpoint=message.checkpoint.id, kind="partial-outputs",
        step=upload.step, durable=False, detail="too much",
    )  # fmt: skip
    step = world.do(events.MessageArrived(verdict))
    assert not wanted(step, effects.Upload)
    assert said(step, RunChanged)


def test_an_agent_that_was_away_beyond_the_time_gives_it_up() -> None:
    world = World()
    lease_id = ended(world)
    scanned(world, lease_id)
    world.core = AgentCore(terms(), PROVIDER, world.core.saved)
    world.now += GRACE_MS + GIVE_UP_MS
    world.core.started([lease_id], world.now)
    at(world, world.now)
    assert phase(world, lease_id) is RunPhase.ENDED


def succeeded(world: World, **job: object) -> str:
    lease_id = world.running(stop_grace_ms=GRACE_MS, **job)
    world.ran(lease_id, 3_000, running=False, exit_code=0)
    return lease_id


def test_outputs_that_were_asked_for_take_as_long_as_it_takes() -> None:
    world = World()
    lease_id = succeeded(world, outputs="/out")
    (upload,) = wanted(scanned(world, lease_id), effects.Upload)
    assert (upload.kind, upload.until_ms) == ("outputs", 0)
    at(world, world.now + 10**7)
    assert phase(world, lease_id) is RunPhase.FINISHING
    step = world.do(events.UploadFailed(lease_id, "outputs", upload.step, "no room"))
    (told,) = said(step, RunChanged)
    assert told.reason is Reason.CHECKPOINT_INVALID


@pytest.mark.parametrize("comes", ["nothing", "no room", "verdict", "nobody answers"])
def test_what_a_job_wrote_that_named_no_folder_changes_nothing_about_its_end(comes: str) -> None:
    world = World()
    lease_id = succeeded(world)
    (upload,) = wanted(scanned(world, lease_id), effects.Upload)
    assert (upload.kind, upload.until_ms) == ("outputs", world.now + GRACE_MS)
    if comes == "nobody answers":
        world.now += GRACE_MS + GIVE_UP_MS
        step = world.do(events.Tick())
    elif comes == "verdict":
        step = world.do(events.Uploaded(lease_id, "outputs", upload.step, INDEX, 10))
        (message,) = said(step, CheckpointUploaded)
        assert not said(step, RunChanged)
        verdict = CheckpointVerdict(
            lease=lease_id, epoch=1, checkpoint=message.checkpoint.id, kind="outputs",
            step=upload.step, durable=False, detail="damaged",
        )  # fmt: skip
        step = world.do(events.MessageArrived(verdict))
        assert not wanted(step, effects.Upload)
    else:
        failed = events.UploadFailed(
            lease_id, "outputs", upload.step, "no room", nothing=comes == "nothing"
        )
        step = world.do(failed)
    (told,) = said(step, RunChanged)
    assert told.reason is Reason.SUCCEEDED


FOLDERS = RunFolders(Path("/runs/1"), Layout(work_path="/work", home_path="/home/job"))
AT_HOME = RunFolders(Path("/runs/1"), Layout(work_path="/root", home_path="/root"))


@pytest.mark.parametrize(
    ("folders", "path", "changed_ms", "wants"),
    [
        (FOLDERS, "model.pt", 1_000, True),
        (FOLDERS, "runs/1/model.pt", 5_000, True),
        (FOLDERS, "train.py", 900, False),  # the image's
        (FOLDERS, "__pycache__/train.pyc", 2_000, False),
        (FOLDERS, "lib/__pycache__/x.pyc", 2_000, False),
        (FOLDERS, ".cache/data", 2_000, True),
        (AT_HOME, ".cache/hub/model.bin", 2_000, False),
        (AT_HOME, "runs/.cache/data", 2_000, True),
        (AT_HOME, "model.pt", 2_000, True),
    ],
)
def test_what_is_found_in_the_working_folder(
    folders: RunFolders, path: str, changed_ms: int, wants: bool
) -> None:
    assert FoundOutputs(1_000, folders).wants(path, changed_ms) is wants


def test_what_a_run_before_had_written_and_saved_is_found_as_well() -> None:
    found = FoundOutputs(1_000, FOLDERS, frozenset({"epoch_1.pt", "__pycache__/x.pyc"}))
    assert found.wants("epoch_1.pt", 900)
    assert not found.wants("train.py", 900)
    assert not found.wants("__pycache__/x.pyc", 900)
