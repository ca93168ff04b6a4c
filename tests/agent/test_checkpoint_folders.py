"""Folders that a job named as its checkpoint: caught whole, copied aside, placed again.

The folders are the job's, which may write, delete and swap anything while the agent looks.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import signal
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sublet_agent.adapters.workspace import folder_watch
from sublet_agent.adapters.workspace.folder_snapshots import (
    Changed,
    FolderSnapshots,
    NamedFolder,
    NoRoom,
)
from sublet_agent.adapters.workspace.folder_watch import FolderWatch, Watched, Wish
from sublet_agent.adapters.workspace.open_writers import ignore_breaks
from sublet_contracts.checkpoint_folders import (
    HALVINGS_PER_INTERVAL,
    LEAST_QUIET_MS,
    QUIET_MS,
    UNKNOWN_QUIET_MS,
    FolderSnapshot,
    is_log,
    next_step,
    quiet_needed_ms,
    read_record,
)
from sublet_contracts.framework_layouts import in_the_making
from sublet_contracts.tree import ScannedTree, TreeRefused
from tests.contracts.samples import INDEX
from tests.trees import write_tree

ROOM_BYTES = 1 << 30
INTERVAL_MS = 120_000
LONG_DUE_MS = 100 * INTERVAL_MS
A_DAY_NS = 86_400 * 10**9
A_TICK_NS = 20 * 10**6
"""more than what file times are rounded to"""


@pytest.fixture(autouse=True)
def _as_in_the_reader() -> Iterator[None]:
    before = signal.getsignal(signal.SIGIO)
    ignore_breaks()
    yield
    signal.signal(signal.SIGIO, before)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return new_run(tmp_path / "run")


def new_run(root: Path) -> Path:
    (root / "work" / "ckpts").mkdir(parents=True)
    return root


class Job:
    """A run's folder on one machine, with what an agent knows of it."""

    def __init__(self, root: Path, *leave_out: str) -> None:
        self.root = root
        self.folder = root / "work" / "ckpts"
        self.places = [NamedFolder(root / "work", ("ckpts",), leave_out)]
        self.snapshots = FolderSnapshots(root, ("ckpts",))
        self.watch = FolderWatch()

    def look(self, **wish: object) -> Watched:
        given: dict[str, object] = {
            "leave_out": tuple(place.leave_out for place in self.places),
            "waited_ms": LONG_DUE_MS,
            "since_ns": self.snapshots.since_ns(),
            **wish,
        }
        try:
            top = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            return self.watch.look([None], Wish(**given))  # type: ignore[arg-type]
        try:
            return self.watch.look([top], Wish(**given))  # type: ignore[arg-type]
        finally:
            os.close(top)

    def settled(self, **wish: object) -> Watched:
        """Look until nothing is too new."""
        deadline = time.monotonic() + 30
        while (seen := self.look(**wish)).says.endswith("has just been changed"):
            assert time.monotonic() < deadline, seen
            time.sleep(LEAST_QUIET_MS / 1000)
        return seen

    def take(self, after_step: int = 0, **wish: object) -> FolderSnapshot | None:
        seen = self.settled(**wish)
        assert seen.state == "ready", seen
        step = next_step(after_step, seen.trained_step)
        return self.snapshots.take(self.places, seen, step, ROOM_BYTES)

    def moved(self, step: int, to: Path) -> Job:
        """Carry a snapshot to another machine, as its bytes go through the broker."""
        tree = self.snapshots.scan(step, ROOM_BYTES)
        assert tree is not None
        there = Job(new_run(to))
        target = to / "checkpoint" / "in" / f"step-{step}"
        write_tree(tree.index, target, tree.read_chunk)
        assert there.snapshots.place(target, step, there.places)
        assert not target.exists()
        return there

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }


def torch_file(path: Path, content: bytes) -> None:
    """Write a ZIP, as torch.save does."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)


# -- the rules -------------------------------------------------------------------------------------


def test_the_moment_of_rest_is_shorter_the_longer_a_snapshot_is_due() -> None:
    def needed(waited_ms: int) -> int:
        return quiet_needed_ms(waited_ms, INTERVAL_MS, writers_known=True)

    assert needed(0) == QUIET_MS
    halved_every_ms = INTERVAL_MS // HALVINGS_PER_INTERVAL
    assert needed(halved_every_ms - 1) == QUIET_MS
    assert needed(halved_every_ms) == QUIET_MS // 2
    assert needed(3 * halved_every_ms) == QUIET_MS // 8
    assert needed(10**9) == LEAST_QUIET_MS
    assert quiet_needed_ms(10**9, 1, writers_known=False) == UNKNOWN_QUIET_MS > QUIET_MS


@pytest.mark.parametrize(
    ("path", "log"),
    [
        ("train.log", True),
        ("logs/metrics.csv", True),
        ("runs/events.out.tfevents.1700000000.host.1.0", True),
        ("src/__pycache__/model.cpython-311.pyc", True),
        ("ckpt.pt", False),
        ("state.pkl", False),
        ("log/weights.bin", False),
        ("csv", False),
    ],
)
def test_a_log_is_told_by_its_name(path: str, log: bool) -> None:
    assert is_log(path) is log


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            [("checkpoint-20/model.safetensors", 9, 1), ("checkpoint-20/scheduler.pt", 9, 2)],
            "not th",
        ),
        ([("checkpoint-20/scheduler.pt", 9, 1), ("checkpoint-20/trainer_state.json", 0, 2)], "not"),
        (
            [
                ("a/checkpoint-20/scheduler.pt", 9, 9000),
                ("a/checkpoint-20/trainer_state.json", 9, 1),
            ],
            "older",
        ),
        ([("dcp/__0_0.distcp", 9, 1), ("dcp/__1_0.distcp", 9, 1)], "not there"),
        ([("dcp/__0_0.distcp", 9, 9000), ("dcp/.metadata", 9, 1)], "older"),
        ([("checkpoint-20/scheduler.pt", 9, 1), ("checkpoint-20/trainer_state.json", 9, 2)], ""),
        ([("dcp/__0_0.distcp", 9, 1), ("dcp/.metadata", 9, 1)], ""),
        ([("checkpoint-20/weights.pt", 9, 1)], ""),  # many call their folders so
        ([("epoch_3.pt", 9, 1)], ""),
    ],
)
def test_what_a_framework_writes_last_must_be_there(
    files: list[tuple[str, int, int]], says: str
) -> None:
    assert says in in_the_making(files)
    assert bool(in_the_making(files)) is bool(says)


def test_steps_are_counted_on_or_taken_from_a_trainer() -> None:
    assert [next_step(0, 0), next_step(7, 0), next_step(7, 200), next_step(300, 200)] == [
        1, 8, 200, 301,
    ]  # fmt: skip


# -- caught whole ----------------------------------------------------------------------------------


def test_a_folder_lies_on_the_other_machine_as_it_lay_here(root: Path, tmp_path: Path) -> None:
    job = Job(root)
    (job.folder / "deep" / "er").mkdir(parents=True)
    torch_file(job.folder / "ckpt.pt", b"one")
    (job.folder / "deep" / "er" / "state.bin").write_bytes(b"moments")
    (job.folder / "run.sh").write_text("exit 0")
    (job.folder / "run.sh").chmod(0o755)
    (job.folder / "train.log").write_text("step 1\n")
    before = job.files()
    assert (job.take() or pytest.fail("nothing")).step == 1
    there = job.moved(1, tmp_path / "there")
    assert there.files() == before
    assert os.access(there.folder / "run.sh", os.X_OK)
    assert not os.access(there.folder / "ckpt.pt", os.X_OK)
    # What was placed is not taken again as the run's own; what comes after it is.
    assert there.settled().state == "same"
    torch_file(there.folder / "ckpt.pt", b"two")
    assert (there.take(after_step=1) or pytest.fail("nothing")).step == 2


def test_what_the_folder_held_before_goes_but_for_what_is_mounted_in_it(
    root: Path, tmp_path: Path
) -> None:
    job = Job(root)
    torch_file(job.folder / "ckpt.pt", b"one")
    job.take()
    tree = job.snapshots.scan(1, ROOM_BYTES)
    assert tree is not None
    there = Job(new_run(tmp_path / "there"), "data/train.json")
    (there.folder / "old.pt").write_bytes(b"of the image")
    (there.folder / "ckpt.pt").mkdir()
    (there.folder / "data").mkdir()
    (there.folder / "data" / "train.json").write_bytes(b"")
    assert there.snapshots.place(written(tree, tmp_path / "fetched"), 1, there.places)
    assert set(there.files()) == {"ckpt.pt", "data/train.json"}
    assert there.settled().state == "same"


def written(tree: ScannedTree, target: Path) -> Path:
    write_tree(tree.index, target, tree.read_chunk)
    return target


def test_the_last_snapshot_is_known_again_after_a_restart_of_the_agent(root: Path) -> None:
    job = Job(root)
    torch_file(job.folder / "ckpt.pt", b"one")
    taken = job.take()
    again = Job(root)
    assert again.snapshots.last() == taken
    assert again.settled().state == "same"


def test_nothing_is_taken_before_it_is_due(root: Path) -> None:
    job = Job(root)
    torch_file(job.folder / "ckpt.pt", b"one")
    assert job.look(waited_ms=None).state == "noted"
    assert job.look(waited_ms=0).says == "ckpt.pt has just been changed"
    # However often it is written, it is caught once it is due for long.
    assert job.settled().state == "ready"


def test_a_file_that_is_open_for_writing_waits(root: Path) -> None:
    job = Job(root)
    with (job.folder / "state.bin").open("wb") as file:
        file.write(b"half")
        file.flush()
        assert job.look().says == "state.bin is open for writing"
    assert job.settled().state == "ready"


def test_a_file_that_is_mapped_for_writing_waits(root: Path) -> None:
    job = Job(root)
    (job.folder / "memmap.dat").write_bytes(bytes(4096))
    with (job.folder / "memmap.dat").open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4096)
    assert job.look().says == "memmap.dat is open for writing"
    mapped.close()
    assert job.settled().state == "ready"


def test_who_never_closes_a_file_gets_no_snapshot(root: Path) -> None:
    job = Job(root)
    with (job.folder / "growing.bin").open("ab", buffering=0) as file:
        for _ in range(5):
            file.write(bytes(5000))
            assert job.look().state == "busy"
    assert job.snapshots.last() is None


def test_a_log_may_be_open_and_comes_along(root: Path, tmp_path: Path) -> None:
    job = Job(root)
    with (job.folder / "train.log").open("w", buffering=1) as log:
        log.write("step 1\n")
        torch_file(job.folder / "ckpt.pt", b"one")
        assert job.take() is not None
        log.write("step 2\n")
        assert job.look().state == "same"
    assert job.moved(1, tmp_path / "there").files()["train.log"] == b"step 1\n"


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_what_only_grows_is_a_log_whatever_its_name(root: Path) -> None:
    """Else a job that grows a file for ever would be paid for ever."""
    job = Job(root)
    results = job.folder / "results.jsonl"
    for number in range(50):
        append(results, b'{"answer": %d}\n' % number)
    torch_file(job.folder / "ckpt.pt", b"one")
    first = job.take()
    assert first is not None
    for number in range(50, 53):
        append(results, b'{"answer": %d}\n' % number)
        assert job.look().state == "same"
    # It comes along with what else has changed.
    torch_file(job.folder / "ckpt.pt", b"two")
    second = job.take(after_step=1)
    assert second is not None
    sizes = [
        {f.path: f.size_bytes for f in taken.files}["results.jsonl"] for taken in (first, second)
    ]
    assert sizes[0] < sizes[1] == results.stat().st_size


def test_a_file_that_was_seen_to_grow_before_the_first_snapshot_is_a_log(root: Path) -> None:
    job = Job(root)
    for number in range(3):
        append(job.folder / "grown.bin", bytes([number]) * 3000)
        assert job.look(waited_ms=None).state == ("same" if number else "noted")
    assert job.settled().state == "same"


@pytest.mark.parametrize(
    "rewritten",
    [
        lambda n: json.dumps({"history": list(range(n))}).encode(),
        lambda n: pickle.dumps({"weights": list(range(n))}),
        lambda n: b"%09d" % n + bytes(2000 + n),
    ],
)
def test_what_is_written_anew_is_no_log_though_it_is_longer(
    root: Path, rewritten: Callable[[int], bytes]
) -> None:
    job = Job(root)
    for step in (1, 2):
        (job.folder / "state.json").write_bytes(rewritten(100 * step))
        job.look(waited_ms=None)
    (job.folder / "state.json").rename(job.folder / "state.bin")
    assert job.settled().state == "ready"


def test_the_same_content_written_anew_is_no_new_snapshot(root: Path) -> None:
    job = Job(root)
    torch_file(job.folder / "ckpt.pt", b"one")
    data = (job.folder / "ckpt.pt").read_bytes()
    job.take()
    (job.folder / "ckpt.pt").write_bytes(data)
    (job.folder / "copy.log").write_bytes(b"more")
    assert job.settled().state == "ready"
    assert job.take(after_step=1) is None
    assert job.look().state == "same"
    (job.folder / "ckpt.pt").unlink()
    assert job.look().state == "same"


def test_a_change_by_a_clock_that_was_set_back_is_seen(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(root)
    torch_file(job.folder / "ckpt.pt", b"one")
    job.take()
    torch_file(job.folder / "ckpt.pt", b"two")
    now_ns = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now_ns - A_DAY_NS)
    assert job.settled().state == "ready"


@pytest.mark.parametrize(
    ("name", "torn", "whole"),
    [
        ("optimizer.pt", b"", b"x" * 100),
        ("optimizer.pt", b"PK\x03\x04" + bytes(60), b"PK\x05\x06" + bytes(18)),
        ("moments.npz", b"PK\x03\x04" + bytes(60), b"PK\x05\x06" + bytes(18)),
        ("state.json", b'{"step": 1', b'{"step": 10}'),
        ("state.pkl", pickle.dumps([0] * 99)[:-5], pickle.dumps([0] * 99)),
        ("checkpoint-9/scheduler.pt", b"", None),
    ],
)
def test_a_torn_file_delays_the_snapshot_and_the_one_before_stays(
    root: Path, name: str, torn: bytes, whole: bytes | None
) -> None:
    job = Job(root)
    torch_file(job.folder / "ckpt.pt", b"one")
    first = job.take()
    (job.folder / name).parent.mkdir(exist_ok=True)
    (job.folder / name).write_bytes(torn)
    seen = job.settled()
    assert seen.state == "torn"
    assert seen.says.startswith(name.rpartition("/")[0] or name)
    assert job.snapshots.last() == first
    if whole is None:
        (job.folder / name).unlink()
        torch_file(job.folder / "ckpt.pt", b"two")
    else:
        (job.folder / name).write_bytes(whole)
    assert job.take(after_step=1) is not None


def test_what_lay_there_before_the_run_is_not_judged(root: Path) -> None:
    """A broken file of the image's, say, in the working folder."""
    job = Job(root)
    (job.folder / "broken.json").write_bytes(b"{")
    time.sleep(0.02)  # the filesystem's clock ticks
    begun_ns = time.time_ns()
    time.sleep(0.02)
    torch_file(job.folder / "ckpt.pt", b"one")
    assert job.settled(begun_ns=begun_ns).state == "ready"
    (job.folder / "broken.json").write_bytes(b"{{")
    assert job.settled(begun_ns=begun_ns).state == "torn"
    # Whatever the clock says of when the run began: it was seen to be written.
    assert job.settled(begun_ns=begun_ns + A_DAY_NS).state == "torn"


# -- at the end ------------------------------------------------------------------------------------


def test_once_the_run_is_over_nothing_needs_to_be_due_or_quiet(root: Path) -> None:
    job = Job(root)
    (job.folder / "state").write_bytes(b"whatever its script wants it to be")
    assert job.look(waited_ms=None, ended="by itself").state == "ready"


def test_of_who_was_killed_only_what_is_surely_whole_is_taken(root: Path) -> None:
    job = Job(root)
    (job.folder / "state").write_bytes(b"seen at rest")
    assert job.look(waited_ms=None).state == "noted"
    assert job.look(ended="killed").state == "ready"
    # Nobody knows whether the rest of this one was lost.
    (job.folder / "state").write_bytes(b"written while it was kil")
    seen = job.look(ended="killed")
    assert (seen.state, seen.says[:6]) == ("torn", "state:")
    torch_file(job.folder / "state", b"whole by its own format")
    assert job.look(ended="killed").state == "ready"


def test_a_file_that_was_open_when_its_job_was_killed_is_not_surely_whole(root: Path) -> None:
    job = Job(root)
    with (job.folder / "state").open("wb", buffering=0) as file:
        file.write(b"half of")
        assert job.look(waited_ms=None).state == "noted"
    assert job.look(ended="killed").state == "torn"
    assert job.look(ended="by itself").state == "ready"


# -- hostile folders -------------------------------------------------------------------------------


def test_what_changes_while_it_is_copied_makes_no_snapshot(root: Path) -> None:
    job = Job(root)
    torch_file(job.folder / "ckpt.pt", b"one")
    seen = job.settled()
    torch_file(job.folder / "ckpt.pt", b"two")
    with pytest.raises(Changed):
        job.snapshots.take(job.places, seen, 1, ROOM_BYTES)
    assert job.snapshots.last() is None
    assert job.snapshots.scan(1, ROOM_BYTES) is None
    assert job.take() is not None


@pytest.mark.parametrize("swapped", ["file", "folder", "the folder itself"])
def test_a_link_that_takes_somethings_place_leads_nowhere(
    root: Path, tmp_path: Path, swapped: str
) -> None:
    job = Job(root)
    (job.folder / "deep").mkdir()
    torch_file(job.folder / "deep" / "ckpt.pt", b"one")
    host = tmp_path / "host"
    seen = job.settled()
    place = {
        "file": job.folder / "deep" / "ckpt.pt",
        "folder": job.folder / "deep",
        "the folder itself": job.folder,
    }[swapped]
    place.rename(host)
    place.symlink_to(host)
    with pytest.raises(Changed):
        job.snapshots.take(job.places, seen, 1, ROOM_BYTES)
    assert job.look().state == "same"


def test_what_can_not_be_carried_is_left_out_and_named(root: Path, tmp_path: Path) -> None:
    job = Job(root)
    torch_file(job.folder / "ckpt.pt", b"one")
    (job.folder / "wide").symlink_to("x" * 2000)
    os.mkfifo(job.folder / "pipe.pt")
    (job.folder / os.fsdecode(b"\xff.pt")).write_bytes(b"x")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(job.folder / "socket"))
    seen = job.settled()
    assert (seen.state, seen.left_out) == ("ready", 4)
    assert {"wide", "pipe.pt", "socket"} < set(seen.left_out_said)
    assert job.take() is not None
    assert list(job.moved(1, tmp_path / "there").files()) == ["ckpt.pt"]


def test_links_and_empty_folders_lie_there_again(root: Path, tmp_path: Path) -> None:
    job = Job(root)
    for step in (10, 20):
        (job.folder / f"step-{step}").mkdir()
        torch_file(job.folder / f"step-{step}" / "ckpt.pt", b"%d" % step)
    (job.folder / "latest").symlink_to("step-20")
    (job.folder / "of-the-image").symlink_to("/opt/model")
    (job.folder / "samples" / "grids").mkdir(parents=True)
    assert (taken := job.take()) is not None
    assert [(link.path, link.target) for link in taken.links] == [
        ("latest", "step-20"),
        ("of-the-image", "/opt/model"),
    ]
    assert [folder.path for folder in taken.empty] == ["samples/grids"]
    there = job.moved(1, tmp_path / "there")
    assert (there.folder / "latest").readlink() == Path("step-20")
    assert (there.folder / "of-the-image").readlink() == Path("/opt/model")
    assert (there.folder / "samples" / "grids").is_dir()
    assert there.look().state == "same"


def test_a_link_does_not_take_the_place_of_what_is_mounted(root: Path, tmp_path: Path) -> None:
    job = Job(root)
    torch_file(job.folder / "ckpt.pt", b"one")
    (job.folder / "data").symlink_to("/etc")
    assert job.take() is not None
    tree = job.snapshots.scan(1, ROOM_BYTES)
    assert tree is not None
    there = Job(new_run(tmp_path / "there"), "data")
    (there.folder / "data").mkdir()
    with pytest.raises(ValueError, match=r"data is not as checkpoint-folders\.json says"):
        there.snapshots.place(written(tree, tmp_path / "fetched"), 1, there.places)
    assert not (there.folder / "data").is_symlink()


def test_a_link_that_has_just_been_changed_waits_and_alone_makes_no_snapshot(root: Path) -> None:
    job = Job(root)
    torch_file(job.folder / "a.pt", b"a")
    torch_file(job.folder / "b.pt", b"b")
    latest = job.folder / "latest"
    latest.symlink_to("a.pt")
    job.settled()
    latest.unlink()
    latest.symlink_to("b.pt")
    seen = job.look()
    assert (seen.state, seen.says) == ("busy", "a link has just been changed")
    assert (taken := job.take()) is not None
    assert [link.target for link in taken.links] == ["b.pt"]
    latest.unlink()
    latest.symlink_to("a.pt")
    assert job.look().state == "same"


def test_a_link_that_changes_while_it_is_copied_makes_no_snapshot(root: Path) -> None:
    job = Job(root)
    torch_file(job.folder / "a.pt", b"a")
    latest = job.folder / "latest"
    latest.symlink_to("a.pt")
    seen = job.settled()
    latest.unlink()
    with pytest.raises(Changed):
        job.snapshots.take(job.places, seen, 1, ROOM_BYTES)


def test_what_the_job_wrote_is_told_from_what_its_image_has(root: Path, tmp_path: Path) -> None:
    job = Job(root)
    (job.folder / "of-the-image").write_bytes(b"i")
    begun_ns = (job.folder / "of-the-image").stat().st_ctime_ns + 1
    while time.time_ns() < begun_ns + A_TICK_NS:
        time.sleep(0.001)
    torch_file(job.folder / "of-the-job", b"j")
    assert (taken := job.take(begun_ns=begun_ns)) is not None
    assert {file.path: file.written for file in taken.files} == {
        "of-the-image": False,
        "of-the-job": True,
    }
    # The next run has written neither; it's the job's nevertheless.
    there = job.moved(1, tmp_path / "there")
    begun_ns = time.time_ns() + A_TICK_NS
    while time.time_ns() < begun_ns + A_TICK_NS:
        time.sleep(0.001)
    torch_file(there.folder / "later", b"l")
    assert (taken := there.take(begun_ns=begun_ns)) is not None
    assert {file.path: file.written for file in taken.files} == {
        "later": True,
        "of-the-image": False,
        "of-the-job": True,
    }


def test_a_copy_that_does_not_fit_is_not_begun(root: Path) -> None:
    job = Job(root)
    (job.folder / "state").write_bytes(bytes(1000))
    with pytest.raises(NoRoom, match="1000 bytes, and 999 are left"):
        job.snapshots.take(job.places, job.settled(), 1, 999)
    assert not (root / "snapshots").exists()


def test_a_forest_of_files_is_not_walked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_watch, "MAX_ENTRIES", 50)
    job = Job(root)
    for number in range(60):
        (job.folder / f"folder-{number}").mkdir()
    with pytest.raises(TreeRefused, match="more than 50 files and folders"):
        job.look()


def test_a_copy_that_is_damaged_is_noticed(root: Path) -> None:
    job = Job(root)
    (job.folder / "state").write_bytes(b"whole")
    job.take()
    copy = root / "snapshots" / "step-1" / "checkpoint-folders" / "0" / "state"
    copy.write_bytes(b"spoil")
    with pytest.raises(TreeRefused, match="damaged"):
        job.snapshots.scan(1, ROOM_BYTES)


@pytest.mark.parametrize(
    "lie", ["a file is missing", "longer", "not json", "climbs", "another job"]
)
def test_a_record_that_is_not_so_is_refused(root: Path, tmp_path: Path, lie: str) -> None:
    job = Job(root)
    (job.folder / "state").write_bytes(b"whole")
    job.take()
    tree = job.snapshots.scan(1, ROOM_BYTES)
    assert tree is not None
    target = written(tree, tmp_path / "fetched")
    record, state = (
        target / "checkpoint-folders.json",
        target / "checkpoint-folders" / "0" / "state",
    )
    match lie:
        case "a file is missing":
            state.unlink()
        case "longer":
            state.write_bytes(b"longer than it was")
        case "not json":
            record.write_text("{")
        case "climbs":
            record.write_text(record.read_text().replace('"state"', '"../state"'))
        case _:
            record.write_text(record.read_text().replace('"ckpts"', '"other"'))
    there = Job(new_run(tmp_path / "there"))
    with pytest.raises(ValueError, match=r"checkpoint-folders\.json"):
        there.snapshots.place(target, 1, there.places)


def test_an_image_can_not_lead_what_is_placed_out_of_the_folder(root: Path, tmp_path: Path) -> None:
    job = Job(root)
    (job.folder / "deep").mkdir()
    (job.folder / "deep" / "state").write_bytes(b"whole")
    job.take()
    tree = job.snapshots.scan(1, ROOM_BYTES)
    assert tree is not None
    host = tmp_path / "host"
    host.mkdir()
    there = Job(new_run(tmp_path / "there"))
    there.folder.rmdir()
    there.folder.symlink_to(host)
    assert there.snapshots.place(written(tree, tmp_path / "fetched"), 1, there.places)
    assert there.files() == {"deep/state": b"whole"}
    assert list(host.iterdir()) == []


def test_a_record_is_read_as_a_strangers() -> None:
    file = {
        "folder": 0,
        "path": "a",
        "size_bytes": 1,
        "mtime_ms": 1,
        "content": INDEX,
    }
    good = {"step": 1, "trained_step": 0, "total_steps": 0, "folders": ["a"], "files": [file]}
    assert read_record(json.dumps(good).encode()).step == 1
    lies: tuple[dict[str, object], ...] = (
        {"files": [{**file, "path": "../x"}]},
        {"files": [{**file, "folder": 1}]},
        {"files": [file, file]},
        {"files": []},
        {"links": [{"folder": 0, "path": "../x", "target": "y"}]},
        {"links": [{"folder": 1, "path": "x", "target": "y"}]},
        {"links": [{"folder": 0, "path": "a", "target": "y"}]},
        {"links": [{"folder": 0, "path": "a/x", "target": "y"}]},
        {"links": [{"folder": 0, "path": "x", "target": ""}]},
        {"links": [{"folder": 0, "path": "x", "target": "y\0"}]},
        {"empty": [{"folder": 0, "path": "/x"}]},
        {
            "links": [{"folder": 0, "path": "x", "target": "/etc"}],
            "empty": [{"folder": 0, "path": "x/y"}],
        },
        {"step": -1},
        {"more": 1},
    )
    for spoilt in lies:
        with pytest.raises(ValueError, match=r"checkpoint-folders\.json"):
            read_record(json.dumps({**good, **spoilt}).encode())
