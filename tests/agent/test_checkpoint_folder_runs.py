"""Runs of jobs that named a folder as their checkpoint: what is taken, told, and paid for."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from sublet_agent.adapters.workspace import folders
from sublet_agent.adapters.workspace.folder_reader import FolderReader
from sublet_agent.adapters.workspace.folder_snapshots import NamedFolder
from sublet_agent.adapters.workspace.reader import Look
from sublet_agent.adapters.workspace.workspace import BY_PROTOCOL, FoldersSeen, Workspace
from sublet_agent.core import effects, events
from sublet_agent.core.folders_at_rest import Ended
from sublet_agent.core.layout import WORK_PATH, Layout, RunFolders
from sublet_agent.core.runner_port import RunRefused
from sublet_contracts.wire import CheckpointUploaded
from tests.agent.test_core import World, only, wanted
from tests.contracts.samples import INDEX

JOB = (65532, 65532)
AT_ONCE_MS = 10**9
"""due for so long that hardly any rest is needed"""
LIMIT_S = 30


@pytest.fixture
async def reader() -> AsyncIterator[FolderReader]:
    reader = FolderReader()
    yield reader
    reader.close()


async def at_once(call: Callable[..., Any], *arguments: Any) -> Any:
    return call(*arguments)


class Run:
    """A run's folders as its agent has them, and its record in the core."""

    def __init__(self, state: Path, **job: Any) -> None:
        self.world = World()
        resources = {
            **{"devices": 1, "device_kind": "any", "memory_bytes": 1},
            "disk_bytes": job.pop("disk_bytes", 10**9),
        }
        given = {"checkpoints": ("ckpts",), "resources": resources, **job}
        self.lease_id = self.world.running(**given)
        self.record = self.world.core.runs[self.lease_id].record
        self.state = state
        self.workspace = Workspace(state, self.record)
        self.workspace.make()
        self.folder = self.workspace.root / "work" / "ckpts"
        self.folder.mkdir()
        state.chmod(0o700)  # closed to the job's user
        self.hand_over()

    def hand_over(self) -> None:
        # As the Docker runner does it: one user for all, or the reader would begin anew each time.
        for name in ("work", "checkpoint"):
            folders.hand_over(self.workspace.root / name, *JOB)

    def write(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)
        self.hand_over()

    async def look(
        self,
        reader: FolderReader,
        *,
        waited_ms: int | None = AT_ONCE_MS,
        ended: Ended = "",
        look: Look | None = None,
    ) -> FoldersSeen:
        """Look until nothing is too new."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            seen = await self.workspace.search_folders(
                reader, look or Look(), at_once, waited_ms=waited_ms, ended=ended
            )
            if not seen.says.endswith("has just been changed"):
                return seen
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)

    def told(self, seen: FoldersSeen) -> int:
        assert seen.step is not None
        self.world.do(events.CheckpointFound(self.lease_id, seen.step, age_ms=seen.age_ms))
        return seen.step


async def test_a_folder_is_taken_once_and_again_when_it_has_changed(
    tmp_path: Path, reader: FolderReader
) -> None:
    run = Run(tmp_path / "state")
    run.write("state.bin", b"one")
    assert await run.look(reader, waited_ms=None) == FoldersSeen()
    assert run.told(await run.look(reader)) == 1
    assert not (await run.look(reader)).due
    run.write("state.bin", b"two")
    # One copy at a time is under way; at the end of the run there may be two.
    assert (await run.look(reader)).step is None
    assert run.record.uploading is not None
    assert run.told(await run.look(reader, ended="by itself")) == 2
    tree = run.workspace.scan_checkpoint(2)
    assert {file.path for file in tree.index.files} == {
        "checkpoint-folders.json",
        "checkpoint-folders/0/state.bin",
    }
    assert run.workspace.progress(Look()) == (2, 0, {})


async def test_who_saves_by_the_protocol_has_no_folders_saved(
    tmp_path: Path, reader: FolderReader
) -> None:
    run = Run(tmp_path / "state")
    run.write("state.bin", b"one")
    seen = await run.look(reader, look=Look(steps=(5,), by_protocol=True))
    assert seen == FoldersSeen(due=False, says=BY_PROTOCOL)


async def test_a_copy_counts_against_the_jobs_disk(tmp_path: Path, reader: FolderReader) -> None:
    run = Run(tmp_path / "state", disk_bytes=600_000)
    before = await run.workspace.usage(reader)
    run.write("state.bin", os.urandom(100_000))
    assert (await run.look(reader)).step == 1
    assert await run.workspace.usage(reader) - before > 200_000
    run.write("state.bin", os.urandom(300_000))
    seen = await run.look(reader, ended="by itself")
    assert seen.step is None
    assert "ask for more with --disk" in seen.says
    run.workspace.delete_steps((1,))
    assert await run.workspace.usage(reader) - before < 400_000
    assert (await run.look(reader, ended="by itself")).step is None  # 300 kB twice are too much


async def test_what_an_agent_took_and_told_nobody_is_told_by_the_next(
    tmp_path: Path, reader: FolderReader
) -> None:
    run = Run(tmp_path / "state")
    run.write("state.bin", b"one")
    assert (await run.look(reader)).step == 1
    again = Workspace(run.state, run.record)
    seen = await again.search_folders(reader, Look(), at_once, waited_ms=None)
    assert seen.step == 1
    run.told(seen)
    assert (await again.search_folders(reader, Look(), at_once, waited_ms=None)).step is None


async def test_steps_go_on_from_where_the_job_was(tmp_path: Path, reader: FolderReader) -> None:
    run = Run(tmp_path / "state")
    (run.folder / "checkpoint-40").mkdir()
    run.write("checkpoint-40/model.safetensors", b"x" * 100)
    run.write("checkpoint-40/optimizer.pt", b"moments")
    run.write("checkpoint-40/trainer_state.json", b'{"global_step": 40, "max_steps": 60}')
    assert run.told(await run.look(reader)) == 40
    assert run.workspace.progress(Look()) == (40, 60, {})
    assert not run.workspace.finished(Look())
    run.write("other.bin", b"more")
    run.record.uploading = None
    assert run.told(await run.look(reader, ended="by itself")) == 41


def test_a_snapshot_is_paid_up_to_its_newest_change(tmp_path: Path) -> None:
    run = Run(tmp_path / "state")
    run.world.ran(run.lease_id, 50_000)
    run.world.do(events.CheckpointFound(run.lease_id, 1, age_ms=30_000))
    uploaded = run.world.do(events.Uploaded(run.lease_id, "checkpoint", 1, INDEX, 10))
    assert wanted(uploaded, effects.Upload) == []
    assert only(uploaded, CheckpointUploaded)
    assert run.record.local_checkpoints == {1: 20_000}
    # Never less than what counted before, nor more than the run has had.
    run.world.do(events.CheckpointFound(run.lease_id, 2, age_ms=10**9))
    run.world.do(events.CheckpointFound(run.lease_id, 3, age_ms=-(10**9)))
    # Step 1 waits for the broker's verdict, 3 is the newest.
    assert run.record.local_checkpoints == {1: 20_000, 2: 20_000, 3: 50_000}


def test_only_the_newest_copy_and_those_under_way_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path / "state")
    run.world.do(events.CheckpointFound(run.lease_id, 1))
    run.world.do(events.CheckpointFound(run.lease_id, 2))
    step = run.world.do(events.CheckpointFound(run.lease_id, 3))
    assert wanted(step, effects.DeleteSteps) == [effects.DeleteSteps(run.lease_id, (2,))]
    assert sorted(run.record.local_checkpoints) == [1, 3]


def test_a_copy_that_is_durable_is_let_go(tmp_path: Path) -> None:
    run = Run(tmp_path / "state")
    step = run.world.durable(run.lease_id, 1)
    assert effects.DeleteSteps(run.lease_id, (1,)) in wanted(step, effects.DeleteSteps)
    # What was counted so far is known all the same.
    assert sorted(run.record.local_checkpoints) == [1]


# -- where they are --------------------------------------------------------------------------------


def test_a_folder_lies_where_the_job_sees_it(tmp_path: Path) -> None:
    run = Run(
        tmp_path / "state",
        checkpoints=("ckpts", "/out/best", "/state", "/tmp/spill", "/home/job/.cache/x"),
        outputs="/out",
        inputs=({"destination": "/state/data", "kind": "folder", "index_digest": INDEX,
                 "total_bytes": 1},),
    )  # fmt: skip
    root = run.workspace.root
    assert run.workspace.named_folders == [
        NamedFolder(root / "work", ("ckpts",)),
        NamedFolder(root / "outputs", ("best",)),
        NamedFolder(root / "saved-2", (), ("data",)),
        NamedFolder(root / "tmp", ("spill",)),
        NamedFolder(root / "home", (".cache", "x")),
    ]


def test_the_working_folder_itself_is_named_without_what_is_mounted_in_it(tmp_path: Path) -> None:
    run = Run(
        tmp_path / "state",
        checkpoints=(".",),
        outputs=f"{WORK_PATH}/out",
        inputs=({"destination": f"{WORK_PATH}/data.json", "kind": "file", "index_digest": INDEX,
                 "total_bytes": 1},),
    )  # fmt: skip
    root = run.workspace.root
    assert run.workspace.named_folders == [NamedFolder(root / "work", (), ("data.json", "out"))]


def test_a_folder_below_an_input_is_refused_with_the_fix(tmp_path: Path) -> None:
    run = Run(
        tmp_path / "state",
        checkpoints=("data/ckpts",),
        inputs=({"destination": f"{WORK_PATH}/data", "kind": "folder", "index_digest": INDEX,
                 "total_bytes": 1},),
    )  # fmt: skip
    with pytest.raises(RunRefused, match="--checkpoint data/ckpts: the command can't write there"):
        _ = run.workspace.named_folders


def test_a_folder_of_its_own_is_mounted_only_where_no_other_is() -> None:
    paths = ("/a", f"{WORK_PATH}/b", "c", "/tmp", "/out/d")
    run = RunFolders(Path("/r"), Layout(), "/out", checkpoint_paths=paths)
    assert run.mounts() == {
        "/out": Path("/r/outputs"),
        "/work": Path("/r/work"),
        "/home/job": Path("/r/home"),
        "/tmp": Path("/r/tmp"),
        "/a": Path("/r/saved-0"),
    }
