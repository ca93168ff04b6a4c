"""The helper inside a job: the protocol's bytes, torn saves, and being asked to stop."""

import ast
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
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
    signal.signal(signal.SIGTERM, before)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def place(folder: Path, step: int, content: bytes = b"state") -> Path:
    """Save a step and hand it back as the agent does."""
    ckpt_helper.save(step, {"state": content}, meta={"n": step})
    (folder / "in").mkdir(exist_ok=True)
    return (folder / "out" / f"step-{step}").rename(folder / "in" / f"step-{step}")


@pytest.mark.usefixtures("ckpt")
def test_a_checkpoint_is_exactly_what_the_protocol_says(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "b").write_bytes(b"deep")
    (tmp_path / "single").write_bytes(b"file")
    contents = {"z": b"bytes", "sub/tree": tmp_path / "tree", "a": str(tmp_path / "single")}
    path = ckpt_helper.save(7, contents, meta={"loss": 0.5})
    assert path == folder / "out" / "step-7"
    files = [("a", b"file"), ("sub/tree/b", b"deep"), ("z", b"bytes")]
    listed = ",".join(
        f'{{"path":"{p}","sha256":"{hashlib.sha256(c).hexdigest()}","size_bytes":{len(c)}}}'
        for p, c in files
    )
    expected = f'{{"files":[{listed}],"meta":{{"loss":0.5}},"step":7}}'
    assert (path / "DONE").read_text() == expected
    assert [(p, (path / p).read_bytes()) for p, _ in files] == files
    assert names(folder / "out") == ["step-7"]


@pytest.mark.usefixtures("ckpt", "folder")
def test_the_three_ways_to_save_write_the_same() -> None:
    def write(target: Path) -> None:
        (target / "state").write_bytes(b"x")

    with ckpt_helper.save(2) as target:
        write(target)
    first = ckpt_helper.save(1, {"state": b"x"})
    third = ckpt_helper.save(3, write)
    done = [json.loads((p / "DONE").read_text()) for p in (first, first.parent / "step-2", third)]
    assert [d["step"] for d in done] == [1, 2, 3]
    assert done[0]["files"] == done[1]["files"] == done[2]["files"] != []


@pytest.mark.usefixtures("ckpt")
def test_everything_is_on_disk_before_the_rename(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def name(descriptor: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), folder)

    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda d: (order.append(name(d)), real_fsync(d)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), real_rename(a, b)))
    ckpt_helper.save(1, {"deep/state": b"x"})
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
    ckpt_helper.save(1, {"whole": b"y"})
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
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no DONE", "other step"])
def test_a_damaged_checkpoint_is_refused_by_name(folder: Path, damage: str) -> None:
    path = place(folder, 4)
    if damage == "flip":
        (path / "state").write_bytes(b"stale")
    elif damage == "truncate":
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
    ckpt_helper.save(1, {"a": b""})
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
    ckpt_helper.save(5, {"a": b"x"})
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
