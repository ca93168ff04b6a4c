"""What a job wrote is read by processes that can do nothing else, and keeps nobody waiting."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sublet_agent.adapters.workspace import folder_reader, folders
from sublet_agent.adapters.workspace import reader as reader_program
from sublet_agent.adapters.workspace.folder_reader import (
    FolderBusy,
    FolderReader,
    FolderRefused,
    ReaderBroken,
)
from sublet_agent.adapters.workspace.reader import MAX_DEPTH, MAX_OUT_ENTRIES, Look, TooMuch, usage
from sublet_contracts.checkpoint_layouts import Snapshot

JOB = (65532, 65532)
LIMIT_BYTES = 1 << 40
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="the agent becomes nobody else")


@pytest.fixture
async def reader() -> AsyncIterator[FolderReader]:
    reader = FolderReader()
    yield reader
    reader.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run's folders, handed over as the Docker runner does it."""
    root = tmp_path / "run"
    for name in ("checkpoint/in", "checkpoint/out", "checkpoint/ack", "outputs"):
        (root / name).mkdir(parents=True)
    hand_over(root)
    tmp_path.chmod(0o700)  # closed to the job's user, as an agent's state is
    yield root
    folders.delete(root)


def hand_over(root: Path) -> None:
    for path in (root / "checkpoint", root / "outputs"):
        folders.hand_over(path, *JOB)


def a_step(run: Path, step: int) -> None:
    folder = run / "checkpoint" / "out" / f"step-{step}"
    folder.mkdir()
    (folder / "DONE").write_text("{}")


async def searched(reader: FolderReader, run: Path, after_step: int = 0) -> Snapshot | None:
    return await reader.search(
        "run", run / "outputs", after_step=after_step, last_mtime_ms=-1, quiet_ms=0, since_ms=0
    )


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def pid_of(reader: FolderReader, lane: folder_reader.Lane) -> int:
    process = reader._lanes[lane]._process
    assert process is not None
    return process.pid


async def test_a_look_shows_steps_progress_and_who_saves(reader: FolderReader, run: Path) -> None:
    assert await reader.look(run / "checkpoint") == Look()
    for step in (7, 5):
        a_step(run, step)
    (run / "checkpoint" / "out" / "step-9.tmp").mkdir()
    (run / "checkpoint" / "progress.json").write_text(
        '{"step": 7, "total": 9, "metrics": {"loss": 0.5}}'
    )
    hand_over(run)
    look = await reader.look(run / "checkpoint")
    assert look == Look((5, 7), True, (7, 9, {"loss": 0.5}))


@as_root
async def test_a_reader_is_the_jobs_user_and_can_do_nothing_else(
    reader: FolderReader, run: Path
) -> None:
    await reader.look(run / "checkpoint")
    await reader.usage(run / "checkpoint", [run / "outputs"], LIMIT_BYTES)
    lanes: tuple[folder_reader.Lane, ...] = ("look", "walk")
    for pid in (pid_of(reader, lane) for lane in lanes):
        about = proc(pid, "status")
        fields = dict(line.split(":\t", 1) for line in about.splitlines() if ":\t" in line)
        assert fields["Uid"].split() == [str(JOB[0])] * 4
        assert fields["Gid"].split() == [str(JOB[1])] * 4
        assert fields["Groups"].split() == []
        assert {int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapInh")} == {0}
        assert fields["NoNewPrivs"].strip() == "1"
        limits = proc(pid, "limits").splitlines()
        bounds = {line[:26].strip(): line[26:].split()[:2] for line in limits}
        assert bounds["Max file size"] == ["0", "0"]
        assert bounds["Max processes"] == ["0", "0"]
        assert int(bounds["Max address space"][0]) <= 1 << 30
        assert int(bounds["Max open files"][0]) < 512


async def test_what_is_no_file_where_one_is_expected(reader: FolderReader, run: Path) -> None:
    progress = run / "checkpoint" / "progress.json"
    progress.mkdir()
    assert (await reader.look(run / "checkpoint")).progress is None
    progress.rmdir()
    os.mkfifo(progress)
    assert (await reader.look(run / "checkpoint")).progress is None
    progress.unlink()
    progress.symlink_to("/etc/passwd")
    assert (await reader.look(run / "checkpoint")).progress is None
    (run / "checkpoint" / "out").rmdir()
    (run / "checkpoint" / "out").write_text("a file")
    assert (await reader.look(run / "checkpoint")).steps == ()


async def test_a_checkpoint_folder_that_is_gone_or_a_link(reader: FolderReader, run: Path) -> None:
    a_step(run, 5)
    os.rename(run / "checkpoint", run / "elsewhere")
    assert await reader.look(run / "checkpoint") == Look()
    (run / "checkpoint").symlink_to(run / "elsewhere")
    assert await reader.look(run / "checkpoint") == Look()
    assert await reader.usage(run / "checkpoint", [run / "outputs"], LIMIT_BYTES) == 0


async def test_far_too_many_steps_are_the_jobs_own_doing(reader: FolderReader, run: Path) -> None:
    for step in range(MAX_OUT_ENTRIES):
        (run / "checkpoint" / "out" / f"step-{step}").mkdir()
    hand_over(run)
    assert (await reader.look(run / "checkpoint")).steps == ()
    a_step(run, MAX_OUT_ENTRIES)
    hand_over(run)
    with pytest.raises(FolderRefused, match=f"more than {MAX_OUT_ENTRIES} entries"):
        await reader.look(run / "checkpoint")


async def test_what_is_closed_is_measured_all_the_same(reader: FolderReader, run: Path) -> None:
    hidden = run / "outputs" / "a" / "b"
    hidden.mkdir(parents=True)
    (hidden / "weights").write_bytes(b"w" * 1_000_000)
    a_step(run, 5)
    hand_over(run)
    for path in (hidden, hidden.parent, run / "outputs", run / "checkpoint" / "out"):
        path.chmod(0)
    (run / "checkpoint").chmod(0)
    assert await reader.usage(run / "checkpoint", [run / "outputs"], LIMIT_BYTES) > 1_000_000
    assert (await reader.look(run / "checkpoint")).steps == (5,)


async def test_usage_counts_what_is_on_disk_once(reader: FolderReader, run: Path) -> None:
    empty = await reader.usage(run / "checkpoint", [run / "outputs"], LIMIT_BYTES)
    (run / "outputs" / "one").write_bytes(b"w" * 1_000_000)
    for number in range(20):
        os.link(run / "outputs" / "one", run / "outputs" / f"link-{number}")
    with (run / "outputs" / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    (run / "outputs" / "everything").symlink_to("/")
    hand_over(run)
    used = await reader.usage(run / "checkpoint", [run / "outputs"], LIMIT_BYTES)
    assert 1_000_000 <= used - empty < 1_100_000
    assert await reader.usage(run / "checkpoint", [run / "outputs"], 4096) < used


async def test_who_goes_too_deep_is_told(reader: FolderReader, run: Path) -> None:
    folder = os.open(run / "outputs", os.O_RDONLY)
    for _ in range(2 * MAX_DEPTH):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.chown(below, *JOB) if os.geteuid() == 0 else None
        os.close(folder)
        folder = below
    os.close(folder)
    with pytest.raises(FolderRefused, match=f"more than {MAX_DEPTH} deep"):
        await reader.usage(run / "checkpoint", [run / "outputs"], LIMIT_BYTES)
    assert await searched(reader, run) is None
    assert folders.delete(run)


async def test_a_search_ends_at_a_bound_and_at_the_last_step(
    reader: FolderReader, run: Path
) -> None:
    save = run / "outputs" / "checkpoint-20"
    save.mkdir()
    (save / "model.safetensors").write_bytes(b"weights")
    (save / "trainer_state.json").write_text(json.dumps({"global_step": 20, "max_steps": 60}))
    (save / "optimizer.pt").write_bytes(b"moments")
    hand_over(run)
    found = await searched(reader, run)
    assert found is not None
    assert (found.step, found.total_steps) == (20, 60)
    # Another provider said that this step was durable; nothing can follow it.
    with pytest.raises(FolderRefused, match="no step comes after"):
        await searched(reader, run, after_step=2**53 - 1)
    assert await searched(reader, run, after_step=2**53 - 2) is not None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGXCPU])
async def test_a_reader_that_is_killed_is_started_again(
    reader: FolderReader, run: Path, number: signal.Signals
) -> None:
    await reader.look(run / "checkpoint")
    os.kill(pid_of(reader, "look"), signal.SIGSTOP)
    asked = asyncio.create_task(reader.look(run / "checkpoint"))
    await asyncio.sleep(0.1)
    os.kill(pid_of(reader, "look"), number)
    os.kill(pid_of(reader, "look"), signal.SIGCONT)
    # The kernel's limit on processor time is the job's doing; of a kill nobody knows.
    with pytest.raises(FolderRefused if number is signal.SIGXCPU else FolderBusy):
        await asked
    assert await reader.look(run / "checkpoint") == Look()


async def test_no_answer_in_time_is_a_busy_machine(
    reader: FolderReader, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await reader.look(run / "checkpoint")
    before = pid_of(reader, "look")
    os.kill(before, signal.SIGSTOP)
    monkeypatch.setitem(folder_reader.ANSWER_S, "look", 0.2)
    with pytest.raises(FolderBusy):
        await reader.look(run / "checkpoint")
    monkeypatch.undo()
    assert await reader.look(run / "checkpoint") == Look()
    assert pid_of(reader, "look") != before


async def test_a_question_that_is_given_up_does_not_answer_the_next(
    reader: FolderReader, run: Path
) -> None:
    a_step(run, 5)
    hand_over(run)
    other = run.parent / "other"
    (other / "checkpoint" / "out").mkdir(parents=True)
    folders.hand_over(other / "checkpoint", *JOB)
    await reader.look(other / "checkpoint")
    os.kill(pid_of(reader, "look"), signal.SIGSTOP)
    asked = asyncio.create_task(reader.look(run / "checkpoint"))
    await asyncio.sleep(0.1)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert (await reader.look(other / "checkpoint")).steps == ()


async def test_a_mistake_of_the_readers_is_told_with_where_it_was(
    reader: FolderReader, run: Path
) -> None:
    with (
        folder_reader._at_hand(run / "checkpoint") as found,
        pytest.raises(ReaderBroken, match="unknown question"),
    ):
        await reader._lanes["look"].ask({"do": "odd"}, found)


async def test_a_wide_tree_keeps_no_other_run_waiting(reader: FolderReader, run: Path) -> None:
    """Walking has a process of its own: the looks go on beside it."""
    (run / "outputs" / "file").write_bytes(b"x" * 100_000)
    hand_over(run)
    await reader.look(run / "checkpoint")
    await reader.usage(run / "checkpoint", [run / "outputs"], 0)
    os.kill(pid_of(reader, "walk"), signal.SIGSTOP)
    walk = asyncio.create_task(reader.usage(run / "checkpoint", [run / "outputs"], LIMIT_BYTES))
    for _ in range(5):
        await reader.look(run / "checkpoint")
    assert not walk.done()
    os.kill(pid_of(reader, "walk"), signal.SIGCONT)
    assert await walk >= 100_000


async def test_the_loop_goes_on_whatever_a_job_has_written(reader: FolderReader, run: Path) -> None:
    """Step folders beyond the bound, thousands of files, a nest: read over and over, beside a loop
    that beats.

    The processor time that the loop's own thread takes for it says more than a clock on a machine
    where others work, too; tests/chaos/odd_jobs.py holds the clock against a bare loop's.
    """
    for step in range(MAX_OUT_ENTRIES + 1_000):
        os.mkdir(run / "checkpoint" / "out" / f"step-{step}")
    for number in range(5):
        folder = run / "outputs" / f"folder-{number}"
        folder.mkdir()
        for name in range(1000):
            (folder / f"file-{name}").touch()
    folder = run / "outputs" / "nest"
    for _ in range(100):
        folder = folder / "d"
    folder.mkdir(parents=True)
    hand_over(run)
    longest_s = 0.0
    ended = asyncio.Event()

    async def beat() -> None:
        nonlocal longest_s
        before_s = time.thread_time()
        while not ended.is_set():
            await asyncio.sleep(0)
            now_s = time.thread_time()
            longest_s = max(longest_s, now_s - before_s)
            before_s = now_s

    beating = asyncio.create_task(beat())
    for _ in range(3):
        with pytest.raises(FolderRefused):
            await reader.look(run / "checkpoint")
        used = await reader.usage(run / "checkpoint", [run / "outputs"], LIMIT_BYTES)
        assert used >= 10_000 * 4096
        assert await searched(reader, run) is None
    ended.set()
    await beating
    assert longest_s < 0.2


def test_whatever_a_job_has_left_is_deleted(tmp_path: Path) -> None:
    root = tmp_path / "run"
    deep = root / "deep"
    deep.mkdir(parents=True)
    folder = os.open(deep, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    (root / "closed" / "inner").mkdir(parents=True)
    (root / "closed" / "inner" / "file").write_text("x")
    os.mkfifo(root / "pipe")
    (root / "link").symlink_to("/etc")
    os.mkdir(os.fsencode(root) + b"/\xff\xfe")
    (root / "closed" / "inner").chmod(0)
    (root / "closed").chmod(0)
    root.chmod(stat.S_IXUSR)
    assert folders.delete(root)
    assert not root.exists()
    assert folders.delete(root)  # gone is gone
    (tmp_path / "link").symlink_to("/etc")
    assert folders.delete(tmp_path / "link")
    assert Path("/etc/passwd").exists()


def test_more_files_than_anybody_is_to_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_program, "MAX_ENTRIES", 50)
    for number in range(51):
        (tmp_path / f"{number}").touch()
    top = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(TooMuch, match="more than 50 files and folders"):
        usage([top])
    (tmp_path / "0").unlink()
    assert usage([top]) == 50 * 4096
    os.close(top)
