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

`save` takes what it is given and returns; bytes are written beside the loop. At most one save is
under way: the next one waits for it, and so do `exit_preempted()` and the end of the interpreter.
If it fails, the next call of `save`, `should_stop` or `restore` raises that; if there is none, it
is printed at the end, and by `exit_preempted`. What it costs in memory: `bytes` are kept until they
are written, and not copied; a bytearray or memoryview is copied, so that it may change at once.

The protocol: write into $SUBLET_CHECKPOINT_DIR/out/step-N.tmp/, then DONE in it (the step, each
file's path and size, `meta`), and rename it to out/step-N. So a checkpoint that can be seen is a
whole one. Nothing is hashed or fsynced here: what counts is durable off this machine, and that is
the agent's work, which also never uses what a machine's restart may have torn. Files STOP and SAVE
are the agent's questions; SIGTERM means the same as STOP.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import stat
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
_COPY_BYTES = 1024 * 1024
_MAX_OPEN = 256
_FICLONE = 0x40049409
_NO_CLONE = (
    errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM,
    errno.EISDIR, errno.ETXTBSY, errno.EBADF,
)  # fmt: skip

Content = Union[bytes, bytearray, memoryview, str, "os.PathLike[str]"]
Writer = Callable[[Path], object]
What = Union[Mapping[str, Content], Writer]  # noqa: UP007


class CheckpointError(RuntimeError):
    """A checkpoint can't be written as asked; the message names the file and what to do."""


class _Changed(CheckpointError):
    """A file was written to while it was being copied."""


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
        self.beside: _Saving | None = None
        """the save that is written beside the loop, or was and nobody has asked since"""
        self.saves = 0
        self.stall_ms = 0
        """for how long all saves have held the loop"""


_state = _State()


def _in_a_child() -> None:
    """A forked child has none of its parent's threads, and no part in its saves."""
    _state.beside = None


os.register_at_fork(after_in_child=_in_a_child)


def checkpoint_dir() -> Path:
    """Return the folder of the protocol; outside sublet it's ./.sublet/checkpoint."""
    return Path(os.environ.get("SUBLET_CHECKPOINT_DIR") or os.path.join(".sublet", "checkpoint"))


def inside_sublet() -> bool:
    """Return whether an agent runs this."""
    return bool(os.environ.get("SUBLET_CHECKPOINT_DIR"))


# -- starting ------------------------------------------------------------------------------------


def restore() -> Restored | None:
    """Return the checkpoint to start from, or None to start afresh.

    Its files are checked against the sizes that DONE says; what is in them the agent has compared
    with their hashes when it put them there. Raises CheckpointError if there is one and it is
    damaged: silently starting afresh would throw away paid work.
    """
    _settle()
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
        listed = [(str(f["path"]), int(f["size_bytes"])) for f in done["files"]]
        meta, named_step = dict(done["meta"]), int(done["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{done_path} can't be read: {error!r}") from error
    if named_step != step:
        raise CheckpointError(f"{done_path} says step {named_step}, its folder says {step}")
    for relative, size_bytes in listed:
        file = path / relative
        if not file.is_file() or file.stat().st_size != size_bytes:
            raise CheckpointError(f"{file} is missing or isn't what was saved at step {step}")
    return meta


# -- saving --------------------------------------------------------------------------------------


def save(
    step: int,
    files_or_writer: What | None = None,
    *,
    meta: Mapping[str, Any] | None = None,
    wait: bool = False,
) -> Any:
    """Save a checkpoint of `step`. It becomes visible whole or not at all.

    `files_or_writer` is one of
    - a mapping: name in the checkpoint -> its bytes, or the path of a file or folder. Bytes are
      written after this has returned. Files are copied before it returns, so that they may change
      at once: by the file system (reflink) where it can, which waits only for what of them isn't on
      disk yet. They are never linked: the job could still write into them.
    - a function that writes into the folder it is called with, before this returns;
    - left out: then `with ckpt.save(step) as folder:` and the block writes into `folder`.

    `meta` is JSON that `restore().meta` gives back. `wait=True` returns only once the checkpoint is
    there. Returns the checkpoint's folder. A step that is already saved is left as it is. Only one
    process of the job may save. A save waits for the one before, if that is still being written.
    Raises CheckpointError on a link, a device, a name that leads out of the folder or a file that
    changes while it is copied, and if the save before has failed.
    """
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**18:
        raise CheckpointError(f"step must be a whole number that is not negative, not {step!r}")
    saving = _Saving(step, dict(meta or {}), wait)
    if files_or_writer is None:
        return saving
    with saving as folder:
        if callable(files_or_writer):
            files_or_writer(folder)
        else:
            saving.take(files_or_writer)
    return saving.path


class _Saving:
    """One save, from the call to the rename."""

    def __init__(self, step: int, meta: dict[str, Any], wait: bool) -> None:
        # Absolute: a script may go to another folder while it is written.
        out = Path(os.path.abspath(str(checkpoint_dir() / "out")))
        self.step = step
        self.path = out / f"step-{step}"
        self.error: BaseException | None = None
        """why it failed, where that was beside the loop"""
        self._tmp = out / f"step-{step}.tmp"
        self._meta = json.loads(json.dumps(meta, allow_nan=False))  # as it is at the call
        self._wait = wait
        # Outside sublet nobody else makes it durable, so there it is fsynced, beside the loop.
        self._durable_here = not inside_sublet()
        self._asked: tuple[int, int] | None = None
        self._later: list[tuple[Path, bytes | _Held]] = []
        """what is to be written beside the loop"""
        self._found: tuple[list[str], list[Path]] | None = None
        self._thread: threading.Thread | None = None
        self._returned = threading.Event()
        self._stall_ms = 0
        self._began_s = self._write_began_s = 0.0

    def __enter__(self) -> Path:
        self._began_s = time.monotonic()
        _settle(instead=self.step)
        # Before the state is written: a SAVE that comes while we write is a new question.
        self._asked = _save_asked()
        shutil.rmtree(str(self._tmp), ignore_errors=True)  # what a killed process left
        self._tmp.mkdir(parents=True)
        self._write_began_s = time.monotonic()
        return self._tmp

    def take(self, files: Mapping[str, object]) -> None:
        """Take what is to be saved: files now, bytes later."""
        for name, content in files.items():
            target = _target(self._tmp, name)
            if isinstance(content, (bytes, bytearray, memoryview)):
                open(str(target), "xb").close()  # a name that can't be written is told at once
                # Those that are bytes already are not copied: nobody can change them.
                self._later.append((target, bytes(content)))
            elif isinstance(content, (str, os.PathLike)):
                source = os.fspath(content)
                if os.path.isdir(source):
                    target.mkdir()
                    for given, copy in _in_folder(source, target):
                        _copy_now(given, copy)
                else:
                    _copy_now(source, target)
            else:
                kind = type(content).__name__
                raise CheckpointError(f"{name}: give bytes or the path of a file, not {kind}")

    def take_written(self, source: str) -> None:
        """Take a folder that a framework has written, and writes no more: its files are held open,
        so that they may be deleted at once, and copied beside the loop."""
        files = _in_folder(source, self._tmp)
        for given, copy in files[_MAX_OPEN:]:
            _copy_now(given, copy)
        for given, copy in files[:_MAX_OPEN]:
            self._later.append((copy, _Held(given)))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is not None:
                self._drop()
                return
            self._go_on()
        finally:
            self._returned.set()

    def _drop(self) -> None:
        self._let_go()
        shutil.rmtree(str(self._tmp), ignore_errors=True)

    def _let_go(self) -> None:
        """Of what was to be written: it may take much memory."""
        for _, content in self._later:
            if isinstance(content, _Held):
                content.close()
        self._later = []

    def _go_on(self) -> None:
        try:
            if not self._later:
                self._found = _walk(self._tmp)  # here, so that what is wrong is told at once
        except BaseException:
            self._drop()
            raise
        if not self._wait and (self._later or self._durable_here) and self._start():
            # Answered already: else the loop would save again at its next step.
            _state.answered = self._asked or _state.answered
            self._count_stall()
            return
        self._write_out(beside=False)

    def _start(self) -> bool:
        """Begin to write beside the loop. False: the interpreter ends, and starts no thread."""
        # No daemon: at its end the interpreter waits for it.
        thread = threading.Thread(target=self._beside, name=f"sublet-save-{self.step}")
        self._thread, _state.beside = thread, self
        try:
            thread.start()
        except RuntimeError:
            self._thread = _state.beside = None
            return False
        return True

    def _beside(self) -> None:
        try:
            self._write_began_s = time.monotonic()
            self._write_out(beside=True)
        except BaseException as error:  # noqa: BLE001 - whatever it is, who asks next is told
            self.error = error

    def _count_stall(self) -> None:
        self._stall_ms = _ms_since(self._began_s)
        _state.saves += 1
        _state.stall_ms += self._stall_ms

    def join(self) -> None:
        """Wait until it is written, or has failed."""
        if self._thread is not None:
            self._thread.join()

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not well."""
        return self.error is not None

    def says(self) -> str:
        """Why it failed, in words."""
        return f"step {self.step} was not saved: {type(self.error).__name__}: {self.error}"

    def _write_out(self, *, beside: bool) -> None:
        try:
            self._commit(beside=beside)
        except BaseException:
            self._drop()
            raise
        self._let_go()
        _answer_save(self._asked)
        if self._durable_here:
            for _, old in sorted(_steps(self.path.parent))[:-_KEEP_LOCAL]:
                shutil.rmtree(str(old), ignore_errors=True)

    def _commit(self, *, beside: bool) -> None:
        for target, content in self._later:
            if isinstance(content, _Held):
                content.copy(target)
            else:
                _write(target, content)
        files, folders = self._found or _walk(self._tmp)
        if (self.path / "DONE").is_file():
            shutil.rmtree(str(self._tmp))
            return
        listed = []
        for relative in files:
            file = self._tmp / relative
            if self._durable_here:
                _fsync(file)
            listed.append({"path": relative, "size_bytes": file.stat().st_size})
        write_ms = _ms_since(self._write_began_s)
        if beside:
            self._returned.wait()
        else:
            self._count_stall()
        done = {
            "step": self.step,
            "files": listed,
            "meta": self._meta,
            "saves": _state.saves,
            "stall_ms": self._stall_ms,
            "all_stall_ms": _state.stall_ms,
            "write_ms": write_ms,
        }
        text = json.dumps(done, sort_keys=True, separators=(",", ":"), allow_nan=False)
        _write(self._tmp / "DONE", text.encode("utf-8"))
        if self._durable_here:
            _fsync(self._tmp / "DONE")
            for folder in reversed(folders):
                _fsync(folder)
        os.rename(str(self._tmp), str(self.path))
        if self._durable_here:
            _fsync(self.path.parent)


def _settle(instead: int | None = None) -> None:
    """Wait for the save that is under way. Raises CheckpointError: it has failed. `instead`: the
    step that is saved now. A framework that writes a step once more has changed what was being
    copied, and what it has written now is taken instead."""
    saving = _state.beside
    if saving is None:
        return
    saving.join()
    if saving.step == instead and isinstance(saving.error, _Changed):
        _state.beside = None
    _raise_failed()


def _raise_failed() -> None:
    """Raises CheckpointError: the save that was written beside the loop has failed."""
    saving = _state.beside
    if saving is not None and saving.failed:
        _state.beside = None
        raise CheckpointError(saving.says()) from saving.error


def _say_failed() -> None:
    """At the end of the interpreter: what nobody has asked about is printed."""
    saving = _state.beside
    if saving is None:
        return
    saving.join()
    if saving.failed:
        print(f"sublet: {saving.says()}", file=sys.stderr, flush=True)


atexit.register(_say_failed)


def _ms_since(began_s: float) -> int:
    return max(0, round((time.monotonic() - began_s) * 1000))


def _target(folder: Path, name: str) -> Path:
    """Return where something of that name is to be written, its folders made."""
    parts = name.split("/")
    if name.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise CheckpointError(f"{name!r} must be a relative name without '..'")
    if name == "DONE":
        raise CheckpointError("DONE is the protocol's own file; give yours another name")
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _write(path: Path, data: bytes) -> None:
    with open(str(path), "wb", buffering=0) as target:
        _write_all(target, memoryview(data))


def _write_all(target: io.FileIO, data: memoryview) -> None:
    # A MiB at a time: a single write of a GiB takes several times as long.
    while data:
        data = data[target.write(data[:_COPY_BYTES]) :]


def _in_folder(source: str, target: Path) -> list[tuple[str, Path]]:
    """Return the files below a folder, and where their copies go; the folders are made."""
    found: list[tuple[str, Path]] = []
    for entry in sorted(os.scandir(source), key=lambda item: item.name):
        if entry.is_symlink():
            raise CheckpointError(f"{entry.path} is a link; put the file itself there")
        if entry.is_dir(follow_symlinks=False):
            (target / entry.name).mkdir()
            found += _in_folder(entry.path, target / entry.name)
        elif entry.is_file(follow_symlinks=False):
            found.append((entry.path, target / entry.name))
        else:
            raise CheckpointError(f"{entry.path} is neither a file nor a folder")
    return found


def _copy_now(source: str, target: Path) -> None:
    held = _Held(source)
    try:
        held.copy(target)
    finally:
        held.close()


class _Held:
    """A file that is to be copied as it is now, even if it is deleted meanwhile."""

    def __init__(self, path: str) -> None:
        self._path = path
        # Whoever puts a pipe there is told so, and not waited for.
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._status = os.fstat(self._file)
        if not stat.S_ISREG(self._status.st_mode):
            self.close()
            raise CheckpointError(f"{path} is neither a file nor a folder")

    def copy(self, target: Path) -> None:
        """Copy it, by the file system where it can. Raises CheckpointError: it has changed."""
        with open(str(target), "xb", buffering=0) as copy:
            if not _clone(self._file, copy.fileno()):
                buffer = memoryview(bytearray(_COPY_BYTES))
                while True:
                    size = os.readv(self._file, [buffer])
                    if not size:
                        break
                    _write_all(copy, buffer[:size])
            size_bytes = os.fstat(copy.fileno()).st_size
        if self._has_changed() or size_bytes != self._status.st_size:
            raise _Changed(
                f"{self._path} changed while it was being copied: save when nothing writes to it"
            )

    def _has_changed(self) -> bool:
        before, now = self._status, os.fstat(self._file)
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            return True
        # A name that was added or taken away changes the ctime too.
        return now.st_nlink == before.st_nlink and now.st_ctime_ns != before.st_ctime_ns

    def close(self) -> None:
        """Let go of it."""
        os.close(self._file)


def _clone(source: int, copy: int) -> bool:
    """Let the file system make the copy, which shares the bytes; False: it makes none."""
    try:
        fcntl.ioctl(copy, _FICLONE, source)
    except OSError as error:
        if error.errno not in _NO_CLONE:
            raise
        return False
    return True


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


def _fsync(path: Path) -> None:
    descriptor = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- being asked ---------------------------------------------------------------------------------


def should_stop() -> bool:
    """Return whether the job should save now, then call `exit_preempted()`.

    From its first call on, SIGTERM only sets this answer and ends nothing by itself. Raises
    CheckpointError if the last save has failed.
    """
    _raise_failed()
    _listen()
    return _state.term.is_set() or (checkpoint_dir() / "STOP").exists()


def should_save() -> bool:
    """Return whether the agent would like a checkpoint at this step."""
    asked = _save_asked()
    return asked is not None and asked != _state.answered


def exit_preempted() -> None:
    """Leave with exit code 75: stopped when asked, resumable. Waits for the save under way.

    If that fails it is printed, and the job goes on elsewhere from the checkpoint before: any other
    exit code would say that the job itself has failed.
    """
    _say_failed()
    _state.beside = None
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
                saving = _Saving(state.global_step, dict(meta or {}), wait=False)
                with saving:
                    saving.take_written(str(source))
            if self.stopping:
                print(f"sublet: asked to stop; saved step {state.global_step}", flush=True)
                exit_preempted()

    return SubletCallback()
