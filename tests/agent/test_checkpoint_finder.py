"""Checkpoints that a script left in its outputs folder: found whole, read whole, placed again.

The folder is the job's, which may delete, change and swap anything while the agent looks.
"""

import errno
import json
import os
import struct
import zipfile
from pathlib import Path

import pytest

from sublet_agent.adapters.workspace import outputs_search
from sublet_agent.adapters.workspace.checkpoint_finder import CheckpointFinder
from sublet_agent.adapters.workspace.outputs_search import OutputsSearch
from sublet_contracts.checkpoint_layouts import QUIET_MS, Snapshot
from sublet_contracts.tree import TreeRefused
from tests.trees import write_tree

LIMIT_BYTES = 2**30
SECONDS_AGO = 100.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return new_run(tmp_path / "run")


def new_run(root: Path) -> Path:
    (root / "outputs").mkdir(parents=True)
    return root


def torch_file(path: Path, content: bytes) -> None:
    """Write a ZIP, as torch.save does."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)


def age(path: Path, by_s: float = SECONDS_AGO) -> None:
    """Let a file, or all files of a folder, have been written `by_s` seconds ago."""
    for file in (path, *path.rglob("*")):
        at = path.stat().st_ctime - by_s
        os.utime(file, (at, at))


def save(
    root: Path, step: int, by_s: float = SECONDS_AGO, max_steps: int = 60, **said: object
) -> Path:
    """Write checkpoint-<step> as the HF Trainer does."""
    folder = root / "outputs" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights of %d" % step)
    torch_file(folder / "optimizer.pt", b"moments of %d" % step)
    torch_file(folder / "rng_state.pth", b"dice")
    state = {"global_step": step, "max_steps": max_steps, "log_history": [{"loss": 0.5}], **said}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    age(folder, by_s)
    return folder


def step_of(found: Snapshot | None) -> int | None:
    return None if found is None else found.step


def newest(
    finder: CheckpointFinder, after_step: int, *, quiet_ms: int = QUIET_MS, since_ms: int = 0
) -> Snapshot | None:
    """Search and take what is found, as the agent and its reader do between them."""
    last_step, last_mtime_ms, since_ms = finder.search_from(since_ms)
    top = os.open(finder._outputs, os.O_RDONLY)
    try:
        fresh = OutputsSearch().newest(
            top,
            after_step=max(after_step, last_step),
            last_mtime_ms=last_mtime_ms,
            quiet_ms=quiet_ms,
            since_ms=since_ms,
        )
    finally:
        os.close(top)
    if fresh is not None:
        finder.take(fresh)
    return finder.last()


def move(root: Path, step: int, to: Path) -> CheckpointFinder:
    """Carry a checkpoint to another machine's run, as its bytes go through the broker."""
    tree = CheckpointFinder(root).scan(step, LIMIT_BYTES)
    target = to / "checkpoint" / "in" / f"step-{step}"
    write_tree(tree.index, target, tree.read_chunk)
    placed = CheckpointFinder(new_run(to))
    assert placed.place(target, step)
    assert not target.exists()
    return placed


def test_a_checkpoint_lies_on_the_other_machine_as_it_lay_here(root: Path, tmp_path: Path) -> None:
    folder = save(root, 20)
    found = newest(CheckpointFinder(root), 0)
    assert step_of(found) == 20
    there = move(root, 20, tmp_path / "there")
    restored = tmp_path / "there" / "outputs" / "checkpoint-20"
    assert {f.name: f.read_bytes() for f in restored.iterdir()} == {
        f.name: f.read_bytes() for f in folder.iterdir()
    }
    # What was placed is not found again as the run's own; what comes after it is.
    assert step_of(newest(there, 20)) == 20
    save(tmp_path / "there", 30, by_s=-1)
    assert step_of(newest(there, 20, quiet_ms=-10_000)) == 30


def test_nothing_is_taken_before_it_is_quiet_or_once_the_run_is_over(root: Path) -> None:
    save(root, 20)
    save(root, 30, by_s=0)
    assert step_of(newest(CheckpointFinder(root), 0, quiet_ms=60_000)) == 20
    assert step_of(newest(CheckpointFinder(root), 0, quiet_ms=0)) == 30


def test_an_agent_that_starts_again_finds_the_same_step(root: Path) -> None:
    torch_file(root / "outputs" / "last.ckpt", b"one, optimizer_states")
    age(root / "outputs" / "last.ckpt")
    assert step_of(newest(CheckpointFinder(root), 0)) == 1
    # Killed before it had noted what it found, or after that.
    assert step_of(newest(CheckpointFinder(root), 0)) == 1
    assert step_of(newest(CheckpointFinder(root), 1)) == 1
    torch_file(root / "outputs" / "last.ckpt", b"two, optimizer_states")
    age(root / "outputs" / "last.ckpt", SECONDS_AGO / 2)
    assert step_of(newest(CheckpointFinder(root), 1)) == 2


@pytest.mark.parametrize("torn", ["trainer_state.json", "optimizer.pt"])
def test_a_checkpoint_that_a_kill_left_torn_is_passed_over(root: Path, torn: str) -> None:
    save(root, 20)
    file = save(root, 30) / torn
    file.write_bytes(file.read_bytes()[:-10])
    age(root / "outputs" / "checkpoint-30")
    assert step_of(newest(CheckpointFinder(root), 0, quiet_ms=0)) == 20


def safetensors(data_bytes: int = 64) -> bytes:
    head = json.dumps({"w": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(data_bytes)


@pytest.mark.parametrize(
    ("name", "torn", "whole"),
    [
        ("optimizer.pt", b"", b"x" * 100),  # case 15 of the cases from the world
        ("scheduler.pt", b"", b"x" * 100),
        ("scaler.pt", b"", b"x" * 100),
        ("model.safetensors", safetensors(60), safetensors()),
        ("model.safetensors", safetensors()[:20], safetensors()),
        ("config.json", b'{"layers": 1', b'{"layers": 12}'),
        ("moments.npz", b"PK\x03\x04" + bytes(60), b"PK\x05\x06" + bytes(18)),
    ],
)
def test_the_last_whole_one_stays_until_the_next_is_whole(
    root: Path, name: str, torn: bytes, whole: bytes
) -> None:
    finder = CheckpointFinder(root)
    save(root, 100, 300)
    folder = save(root, 200)
    (folder / name).write_bytes(torn)
    age(folder)
    assert step_of(newest(finder, 0)) == 100
    # It is what another machine gets, and nothing of the torn one.
    there = {file.path for file in finder.scan(100, LIMIT_BYTES).index.files}
    assert there
    assert not any("checkpoint-200" in path for path in there)
    (folder / name).write_bytes(whole)
    age(folder, 50)
    assert step_of(newest(finder, 100)) == 200


def test_a_file_that_is_still_open_for_writing_is_not_whole(root: Path) -> None:
    save(root, 100, 300)
    folder = save(root, 200)
    with (folder / "optimizer.pt").open("ab"):
        age(folder)
        assert step_of(newest(CheckpointFinder(root), 0)) == 100
    age(folder)
    assert step_of(newest(CheckpointFinder(root), 0)) == 200


def test_a_trainers_state_that_is_older_than_its_optimizer_is_not_whole(root: Path) -> None:
    """The folder is being written anew, in place."""
    save(root, 100, 300)
    folder = save(root, 200)
    age(folder / "optimizer.pt", 50)
    assert step_of(newest(CheckpointFinder(root), 0)) == 100


def test_a_file_that_is_merely_called_ckpt_is_no_checkpoint(root: Path) -> None:
    """It would be paid for, as often as it grows."""
    (root / "outputs" / "log.ckpt").write_bytes(b"step 1\n")
    (root / "outputs" / "metrics.csv").write_bytes(b"step,loss\n1,0.5\n")
    for path in (root / "outputs").iterdir():
        age(path)
    assert newest(CheckpointFinder(root), 0) is None


@pytest.mark.parametrize("name", ["last.ckpt", "state.pt", "epoch_4.pth.tar"])
def test_weights_alone_are_no_checkpoint(root: Path, name: str) -> None:
    """Nothing can be resumed from them: as torch.save writes them, without an optimizer's state."""
    torch_file(root / "outputs" / name, b"layers.0.weight")
    age(root / "outputs" / name)
    assert newest(CheckpointFinder(root), 0) is None
    torch_file(root / "outputs" / name, b"layers.0.weight, state, param_groups")
    age(root / "outputs" / name)
    assert newest(CheckpointFinder(root), 0) is not None


def distributed(root: Path, name: str, by_s: float = SECONDS_AGO) -> Path:
    """Write a checkpoint as torch.distributed does: the metadata last."""
    folder = root / "outputs" / name
    folder.mkdir()
    for rank in range(2):
        torch_file(folder / f"__{rank}_0.distcp", b"shard")
    (folder / ".metadata").write_bytes(b"\x80\x04.")
    age(folder, by_s)
    return folder


def test_a_distributed_checkpoint_is_whole_with_its_metadata(root: Path) -> None:
    finder = CheckpointFinder(root)
    folder = distributed(root, "step-40")
    metadata = (folder / ".metadata").read_bytes()
    (folder / ".metadata").unlink()
    assert newest(finder, 0) is None
    (folder / ".metadata").write_bytes(metadata)
    age(folder / ".metadata", SECONDS_AGO / 2)
    assert step_of(newest(finder, 0)) == 40
    # Written anew in place: until its metadata is, too, it is in the making.
    torch_file(folder / "__0_0.distcp", b"other")
    age(folder / "__0_0.distcp", SECONDS_AGO / 4)
    distributed(root, "step-50", SECONDS_AGO / 3)
    assert step_of(newest(finder, 40)) == 50


def test_a_record_that_a_power_cut_left_torn_is_passed_over(root: Path) -> None:
    """It would have ended the agent at each of its starts."""
    save(root, 20, 300)
    assert step_of(newest(CheckpointFinder(root), 0)) == 20
    save(root, 30)
    assert step_of(newest(CheckpointFinder(root), 20)) == 30
    (root / "layouts" / "step-30.json").write_bytes(b"")
    again = CheckpointFinder(root)
    assert step_of(again.last()) == 20
    with pytest.raises(TreeRefused, match="can't be read"):
        again.scan(30, LIMIT_BYTES)
    assert step_of(newest(again, 30)) == 31


def test_what_was_not_noted_before_the_machine_started_is_no_checkpoint(root: Path) -> None:
    """No script fsyncs what it saves: after a power cut it may be torn where nobody can tell."""
    save(root, 20, 300)
    assert step_of(newest(CheckpointFinder(root), 0)) == 20
    booted_ms = int((save(root, 30).stat().st_mtime + 10) * 1000)
    restarted = CheckpointFinder(root)
    assert step_of(newest(restarted, 20, quiet_ms=0, since_ms=booted_ms)) == 20
    save(root, 40, 50)
    assert step_of(newest(restarted, 20, quiet_ms=0, since_ms=booted_ms)) == 40


def test_a_checkpoint_is_durable_before_it_is_noted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), root)
        synced.append(name)
        if name == fails_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    fails_at = ""
    monkeypatch.setattr(os, "fsync", fsync)
    folder = "outputs/checkpoint-20"
    files = sorted(f"{folder}/{path.name}" for path in save(root, 20, 300).iterdir())
    found = CheckpointFinder(root)
    assert step_of(newest(found, 0)) == 20
    assert sorted(synced[:-1]) == sorted([*files, folder, "outputs"])
    assert synced[-1] == "layouts/new.tmp"
    save(root, 30)
    fails_at = "outputs/checkpoint-30/optimizer.pt"
    with pytest.raises(OSError, match="Input/output"):
        newest(found, 20)
    fails_at = ""
    # The kernel tells once that something was lost.
    assert step_of(newest(found, 20)) == 20


def test_the_best_checkpoint_goes_along(root: Path, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(root, step, by_s=SECONDS_AGO - step, best_global_step=10)
    assert step_of(newest(CheckpointFinder(root), 0)) == 30
    move(root, 30, tmp_path / "there")
    there = sorted((tmp_path / "there" / "outputs").iterdir(), key=lambda f: f.stat().st_mtime)
    assert [folder.name for folder in there] == ["checkpoint-10", "checkpoint-30"]


@pytest.mark.parametrize("deletes", ["a file", "all"])
def test_what_the_script_deletes_meanwhile_is_left_out(root: Path, deletes: str) -> None:
    folder = save(root, 20)
    assert step_of(newest(CheckpointFinder(root), 0)) == 20
    for file in list(folder.iterdir())[: 1 if deletes == "a file" else None]:
        file.unlink()
    with pytest.raises(TreeRefused, match="checkpoint-20"):
        CheckpointFinder(root).scan(20, LIMIT_BYTES)


def test_what_the_script_overwrites_meanwhile_is_left_out(root: Path) -> None:
    torch_file(root / "outputs" / "last.ckpt", b"one, optimizer_states")
    age(root / "outputs" / "last.ckpt")
    assert step_of(newest(CheckpointFinder(root), 0)) == 1
    torch_file(root / "outputs" / "last.ckpt", b"two, optimizer_states")
    with pytest.raises(TreeRefused, match="changed"):
        CheckpointFinder(root).scan(1, LIMIT_BYTES)


def test_a_checkpoint_beyond_the_limit_is_refused(root: Path) -> None:
    save(root, 20)
    newest(CheckpointFinder(root), 0)
    with pytest.raises(TreeRefused, match="bytes"):
        CheckpointFinder(root).scan(20, 100)


def test_links_lead_nowhere(root: Path, tmp_path: Path) -> None:
    host = new_run(tmp_path / "host")
    save(host, 20)
    (root / "outputs" / "checkpoint-20").symlink_to(host / "outputs" / "checkpoint-20")
    (root / "outputs" / "run").symlink_to(host / "outputs")
    assert newest(CheckpointFinder(root), 0) is None


def test_a_folder_that_became_a_link_is_not_read_through(root: Path, tmp_path: Path) -> None:
    host = new_run(tmp_path / "host")
    folder = save(root, 20)
    assert step_of(newest(CheckpointFinder(root), 0)) == 20
    folder.rename(host / "outputs" / "checkpoint-20")
    folder.symlink_to(host / "outputs" / "checkpoint-20")
    with pytest.raises((TreeRefused, OSError)):
        CheckpointFinder(root).scan(20, LIMIT_BYTES)


def test_pipes_and_odd_names_hold_nobody_up(root: Path) -> None:
    folder = save(root, 20)
    os.mkfifo(folder / "pipe.pt")
    (root / "outputs" / "line\nbreak.ckpt").write_bytes(b"x")
    (root / "outputs" / os.fsdecode(b"\xff.ckpt")).write_bytes(b"x")
    found = newest(CheckpointFinder(root), 0)
    assert found is not None
    assert "checkpoint-20/pipe.pt" not in {file.path for file in found.files}


def test_a_forest_of_folders_is_not_walked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs_search, "MAX_ENTRIES", 50)
    save(root, 20)
    for number in range(60):
        (root / "outputs" / f"folder-{number}").mkdir()
    with pytest.raises(TreeRefused, match="more than 50 files and folders"):
        newest(CheckpointFinder(root), 0)


def test_a_deep_tree_is_not_followed_down(root: Path) -> None:
    save(root, 20)
    folder = os.open(root / "outputs", os.O_RDONLY)
    for _ in range(200):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    assert step_of(newest(CheckpointFinder(root), 0)) == 20


@pytest.mark.parametrize("lie", ["a file is missing", "a file is longer", "not json", "climbs"])
def test_a_record_that_is_not_so_is_refused(root: Path, tmp_path: Path, lie: str) -> None:
    save(root, 20)
    newest(CheckpointFinder(root), 0)
    tree = CheckpointFinder(root).scan(20, LIMIT_BYTES)
    target = tmp_path / "there" / "step-20"
    write_tree(tree.index, target, tree.read_chunk)
    record = target / "outputs-layout.json"
    model = target / "outputs-layout" / "checkpoint-20" / "model.safetensors"
    match lie:
        case "a file is missing":
            model.unlink()
        case "a file is longer":
            model.write_bytes(b"longer than it was")
        case "not json":
            record.write_text("{")
        case _:
            record.write_text(record.read_text().replace("checkpoint-20/", "../"))
    there = CheckpointFinder(new_run(tmp_path / "there"))
    with pytest.raises(ValueError, match=r"outputs-layout\.json"):
        there.place(target, 20)


def test_a_checkpoint_by_the_protocol_stays_where_it_is(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "step-5"
    target.mkdir()
    (target / "DONE").write_text("{}")
    (target / "outputs-layout.json").write_text("the job's own")
    assert not CheckpointFinder(root).place(target, 5)
    assert (target / "DONE").exists()


def test_a_step_that_nothing_can_follow_is_said_and_ends_nothing(root: Path) -> None:
    """Another provider made it durable, or a job did with one name."""
    save(root, 20)
    with pytest.raises(TreeRefused, match="no step comes after"):
        newest(CheckpointFinder(root), 2**53 - 1)
    assert step_of(newest(CheckpointFinder(root), 2**53 - 2)) == 2**53 - 1
