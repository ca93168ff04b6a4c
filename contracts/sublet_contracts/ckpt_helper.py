"""The helper inside a job: save, restore, stop when asked. One file, standard library only.

The agent puts this very file into every container, where a script says `import sublet_ckpt as ckpt`
or `from sublet import ckpt`. It runs on Python 3.8 and newer. Outside sublet the same script works
too: its checkpoints then lie in ./.sublet/checkpoint and it resumes from them.

    restored = ckpt.restore()
    step = load(restored.path) if restored else 0
    while step < total:
        train_one_step()
        step += 1
        ckpt.progress(step, total, loss=loss)
        stop = ckpt.should_stop()  # ask once a step, so that it is saved before it stops
        if stop or ckpt.should_save() or step % 50 == 0:
            ckpt.save(step, {"state.json": state_as_bytes})
        if stop:
            ckpt.exit_preempted()

With the Trainer of Hugging Face:

    trainer.add_callback(ckpt.TrainerCallback())
    trainer.train(resume_from_checkpoint=ckpt.resume_from_checkpoint())

The protocol: write into $SUBLET_CHECKPOINT_DIR/out/step-N.tmp/, fsync all of it, write DONE (each
file's size and SHA-256), fsync, rename to out/step-N, fsync out/. So a checkpoint that can be seen
is a whole one. Files STOP and SAVE are the agent's questions; SIGTERM means the same as STOP.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Union  # noqa: UP035  (as Python 3.8 knows them)

__all__ = [
    "EXIT_PREEMPTED",
    "CheckpointError",
    "Restored",
    "TrainerCallback",
    "checkpoint_dir",
    "exit_preempted",
    "progress",
    "restore",
    "resume_from_checkpoint",
    "save",
    "should_save",
    "should_stop",
]

EXIT_PREEMPTED = 75
"""Exit code that means: stopped when asked, resumable."""

_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_KEEP_LOCAL = 3
_READ_BYTES = 1024 * 1024

Content = Union[bytes, bytearray, memoryview, str, "os.PathLike[str]"]
Writer = Callable[[Path], object]
What = Union[Mapping[str, Content], Writer]  # noqa: UP007


class CheckpointError(RuntimeError):
    """A checkpoint can't be written as asked; the message names the file and what to do."""


class Restored:
    """A checkpoint to start from: its `step`, the folder `path`, and the `meta` it was saved with.

    It can be used as a path itself: `open(restored / "state.json")`.
    """

    def __init__(self, step: int, path: Path, meta: dict[str, Any]) -> None:
        self.step = step
        self.path = path
        self.meta = meta

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __repr__(self) -> str:
        return f"Restored(step={self.step}, path={str(self.path)!r})"


class _State:
    """What one process knows."""

    def __init__(self) -> None:
        self.term = threading.Event()
        self.listening = False
        self.answered: tuple[int, int] | None = None
        self.metrics: dict[str, float] = {}
        self.total: int | None = None
        self.restored = False


_state = _State()


def checkpoint_dir() -> Path:
    """Return the folder of the protocol; outside sublet it's ./.sublet/checkpoint."""
    return Path(os.environ.get("SUBLET_CHECKPOINT_DIR") or os.path.join(".sublet", "checkpoint"))


def inside_sublet() -> bool:
    """Return whether an agent runs this."""
    return bool(os.environ.get("SUBLET_CHECKPOINT_DIR"))


# -- starting ------------------------------------------------------------------------------------


def restore() -> Restored | None:
    """Return the checkpoint to start from, checked against its hashes, or None to start afresh.

    Raises CheckpointError if there is one and it is damaged: silently starting afresh would throw
    away paid work.
    """
    here = checkpoint_dir()
    folders = [here / "in"] if inside_sublet() else [here / "in", here / "out"]
    found = [item for folder in folders for item in _steps(folder)]
    if not found:
        return None
    step, path = max(found)
    meta = _check(step, path)
    _say_restored(here)
    if not inside_sublet():
        print(f"sublet: resuming from step {step} ({path}; delete it to start afresh)", flush=True)
    return Restored(step, path, meta)


def _say_restored(here: Path) -> None:
    """Let the agent know, so that nobody is warned that the checkpoint was never opened."""
    _state.restored = True
    if not inside_sublet():
        return
    try:
        (here / "restored").touch()
    except OSError as error:
        # The folder may be read-only for this user: then it stays unknown.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def _steps(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = []
    for entry in folder.iterdir():
        match = _STEP.fullmatch(entry.name)
        if match and entry.is_dir():
            found.append((int(match.group(1)), entry))
    return found


def _check(step: int, path: Path) -> dict[str, Any]:
    done_path = path / "DONE"
    if not done_path.is_file():
        raise CheckpointError(f"{path} has no DONE: it isn't a complete checkpoint")
    try:
        done = json.loads(done_path.read_bytes().decode("utf-8"))
        listed = [(str(f["path"]), int(f["size_bytes"]), str(f["sha256"])) for f in done["files"]]
        meta, named_step = dict(done["meta"]), int(done["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{done_path} can't be read: {error!r}") from error
    if named_step != step:
        raise CheckpointError(f"{done_path} says step {named_step}, its folder says {step}")
    for relative, size_bytes, sha256 in listed:
        file = path / relative
        if not file.is_file() or file.stat().st_size != size_bytes or _sha256(file) != sha256:
            raise CheckpointError(f"{file} is missing or isn't what was saved at step {step}")
    return meta


# -- saving --------------------------------------------------------------------------------------


def save(
    step: int,
    files_or_writer: What | None = None,
    *,
    meta: Mapping[str, Any] | None = None,
) -> Any:
    """Save a checkpoint of `step`. It becomes visible whole or not at all.

    `files_or_writer` is one of
    - a mapping: name in the checkpoint -> its bytes, or the path of a file or folder to copy;
    - a function that writes into the folder it is called with;
    - left out: then `with ckpt.save(step) as folder:` and the block writes into `folder`.

    `meta` is JSON that `restore().meta` gives back. Returns the checkpoint's folder. A step that is
    already saved is left as it is. Only one process of the job may save.
    Raises CheckpointError on a link, a device or a name that leads out of the folder.
    """
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**18:
        raise CheckpointError(f"step must be a whole number that is not negative, not {step!r}")
    saving = _Saving(step, dict(meta or {}))
    if files_or_writer is None:
        return saving
    with saving as folder:
        if callable(files_or_writer):
            files_or_writer(folder)
        else:
            for name, content in files_or_writer.items():
                _put(folder, name, content)
    return saving.path


class _Saving:
    def __init__(self, step: int, meta: dict[str, Any]) -> None:
        out = checkpoint_dir() / "out"
        self.step = step
        self.path = out / f"step-{step}"
        self._tmp = out / f"step-{step}.tmp"
        self._meta = meta
        self._asked: tuple[int, int] | None = None

    def __enter__(self) -> Path:
        # Before the state is written: a SAVE that comes while we write is a new question.
        self._asked = _save_asked()
        json.dumps(self._meta, allow_nan=False)
        shutil.rmtree(str(self._tmp), ignore_errors=True)  # what a killed process left
        self._tmp.mkdir(parents=True)
        return self._tmp

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            shutil.rmtree(str(self._tmp), ignore_errors=True)
            return
        try:
            self._commit()
        except BaseException:
            shutil.rmtree(str(self._tmp), ignore_errors=True)
            raise
        _answer_save(self._asked)
        if not inside_sublet():
            for _, old in sorted(_steps(self.path.parent))[:-_KEEP_LOCAL]:
                shutil.rmtree(str(old), ignore_errors=True)

    def _commit(self) -> None:
        if (self.path / "DONE").is_file():
            shutil.rmtree(str(self._tmp))
            return
        files, folders = _walk(self._tmp)
        listed = []
        for relative in files:
            file = self._tmp / relative
            _fsync(file)
            size_bytes = file.stat().st_size
            listed.append({"path": relative, "size_bytes": size_bytes, "sha256": _sha256(file)})
        done = {"step": self.step, "files": listed, "meta": self._meta}
        text = json.dumps(done, sort_keys=True, separators=(",", ":"), allow_nan=False)
        with open(str(self._tmp / "DONE"), "wb") as target:
            target.write(text.encode("utf-8"))
            target.flush()
            os.fsync(target.fileno())
        for folder in reversed(folders):
            _fsync(folder)
        os.rename(str(self._tmp), str(self.path))
        _fsync(self.path.parent)


def _put(folder: Path, name: str, content: object) -> None:
    parts = name.split("/")
    if name.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise CheckpointError(f"{name!r} must be a relative name without '..'")
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (bytes, bytearray, memoryview)):
        target.write_bytes(bytes(content))
    elif isinstance(content, (str, os.PathLike)):
        source = Path(os.fspath(content))
        if source.is_dir():
            shutil.copytree(str(source), str(target), symlinks=True)
        else:
            shutil.copyfile(str(source), str(target))
    else:
        kind = type(content).__name__
        raise CheckpointError(f"{name}: give bytes or the path of a file, not {kind}")


def _walk(root: Path) -> tuple[list[str], list[Path]]:
    files: list[str] = []
    folders = [root]
    for folder in folders:  # grows while we go
        for entry in sorted(os.scandir(str(folder)), key=lambda item: item.name):
            relative = os.path.relpath(entry.path, str(root)).replace(os.sep, "/")
            if relative == "DONE":
                raise CheckpointError("DONE is the protocol's own file; give yours another name")
            if entry.is_symlink():
                raise CheckpointError(f"{relative} is a link; put the file itself there")
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                files.append(relative)
            else:
                raise CheckpointError(f"{relative} is neither a file nor a folder")
    return sorted(files), folders


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(str(path), "rb") as file:
        while True:
            data = file.read(_READ_BYTES)
            if not data:
                return digest.hexdigest()
            digest.update(data)


def _fsync(path: Path) -> None:
    descriptor = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- being asked ---------------------------------------------------------------------------------


def should_stop() -> bool:
    """Return whether the job should save now, then call `exit_preempted()`.

    From its first call on, SIGTERM only sets this answer and ends nothing by itself.
    """
    _listen()
    return _state.term.is_set() or (checkpoint_dir() / "STOP").exists()


def should_save() -> bool:
    """Return whether the agent would like a checkpoint at this step."""
    asked = _save_asked()
    return asked is not None and asked != _state.answered


def exit_preempted() -> None:
    """Leave with exit code 75: stopped when asked, resumable."""
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(EXIT_PREEMPTED)


def _listen() -> None:
    if _state.listening or threading.current_thread() is not threading.main_thread():
        return
    previous = signal.getsignal(signal.SIGTERM)

    def on_term(number: int, frame: Any) -> None:
        _state.term.set()
        if callable(previous):
            previous(number, frame)

    signal.signal(signal.SIGTERM, on_term)
    _state.listening = True


def _save_asked() -> tuple[int, int] | None:
    try:
        status = os.stat(str(checkpoint_dir() / "SAVE"))
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _answer_save(asked: tuple[int, int] | None) -> None:
    if asked is None:
        return
    _state.answered = asked
    if _save_asked() != asked:
        return
    try:
        os.unlink(str(checkpoint_dir() / "SAVE"))
    except OSError as error:
        # The folder may be read-only for this user; that the question is answered is remembered.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            raise


def progress(step: int, total: int | None = None, **metrics: float) -> None:
    """Tell how far the job is; the agent forwards it to the renter's progress bar and curves.

    `metrics` are numbers, such as loss=0.31. Those not given keep their last value; one that is not
    finite is left out. Writes $SUBLET_CHECKPOINT_DIR/progress.json, and nothing outside sublet.
    """
    if total is not None:
        _state.total = total
    for name, value in metrics.items():
        number = float(value)
        if math.isfinite(number):
            _state.metrics[name] = number
        else:
            _state.metrics.pop(name, None)
    if not inside_sublet():
        return
    said = {
        "step": int(step),
        "total": _state.total,
        "metrics": _state.metrics,
        "restored": _state.restored,
        "time_ms": int(time.time() * 1000),
    }
    here = checkpoint_dir()
    tmp = here / "progress.json.tmp"
    tmp.write_bytes(json.dumps(said, sort_keys=True, separators=(",", ":")).encode("utf-8"))
    os.replace(str(tmp), str(here / "progress.json"))


# -- the Trainer of Hugging Face -----------------------------------------------------------------


def resume_from_checkpoint() -> str | None:
    """Return what `trainer.train(resume_from_checkpoint=...)` wants: a folder, or None."""
    restored = restore()
    if restored is None:
        return None
    if not (restored.path / "trainer_state.json").is_file():
        raise CheckpointError(
            f"{restored.path} holds no trainer_state.json: it isn't a checkpoint of the Trainer; "
            "save with ckpt.TrainerCallback(), and without save_only_model"
        )
    return str(restored.path)


def TrainerCallback(meta: Mapping[str, Any] | None = None) -> Any:  # noqa: N802
    """Return a callback for the Trainer of Hugging Face.

    Whatever the Trainer saves becomes a checkpoint of sublet; it also saves when the agent asks,
    and it stops at the end of a step, with exit code 75, when the agent asks for that. `meta` goes
    into each checkpoint.
    """
    import transformers  # only here: the helper itself needs no library

    class SubletCallback(transformers.TrainerCallback):  # type: ignore[misc, unused-ignore]
        stopping = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _listen()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.is_world_process_zero:
                progress(state.global_step, state.max_steps)
            # A step that is also the last one is finished, not preempted.
            if should_stop() and state.global_step < state.max_steps:
                self.stopping = True
            if self.stopping or should_save():
                control.should_save = True
            return control

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            if state.is_world_process_zero:
                numbers = {
                    name: value
                    for name, value in (logs or {}).items()
                    if isinstance(value, (int, float)) and not name.startswith(("train_", "total_"))
                }
                progress(state.global_step, state.max_steps, **numbers)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                source = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                save(state.global_step, lambda folder: _take(source, folder), meta=meta)
            if self.stopping:
                print(f"sublet: asked to stop; saved step {state.global_step}", flush=True)
                exit_preempted()

    return SubletCallback()


def _take(source: Path, target: Path) -> None:
    """Copy a folder, by hard links where they work: a checkpoint of many GB is written once."""
    for entry in sorted(os.scandir(str(source)), key=lambda item: item.name):
        if entry.is_dir(follow_symlinks=False):
            (target / entry.name).mkdir()
            _take(Path(entry.path), target / entry.name)
        elif entry.is_symlink():
            raise CheckpointError(f"{entry.path} is a link; put the file itself there")
        else:
            try:
                os.link(entry.path, str(target / entry.name))
            except OSError:
                # Another file system, or one without hard links: then the bytes are copied.
                shutil.copyfile(entry.path, str(target / entry.name))
