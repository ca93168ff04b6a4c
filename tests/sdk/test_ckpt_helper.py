"""The helper inside a job: the protocol's bytes, saves beside the loop, torn ones, and being asked
to stop."""

import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sublet_contracts import ckpt_helper
from sublet_contracts.ckpt_helper_install import helper_source, write_helper


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint folder of a job."""
    monkeypatch.setenv("SUBLET_CHECKPOINT_DIR", str(tmp_path / "checkpoint"))
    (tmp_path / "checkpoint").mkdir()
    return tmp_path / "checkpoint"


@pytest.fixture
def ckpt(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """The helper as a fresh process has it; SIGTERM is as before afterwards."""
    monkeypatch.setattr(ckpt_helper, "_state", ckpt_helper._State())
    before = signal.getsignal(signal.SIGTERM)
    yield ckpt_helper
    if ckpt_helper._state.beside is not None:
        ckpt_helper._state.beside.join()
    signal.signal(signal.SIGTERM, before)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def place(folder: Path, step: int, content: bytes = b"state") -> Path:
    """Save a step and hand it back as the agent does."""
    ckpt_helper.save(step, {"state": content}, meta={"n": step}, wait=True)
    (folder / "in").mkdir(exist_ok=True)
    return (folder / "out" / f"step-{step}").rename(folder / "in" / f"step-{step}")


@pytest.mark.usefixtures("ckpt")
def test_a_checkpoint_is_exactly_what_the_protocol_says(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "b").write_bytes(b"deep")
    (tmp_path / "single").write_bytes(b"file")
    contents = {"z": b"bytes", "sub/tree": tmp_path / "tree", "a": str(tmp_path / "single")}
    path = ckpt_helper.save(7, contents, meta={"loss": 0.5}, wait=True)
    assert path == folder / "out" / "step-7"
    files = [("a", b"file"), ("sub/tree/b", b"deep"), ("z", b"bytes")]
    done = json.loads((path / "DONE").read_text())
    times_ms = [done.pop(name) for name in ("stall_ms", "all_stall_ms", "write_ms")]
    assert all(isinstance(ms, int) and ms >= 0 for ms in times_ms)
    assert done == {
        "step": 7,
        "files": [{"path": p, "size_bytes": len(c)} for p, c in files],
        "meta": {"loss": 0.5},
        "saves": 1,
    }
    assert [(p, (path / p).read_bytes()) for p, _ in files] == files
    assert names(folder / "out") == ["step-7"]


@pytest.mark.usefixtures("ckpt", "folder")
def test_the_three_ways_to_save_write_the_same() -> None:
    def write(target: Path) -> None:
        (target / "state").write_bytes(b"x")

    with ckpt_helper.save(2) as target:
        write(target)
    first = ckpt_helper.save(1, {"state": b"x"}, wait=True)
    third = ckpt_helper.save(3, write)
    done = [json.loads((p / "DONE").read_text()) for p in (first, first.parent / "step-2", third)]
    assert [d["step"] for d in done] == [1, 2, 3]
    assert done[0]["files"] == done[1]["files"] == done[2]["files"] != []


def order_on_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """What is fsynced and renamed from now on, in that order."""
    order: list[str] = []

    def name(descriptor: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), folder)

    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda d: (order.append(name(d)), real_fsync(d)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), real_rename(a, b)))
    return order


@pytest.mark.usefixtures("ckpt")
def test_in_the_container_a_rename_makes_it_whole_and_nothing_is_fsynced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = order_on_disk(monkeypatch, folder)
    ckpt_helper.save(1, {"deep/state": b"x"}, wait=True)
    with ckpt_helper.save(2) as target:
        (target / "state").write_bytes(b"y")
    assert order == ["rename", "rename"]


@pytest.mark.usefixtures("ckpt")
def test_where_no_agent_makes_it_durable_it_is_on_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SUBLET_CHECKPOINT_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    order = order_on_disk(monkeypatch, tmp_path / ".sublet" / "checkpoint")
    ckpt_helper.save(1, {"deep/state": b"x"}, wait=True)
    tmp = "out/step-1.tmp"
    assert order == [f"{tmp}/deep/state", f"{tmp}/DONE", f"{tmp}/deep", tmp, "rename", "out"]


@pytest.mark.usefixtures("ckpt")
def test_a_save_that_fails_is_never_visible(folder: Path) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_bytes(b"x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ckpt_helper.save(1, fail)
    assert names(folder / "out") == []
    ckpt_helper.save(1, {"whole": b"y"}, wait=True)
    assert names(folder / "out" / "step-1") == ["DONE", "whole"]


KILLED = """
    import os, signal, sublet_ckpt as ckpt
    ckpt.save(1, {"state": b"one"})
    def write(target):
        (target / "state").write_bytes(b"tw")
        os.kill(os.getpid(), signal.SIGKILL)
    ckpt.save(2, write)
"""


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run a script as a job: the helper on PYTHONPATH, no site-packages (-S)."""
    helper = write_helper(tmp_path / "helper")

    def start(script: str, *flags: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *flags, "-c", textwrap.dedent(script)],
            env={"SUBLET_CHECKPOINT_DIR": str(folder), "PYTHONPATH": str(helper), "PATH": "/bin"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return start


def test_a_killed_save_leaves_only_a_tmp_and_the_next_one_replaces_it(
    folder: Path, run: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    assert run(KILLED, "-S").returncode == -signal.SIGKILL
    assert names(folder / "out") == ["step-1", "step-2.tmp"]
    again = run('import sublet_ckpt as c; c.save(2, {"state": b"two"})', "-S")
    assert again.returncode == 0, again.stderr
    assert names(folder / "out") == ["step-1", "step-2"]
    assert (folder / "out" / "step-2" / "state").read_bytes() == b"two"


@pytest.mark.usefixtures("ckpt")
def test_restore_takes_the_newest_and_gives_back_step_meta_and_files(folder: Path) -> None:
    assert ckpt_helper.restore() is None
    place(folder, 9)
    place(folder, 10, b"newest")
    ckpt_helper.save(11, {"state": b"not durable"})
    restored = ckpt_helper.restore()
    assert restored is not None
    assert (restored.step, restored.meta) == (10, {"n": 10})
    assert (restored / "state").read_bytes() == b"newest"
    assert Path(restored) == folder / "in" / "step-10"


@pytest.mark.usefixtures("ckpt")
@pytest.mark.parametrize("damage", ["truncate", "remove", "no DONE", "other step"])
def test_a_damaged_checkpoint_is_refused_by_name(folder: Path, damage: str) -> None:
    path = place(folder, 4)
    if damage == "truncate":
        (path / "state").write_bytes(b"sta")
    elif damage == "remove":
        (path / "state").unlink()
    elif damage == "no DONE":
        (path / "DONE").unlink()
    else:
        path.rename(folder / "in" / "step-5")
    with pytest.raises(ckpt_helper.CheckpointError, match=r"step-[45]"):
        ckpt_helper.restore()


@pytest.mark.usefixtures("ckpt")
@pytest.mark.parametrize("name", ["../out", "/etc/x", "a//b", "./a", "a/..", ""])
def test_names_that_lead_out_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ckpt_helper.CheckpointError, match=r"relative name"):
        ckpt_helper.save(1, {name: b"x"})
    assert names(folder / "out") == []


@pytest.mark.usefixtures("ckpt", "folder")
def test_links_pipes_and_a_done_of_ones_own_are_refused() -> None:
    for make, said in (
        (lambda d: (d / "l").symlink_to("/etc/passwd"), "l is a link"),
        (lambda d: os.mkfifo(d / "p"), "p is neither"),
        (lambda d: (d / "DONE").write_text("{}"), "DONE is the protocol's own"),
    ):
        with pytest.raises(ckpt_helper.CheckpointError, match=said):
            ckpt_helper.save(1, make)
    for step in (-1, True, 1.5):
        with pytest.raises(ckpt_helper.CheckpointError, match="step"):
            ckpt_helper.save(step, {"a": b""})  # type: ignore[arg-type]


@pytest.mark.usefixtures("ckpt")
def test_save_is_asked_once_until_it_is_asked_again(folder: Path) -> None:
    assert not ckpt_helper.should_save()
    (folder / "SAVE").touch()
    assert ckpt_helper.should_save()
    ckpt_helper.save(1, {"a": b""}, wait=True)
    assert not ckpt_helper.should_save()
    assert not (folder / "SAVE").exists()
    (folder / "SAVE").touch()
    assert ckpt_helper.should_save()


@pytest.mark.usefixtures("ckpt")
def test_a_question_that_comes_while_saving_stays_open(folder: Path) -> None:
    (folder / "SAVE").touch()
    ckpt_helper.save(1, lambda _: os.utime(folder / "SAVE", ns=(1, 1)))
    assert ckpt_helper.should_save()


@pytest.mark.usefixtures("ckpt")
def test_stop_and_term_mean_the_same(folder: Path) -> None:
    assert not ckpt_helper.should_stop()
    (folder / "STOP").touch()
    assert ckpt_helper.should_stop()
    (folder / "STOP").unlink()
    assert not ckpt_helper.should_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert ckpt_helper.should_stop()
    with pytest.raises(SystemExit) as left:
        ckpt_helper.exit_preempted()
    assert left.value.code == 75


@pytest.mark.usefixtures("ckpt")
def test_progress_is_a_whole_file_of_numbers(folder: Path) -> None:
    ckpt_helper.progress(3, 10, loss=0.5, rate=float("nan"))
    ckpt_helper.progress(4)
    said = json.loads((folder / "progress.json").read_text())
    assert said.pop("time_ms") > 0
    assert said == {"step": 4, "total": 10, "metrics": {"loss": 0.5}, "restored": False}
    assert names(folder) == ["progress.json"]


@pytest.mark.usefixtures("ckpt")
def test_it_says_that_it_has_restored_and_only_then(folder: Path) -> None:
    (folder / "in").mkdir(exist_ok=True)
    assert ckpt_helper.restore() is None
    assert not (folder / "restored").exists(), "there was nothing to restore"
    ckpt_helper.save(5, {"a": b"x"}, wait=True)
    os.rename(folder / "out" / "step-5", folder / "in" / "step-5")
    ckpt_helper.restore()
    assert (folder / "restored").exists()
    ckpt_helper.progress(6)
    assert json.loads((folder / "progress.json").read_text())["restored"] is True


@pytest.mark.usefixtures("ckpt")
def test_outside_sublet_the_same_script_resumes_from_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SUBLET_CHECKPOINT_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    ckpt_helper.progress(1, loss=0.1)
    assert names(tmp_path) == []
    assert ckpt_helper.restore() is None
    for step in range(1, 6):
        ckpt_helper.save(step, {"a": b"x"})
    restored = ckpt_helper.restore()
    assert restored is not None
    assert restored.step == 5
    assert names(tmp_path / ".sublet" / "checkpoint" / "out") == ["step-3", "step-4", "step-5"]


# -- beside the loop -----------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that takes nothing that is given as bytes until this is set."""
    ready, write = threading.Event(), ckpt_helper._write

    def slowly(path: Path, data: bytes) -> None:
        assert ready.wait(60)
        write(path, data)

    monkeypatch.setattr(ckpt_helper, "_write", slowly)
    return ready


@pytest.mark.usefixtures("ckpt")
def test_save_returns_before_the_file_is_written(folder: Path, slow_disk: threading.Event) -> None:
    changing = bytearray(b"as it was")
    path = ckpt_helper.save(1, {"state": changing, "fixed": b"bytes"})
    changing[:] = b"as it is "
    assert names(folder / "out") == ["step-1.tmp"]
    slow_disk.set()
    with pytest.raises(SystemExit):
        ckpt_helper.exit_preempted()
    assert names(folder / "out") == ["step-1"]
    assert (path / "state").read_bytes() == b"as it was"


@pytest.mark.usefixtures("ckpt", "slow_disk")
def test_what_is_asked_of_the_loop_is_answered_while_it_is_written(
    folder: Path, slow_disk: threading.Event
) -> None:
    (folder / "SAVE").touch()
    ckpt_helper.save(1, {"state": b"x"})
    assert not ckpt_helper.should_save(), "it would save again at each step"
    assert not ckpt_helper.should_stop()
    slow_disk.set()


@pytest.mark.usefixtures("ckpt")
def test_one_save_at_most_is_under_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slow_disk: threading.Event
) -> None:
    slowly, first_was_there = ckpt_helper._write, []

    def write(path: Path, data: bytes) -> None:
        if path.parent.name == "step-2.tmp":
            first_was_there.append((folder / "out" / "step-1" / "DONE").is_file())
            slow_disk.set()
        slowly(path, data)

    monkeypatch.setattr(ckpt_helper, "_write", write)
    ckpt_helper.save(1, {"state": b"one"})
    second = threading.Thread(target=ckpt_helper.save, args=(2, {"state": b"two"}))
    second.start()
    second.join(0.3)  # long enough for one that doesn't wait
    slow_disk.set()
    second.join()
    ckpt_helper.save(3, {"state": b"three"}, wait=True)
    assert set(first_was_there) == {True}
    assert names(folder / "out") == ["step-1", "step-2", "step-3"]


@pytest.mark.usefixtures("ckpt")
def test_the_stall_is_told_from_the_call_to_its_return(
    folder: Path, slow_disk: threading.Event
) -> None:
    moments_s = [time.monotonic()]

    def moment() -> None:
        moments_s.append(time.monotonic())

    def ready() -> None:
        moment()
        slow_disk.set()

    ckpt_helper.save(1, {"state": b"x"})
    moment()
    threading.Timer(0.2, ready).start()
    ckpt_helper.save(2, {"state": b"x"}, wait=True)  # which waits for the first
    moment()
    began_ms, saved_ms, ready_ms, again_ms = (1000 * s for s in moments_s)
    done = [json.loads((folder / "out" / f"step-{n}" / "DONE").read_bytes()) for n in (1, 2)]
    assert [d["saves"] for d in done] == [1, 2]
    assert done[0]["stall_ms"] <= saved_ms - began_ms + 1
    assert ready_ms - saved_ms - 150 <= done[1]["stall_ms"] <= again_ms - saved_ms + 1
    assert done[1]["all_stall_ms"] == done[0]["stall_ms"] + done[1]["stall_ms"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "call",
    [
        ckpt_helper.should_stop,
        ckpt_helper.restore,
        lambda: ckpt_helper.save(2, {"state": b"x"}),
        lambda: ckpt_helper.save(2, lambda folder: None),
    ],
)
def test_a_save_that_fails_beside_the_loop_is_told_at_the_next_call(
    ckpt: types.ModuleType, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ckpt_helper, "_write", full)
        ckpt.save(1, {"state": b"x"})
        ckpt._state.beside.join()
    assert names(ckpt.checkpoint_dir() / "out") == []
    with pytest.raises(ckpt_helper.CheckpointError, match=r"step 1 was not saved: .*No space left"):
        call()
    assert not ckpt.should_stop(), "it is told once"
    ckpt.save(1, {"state": b"x"}, wait=True)
    assert names(ckpt.checkpoint_dir() / "out") == ["step-1"]


@pytest.mark.usefixtures("folder")
def test_a_preempted_job_whose_last_save_fails_stays_resumable_and_says_why(
    ckpt: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ckpt_helper, "_write", full)
        ckpt.save(1, {"state": b"x"})
        with pytest.raises(SystemExit) as left:
            ckpt.exit_preempted()
    assert left.value.code == ckpt.EXIT_PREEMPTED
    assert "sublet: step 1 was not saved: " in capsys.readouterr().err


@pytest.mark.usefixtures("ckpt")
def test_a_file_may_change_as_soon_as_save_returns(
    folder: Path, tmp_path: Path, slow_disk: threading.Event
) -> None:
    model, deep = tmp_path / "model.pt", tmp_path / "tree"
    deep.mkdir()
    model.write_bytes(b"one")
    (deep / "shard").write_bytes(b"shard")
    path = ckpt_helper.save(1, {"model.pt": model, "tree": deep, "state": b"x"})
    model.write_bytes(b"two")
    (deep / "shard").unlink()
    slow_disk.set()
    assert ckpt_helper.restore() is None  # which waits for it
    assert (path / "model.pt").read_bytes() == b"one"
    assert (path / "tree" / "shard").read_bytes() == b"shard"
    assert (path / "model.pt").stat().st_nlink == 1


@pytest.mark.usefixtures("ckpt", "folder")
def test_a_file_that_is_written_to_while_it_is_copied_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.pt"
    model.write_bytes(b"one")
    clone = ckpt_helper._clone

    def meanwhile(source: int, copy: int) -> bool:
        model.write_bytes(b"other")
        return clone(source, copy)

    monkeypatch.setattr(ckpt_helper, "_clone", meanwhile)
    with pytest.raises(ckpt_helper.CheckpointError, match=r"model\.pt changed while"):
        ckpt_helper.save(1, {"model.pt": model})


@pytest.mark.usefixtures("ckpt", "folder")
@pytest.mark.parametrize("given", [{"a": "PIPE"}, {"DONE": b""}, {"a": b"", "a/b": b""}, {"a": 1}])
def test_what_cant_be_saved_is_told_at_once(tmp_path: Path, given: dict[str, object]) -> None:
    os.mkfifo(tmp_path / "PIPE")
    files = {k: tmp_path / v if isinstance(v, str) else v for k, v in given.items()}
    with pytest.raises((ckpt_helper.CheckpointError, OSError)):
        ckpt_helper.save(1, files)  # type: ignore[arg-type]
    assert names(ckpt_helper.checkpoint_dir() / "out") == []


# A trainer: its callback, on a folder that it has written.


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have step 4 written by a trainer, and its callback called."""
    stand_in = types.SimpleNamespace(TrainerCallback=object)
    monkeypatch.setitem(sys.modules, "transformers", stand_in)  # type: ignore[arg-type]
    callback = ckpt_helper.TrainerCallback()
    args = types.SimpleNamespace(output_dir=str(tmp_path / "trainer"))
    state = types.SimpleNamespace(global_step=4, is_world_process_zero=True)

    def on_save(content: str) -> None:
        written = tmp_path / "trainer" / "checkpoint-4"
        written.mkdir(parents=True, exist_ok=True)
        (written / "model.safetensors").write_text(content)
        callback.on_save(args, state, None)

    return on_save


@pytest.fixture
def held_copies(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Copies wait until this is set."""
    ready, copy = threading.Event(), ckpt_helper._Held.copy

    def slowly(self: ckpt_helper._Held, target: Path) -> None:
        assert ready.wait(60)
        copy(self, target)

    monkeypatch.setattr(ckpt_helper._Held, "copy", slowly)
    return ready


@pytest.mark.usefixtures("ckpt")
def test_what_a_trainer_wrote_is_copied_beside_the_loop_and_may_be_deleted(
    folder: Path, tmp_path: Path, trainer: Callable[[str], None], held_copies: threading.Event
) -> None:
    trainer("weights")
    assert names(folder / "out") == ["step-4.tmp"]
    (tmp_path / "trainer" / "checkpoint-4" / "model.safetensors").unlink()
    held_copies.set()
    assert ckpt_helper.restore() is None
    assert (folder / "out" / "step-4" / "model.safetensors").read_text() == "weights"


@pytest.mark.usefixtures("ckpt")
def test_a_step_that_a_trainer_writes_again_is_taken_anew(
    folder: Path,
    trainer: Callable[[str], None],
    held_copies: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    join = ckpt_helper._Saving.join

    def joined(self: ckpt_helper._Saving) -> None:
        held_copies.set()
        join(self)

    trainer("weights")
    monkeypatch.setattr(ckpt_helper._Saving, "join", joined)
    trainer("weights of the second time")  # over what is still to be copied
    assert ckpt_helper.restore() is None
    saved = folder / "out" / "step-4" / "model.safetensors"
    assert saved.read_text() == "weights of the second time"


@pytest.mark.usefixtures("ckpt")
def test_what_a_trainer_writes_over_before_it_was_copied_is_told(
    folder: Path,
    tmp_path: Path,
    trainer: Callable[[str], None],
    held_copies: threading.Event,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer("weights")
    (tmp_path / "trainer" / "checkpoint-4" / "model.safetensors").write_text("others!")
    held_copies.set()
    with pytest.raises(SystemExit):
        ckpt_helper.exit_preempted()
    assert "changed while it was being copied" in capsys.readouterr().err
    assert names(folder / "out") == []


# Whole processes.

Run = Callable[..., "subprocess.CompletedProcess[str]"]

SLOW = """
    import os, signal, sys, threading, time, sublet_ckpt as ckpt
    write, go = ckpt._write, os.environ["SUBLET_CHECKPOINT_DIR"] + "/go"
    def slowly(path, data):
        write(path, data[: len(data) // 2])
        print("half", flush=True)
        while not os.path.exists(go):
            time.sleep(0.01)
        write(path, data)
    ckpt._write = slowly
"""


def test_the_interpreters_end_waits_for_a_save(folder: Path, run: Run) -> None:
    script = """
    threading.Timer(0.2, lambda: open(go, "w").close()).start()
    ckpt.save(1, {"state": b"whole"})
    if FAILS:
        raise SystemExit("by an error")
    """
    for fails, step in ((False, 1), (True, 2)):
        (folder / "go").unlink(missing_ok=True)
        again = script.replace("FAILS", str(fails)).replace("save(1", f"save({step}")
        assert run(textwrap.dedent(SLOW) + textwrap.dedent(again), "-S").returncode == int(fails)
        assert (folder / "out" / f"step-{step}" / "state").read_bytes() == b"whole"


def test_a_save_that_failed_is_printed_at_the_end(folder: Path, run: Run) -> None:
    ended = run(
        """
        import resource, sublet_ckpt as ckpt
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        ckpt.save(7, {"state": bytes(5000)})
        """,
        "-S",
    )
    assert "sublet: step 7 was not saved: OSError: [Errno 27] File too large" in ended.stderr
    assert names(folder / "out") == []


def test_a_save_at_the_very_end_and_one_under_way_at_a_fork(folder: Path, run: Run) -> None:
    ended = run(
        textwrap.dedent(SLOW)
        + textwrap.dedent(
            """
            import atexit
            ckpt.save(1, {"state": b"the parent's"})
            if os.fork() == 0:
                sys.exit(0)  # nothing of this is the child's
            os.wait()
            open(go, "w").close()
            atexit.register(lambda: ckpt.save(2, {"state": b"the last"}))
            """
        ),
        "-S",
    )
    assert ended.returncode == 0, ended.stderr
    assert names(folder / "out") == ["step-1", "step-2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_killed_while_it_writes_leaves_a_step_or_none(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    script = """
    ckpt.save(1, {"state": b"whole"})
    time.sleep(600)
    """
    with started(folder, tmp_path, script) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "half\n"
        job.send_signal(number)
        assert job.wait(60) == -number
    assert names(folder / "out") == ["step-1.tmp"]


def test_a_job_that_is_asked_to_stop_while_it_writes_leaves_a_whole_step(
    folder: Path, tmp_path: Path
) -> None:
    script = """
    ckpt.should_stop()
    ckpt.save(1, {"state": b"whole"})
    while not ckpt.should_stop():
        time.sleep(0.01)
    open(go, "w").close()
    ckpt.exit_preempted()
    """
    with started(folder, tmp_path, script) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "half\n"
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == ckpt_helper.EXIT_PREEMPTED
    assert names(folder / "out") == ["step-1"]
    assert (folder / "out" / "step-1" / "state").read_bytes() == b"whole"


def started(folder: Path, tmp_path: Path, script: str) -> "subprocess.Popen[str]":
    """Start a job whose disk is slow."""
    whole = textwrap.dedent(SLOW) + textwrap.dedent(script)
    helper = write_helper(tmp_path / "helper")
    return subprocess.Popen(
        [sys.executable, "-S", "-c", whole],
        env={"SUBLET_CHECKPOINT_DIR": str(folder), "PYTHONPATH": str(helper), "PATH": "/bin"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_both_imports_work_in_an_image_without_sublet(
    run: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    done = run("import sublet_ckpt; from sublet import ckpt; assert ckpt is sublet_ckpt", "-S")
    assert done.returncode == 0, done.stderr
    done = run("import sublet.ckpt, sublet_ckpt; assert sublet.ckpt is sublet_ckpt", "-S")
    assert done.returncode == 0, done.stderr


def test_an_installed_sublet_is_not_hidden(
    tmp_path: Path, run: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    (tmp_path / "site" / "sublet").mkdir(parents=True)
    (tmp_path / "site" / "sublet" / "__init__.py").write_text("real = True\n")
    (tmp_path / "site" / "sublet" / "ckpt.py").write_text("real = True\n")
    done = run(
        f"""
        import sys; sys.path.append({str(tmp_path / "site")!r})
        import sublet
        from sublet import ckpt
        assert sublet.real and ckpt.real
        """,
        "-S",
    )
    assert done.returncode == 0, done.stderr


def test_the_helper_is_one_file_that_old_pythons_read() -> None:
    tree = ast.parse(helper_source(), feature_version=(3, 8))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"transformers"}
    at_top = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    assert "transformers" not in at_top


def test_the_sdk_and_the_container_have_the_same_helper(tmp_path: Path) -> None:
    from sublet import ckpt as from_sdk

    written = write_helper(write_helper(tmp_path / "helper"))
    assert (written / "sublet_ckpt.py").read_bytes() == Path(ckpt_helper.__file__).read_bytes()
    assert from_sdk.save is ckpt_helper.save
    of_frameworks = Path(ckpt_helper.__file__).with_name("ckpt_frameworks.py")
    assert (written / "sublet_frameworks.py").read_bytes() == of_frameworks.read_bytes()
