"""What a running job can put into its folders; the agent reads nothing of the host through it."""

import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from sublet_agent.adapters.workspace import folders
from sublet_agent.adapters.workspace.folder_reader import FolderReader
from sublet_agent.adapters.workspace.input_cache import InputCache
from sublet_agent.adapters.workspace.layout_file import LAYOUT, write_layout
from sublet_agent.adapters.workspace.transfer import Transfer
from sublet_agent.adapters.workspace.workspace import CheckpointLost, Workspace
from sublet_agent.core.checkpoints import Stall
from sublet_agent.core.layout import Layout
from sublet_contracts.documents import Checkpoint
from sublet_contracts.tree import TreeRefused, WhyLeftOut
from tests.agent.test_core import BROKER, NOW, PROVIDER, World
from tests.contracts.samples import INDEX

SECRET = b"root:x:0:0"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    world = World()
    lease_id = world.running(outputs="/out")
    made = Workspace(tmp_path / "state", world.core.runs[lease_id].record)
    made.make()
    return made


@pytest.fixture
async def reader() -> AsyncIterator[FolderReader]:
    reader = FolderReader()
    yield reader
    reader.close()


async def at_once(call: Callable[..., Any], *arguments: Any) -> Any:
    return call(*arguments)


async def search(workspace: Workspace, reader: FolderReader) -> int | None:
    """Look for what a script left in its outputs, once it has exited."""
    look = await workspace.look(reader)
    return await workspace.search_outputs(reader, look, at_once, exited=True)


def save(out: Path, step: int, content: bytes = b"weights", **more: object) -> Path:
    folder = out / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(content)
    entry = {"path": "model.bin", "size_bytes": len(content)}
    done = {"step": step, "files": [entry], "meta": {"loss": 0.5}}
    (folder / "DONE").write_text(json.dumps(done | more))
    return folder


async def test_a_whole_checkpoint_is_read(workspace: Workspace, reader: FolderReader) -> None:
    save(workspace.checkpoint / "out", 5)
    assert (await workspace.look(reader)).steps == (5,)
    tree = workspace.scan_checkpoint(5)
    assert [file.path for file in tree.index.files] == ["DONE", "model.bin"]


def test_a_checkpoint_that_is_not_as_done_says_is_refused(workspace: Workspace) -> None:
    folder = save(workspace.checkpoint / "out", 5)
    for content in (b"weight", b"weighty weights"):
        (folder / "model.bin").write_bytes(content)
        with pytest.raises(TreeRefused, match=r"model\.bin is not as DONE says"):
            workspace.scan_checkpoint(5)
    (folder / "model.bin").write_bytes(b"weights")
    (folder / "more.bin").write_bytes(b"")
    with pytest.raises(TreeRefused, match=r"more\.bin is not as DONE says"):
        workspace.scan_checkpoint(5)


def test_what_done_says_of_the_stall_is_read(workspace: Workspace) -> None:
    said = {"saves": 3, "all_stall_ms": 900, "stall_ms": 200, "write_ms": 4_000}
    save(workspace.checkpoint / "out", 5, **said)
    workspace.scan_checkpoint(5)
    assert workspace.stall == Stall(**said)


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"saves": 1, "all_stall_ms": 1, "stall_ms": 1},
        {"saves": 1, "all_stall_ms": -1, "stall_ms": 1, "write_ms": 1},
        {"saves": 1, "all_stall_ms": 1.5, "stall_ms": 1, "write_ms": 1},
        {"saves": True, "all_stall_ms": 1, "stall_ms": 1, "write_ms": 1},
        {"saves": 1, "all_stall_ms": 10**30, "stall_ms": 1, "write_ms": 1},
        {"saves": 0, "all_stall_ms": 1, "stall_ms": 1, "write_ms": 1},
        {"saves": [1], "all_stall_ms": {}, "stall_ms": "1", "write_ms": None},
    ],
)
def test_a_checkpoint_counts_whatever_it_says_of_the_stall(
    workspace: Workspace, said: dict[str, object]
) -> None:
    save(workspace.checkpoint / "out", 5, **said)
    assert len(workspace.scan_checkpoint(5).index.files) == 2
    assert workspace.stall is None


@pytest.mark.parametrize(
    "done",
    [
        b'{"step": 5, "files": [{"path": "~\\ud800", "sha256": "", "size_bytes": 0}]}',
        b'{"step": 5, "files": []}' + b" " * 100_000 + b"\xff",
        b'{"step": ' + b"9" * 4_300 + b', "files": []}',
    ],
)
def test_why_a_done_is_refused_can_be_told(workspace: Workspace, done: bytes) -> None:
    folder = workspace.checkpoint / "out" / "step-5"
    folder.mkdir(parents=True)
    (folder / "DONE").write_bytes(done)
    with pytest.raises(TreeRefused) as refused:
        workspace.scan_checkpoint(5)
    assert len(str(refused.value).encode()) < 1_000


def test_an_out_folder_that_became_a_link_leads_nowhere(
    workspace: Workspace, tmp_path: Path
) -> None:
    host = tmp_path / "host"
    save(host, 5, SECRET)
    (workspace.checkpoint / "out").rmdir()
    (workspace.checkpoint / "out").symlink_to(host)
    with pytest.raises((TreeRefused, OSError)):
        workspace.scan_checkpoint(5)


@pytest.mark.parametrize("name", ["model.bin", "DONE"])
def test_a_link_in_a_checkpoint_is_refused(workspace: Workspace, tmp_path: Path, name: str) -> None:
    folder = save(workspace.checkpoint / "out", 5)
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    with pytest.raises(TreeRefused):
        workspace.scan_checkpoint(5)


async def test_a_pipe_does_not_hold_the_agent_up(
    workspace: Workspace, reader: FolderReader
) -> None:
    folder = save(workspace.checkpoint / "out", 5)
    (folder / "DONE").unlink()
    os.mkfifo(folder / "DONE")
    os.mkfifo(workspace.checkpoint / "progress.json")
    assert (await workspace.look(reader)).steps == ()
    with pytest.raises(TreeRefused):
        workspace.scan_checkpoint(5)
    assert (await workspace.look(reader)).progress is None


def test_outputs_carry_no_link(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    (workspace.outputs / "weights").symlink_to(tmp_path / "secret")
    (workspace.outputs / "model").write_bytes(b"mine")
    index = workspace.scan_outputs().index
    assert [file.path for file in index.files] == ["model"]
    (left_out,) = index.left_out
    assert (left_out.path, left_out.why) == ("weights", WhyLeftOut.LINK)
    assert str(tmp_path) not in left_out.detail


def test_an_infinite_step_is_refused(workspace: Workspace) -> None:
    folder = save(workspace.checkpoint / "out", 5)
    (folder / "DONE").write_text('{"step": Infinity, "files": [], "meta": {}}')
    with pytest.raises(TreeRefused):
        workspace.scan_checkpoint(5)


async def test_nothing_of_the_host_is_deleted_through_a_link(
    workspace: Workspace, reader: FolderReader, tmp_path: Path
) -> None:
    host = tmp_path / "host"
    save(host, 5)
    (workspace.checkpoint / "out").rmdir()
    (workspace.checkpoint / "out").symlink_to(host)
    assert (await workspace.look(reader)).steps == ()
    workspace.delete_steps((5,))
    assert (host / "step-5" / "model.bin").exists()


def test_a_pipe_in_place_of_an_acknowledgement_holds_nobody_up(workspace: Workspace) -> None:
    os.mkfifo(workspace.checkpoint / "ack" / "step-5")
    workspace.acknowledge(5)
    workspace.acknowledge(6)
    assert (workspace.checkpoint / "ack" / "step-6").exists()


def trainer_checkpoint(outputs: Path, step: int, total: int = 60) -> None:
    folder = outputs / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "optimizer.pt").write_bytes(b"moments")
    (folder / "trainer_state.json").write_text(
        json.dumps({"global_step": step, "max_steps": total})
    )


async def test_a_trainers_checkpoint_is_found_and_told_as_progress(
    workspace: Workspace, reader: FolderReader
) -> None:
    trainer_checkpoint(workspace.outputs, 20)
    assert await search(workspace, reader) == 20
    assert workspace.progress(await workspace.look(reader)) == (20, 60, {})
    files = {file.path for file in workspace.scan_checkpoint(20).index.files}
    assert "outputs-layout/checkpoint-20/model.safetensors" in files


async def test_a_job_that_saves_by_the_protocol_is_not_saved_twice(
    workspace: Workspace, reader: FolderReader
) -> None:
    save(workspace.checkpoint / "out", 20)
    trainer_checkpoint(workspace.outputs, 20)
    assert await search(workspace, reader) is None


async def test_exit_0_when_asked_to_stop_is_believed_of_who_can_mean_it(
    workspace: Workspace, reader: FolderReader
) -> None:
    assert not workspace.finished(await workspace.look(reader))
    trainer_checkpoint(workspace.outputs, 20)
    await search(workspace, reader)
    assert not workspace.finished(await workspace.look(reader))
    trainer_checkpoint(workspace.outputs, 60)
    await search(workspace, reader)
    assert workspace.finished(await workspace.look(reader))


async def test_exit_0_is_believed_of_a_job_that_uses_the_protocol(
    workspace: Workspace, reader: FolderReader
) -> None:
    (workspace.checkpoint / "progress.json").write_text('{"step": 3, "total": 0}')
    assert workspace.finished(await workspace.look(reader))


async def test_a_bottomless_folder_is_over_any_limit_and_can_be_deleted(
    workspace: Workspace, reader: FolderReader
) -> None:
    folder = os.open(workspace.outputs, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    assert folders.usage([workspace.outputs]) > 2**50
    assert await search(workspace, reader) is None
    workspace.delete()
    assert not workspace.root.exists()


async def test_old_steps_are_deleted(workspace: Workspace, reader: FolderReader) -> None:
    save(workspace.checkpoint / "out", 5)
    workspace.delete_steps((5,))
    assert (await workspace.look(reader)).steps == ()


async def test_all_that_a_run_writes_counts_as_its_disk(
    tmp_path: Path, reader: FolderReader
) -> None:
    """Its working folder, HOME and /tmp as well; of its renter's caches what it adds to them."""
    world = World()
    asked = {"devices": 1, "device_kind": "any", "memory_bytes": 1, "disk_bytes": 10**9}
    lease_id = world.running(outputs="/out", resources=asked)
    workspace = Workspace(tmp_path / "state", world.core.runs[lease_id].record)
    workspace.make()
    before = await workspace.usage(reader)
    for name in ("work", "home", "tmp", "outputs"):
        (workspace.root / name / "big").write_bytes(b"x" * 100_000)
    used = await workspace.usage(reader)
    assert 400_000 <= used - before < 450_000
    cache = workspace.state / "cache"
    cache.mkdir()
    (cache / "old").write_bytes(b"x" * 300_000)
    write_layout(workspace.root / LAYOUT, Layout(cache_dir=str(cache), cache_bytes=303_104))
    (cache / "new").write_bytes(b"x" * 50_000)
    again = Workspace(workspace.state, workspace.record)
    assert 40_000 <= await again.usage(reader) - used < 60_000
    assert workspace.delete()
    assert not any(workspace.root.parent.iterdir())


@pytest.mark.parametrize("step", [10**15 - 1, 2**53 - 1])
def test_a_step_after_which_none_can_be_told_is_not_restored(
    workspace: Workspace, step: int
) -> None:
    """Another provider made it durable, at a broker that takes such a one: this run ends by it, as
    one whose checkpoint is lost; nothing is fetched."""
    record = workspace.record
    document = Checkpoint(
        provider=PROVIDER.party,
        job=record.job_id,
        lease="e" * 64,
        epoch=1,
        kind="checkpoint",
        step=step,
        index_digest=INDEX,
        total_bytes=10,
        cum_device_ms=1,
        image="",
        issued_ms=NOW,
    )
    met = Workspace(workspace.state, record.model_copy(update={"checkpoint": document}))
    nobody = Transfer("http://nowhere", PROVIDER, lambda: BROKER.party, lambda: NOW)
    with pytest.raises(CheckpointLost, match=f"step {step}: nothing that is saved after it"):
        met.restore(
            nobody,
            InputCache(workspace.state, 0, links=False),
            threading.Event(),
            lambda: Layout(work_path="/w", home_path="/h"),
        )
    nobody.close()
