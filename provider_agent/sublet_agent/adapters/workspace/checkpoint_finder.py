"""The checkpoints that a script left in its outputs folder: found, read, and placed again.

    runs/<lease>/layouts/step-N.json    which files each checkpoint is made of (ours, not the job's)

What is recognised, and why it is whole, stands in `sublet_contracts.checkpoint_layouts`. The folder
is the job's, which may put anything there at any moment: everything is opened from its folder's
descriptor, no link is followed, and listing ends at a bound.

Scripts don't fsync what they save. So the files are fsynced before they are written down, and what
was not written down before the machine lost power, or was started anew, is no checkpoint: it may be
torn in places where nobody can tell.
"""

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from sublet_contracts.checkpoint_layouts import (
    MAX_RECORD_BYTES,
    MAX_STATE_BYTES,
    QUIET_MS,
    RECORD,
    ZIP_TAIL_BYTES,
    FoundCheckpoint,
    ListedFile,
    Snapshot,
    TrainerState,
    ends_whole,
    find_checkpoints,
    next_snapshot,
    packed,
    placed,
    read_record,
    read_trainer_state,
)
from sublet_contracts.tree import (
    MAX_FILES,
    ScannedTree,
    TreeFile,
    TreeIndex,
    TreeRefused,
    scan_tree,
)

MAX_ENTRIES = 2 * MAX_FILES
MAX_DEPTH = 16
_RECORDS_KEPT = 4
_MAX_EXAMINED = 1000
_RECORD_NAME = re.compile(r"step-(0|[1-9][0-9]{0,15})\.json")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class CheckpointFinder:
    """The checkpoints in one run's outputs folder. `root` is the run's folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._outputs = root / "outputs"
        self._records = root / "layouts"
        self._last: Snapshot | None = None
        self._examined: dict[FoundCheckpoint, TrainerState | bool] = {}

    # -- out ---------------------------------------------------------------------------------------

    def newest(
        self, after_step: int, *, quiet_ms: int = QUIET_MS, since_ms: int = 0
    ) -> Snapshot | None:
        """Look for a checkpoint newer than the last; return the newest known, or None.

        A new one takes its step past `after_step` and is durable and written down before it is
        returned, so that an agent that is killed meanwhile finds the same one under the same step.
        `since_ms`: when this machine was started. Raises TreeRefused where there is too much to
        look through, OSError.
        """
        last = self.last()
        listing = self._list()
        before_ms = time.time_ns() // 1_000_000 - quiet_ms
        found = [c for c in find_checkpoints(listing) if since_ms <= c.mtime_ms <= before_ms]
        if not found or (last is not None and found[0].mtime_ms <= last.mtime_ms):
            return last
        states: dict[str, TrainerState] = {}
        sound = [checkpoint for checkpoint in found if self._is_sound(checkpoint, states)]
        fresh = next_snapshot(sound, states, last, after_step)
        if fresh is None:
            return last
        try:
            self._fsync(fresh)
        except OSError:
            # The kernel tells of a lost write once: the next fsync would be believed wrongly.
            self._examined.update(dict.fromkeys(sound, False))
            raise
        self._write_record(fresh)
        return fresh

    def last(self) -> Snapshot | None:
        """Return the newest one that was found or placed; None: none was."""
        if self._last is None:
            for step in reversed(self._recorded_steps()):
                with contextlib.suppress(TreeRefused):
                    self._last = self._read_record(step)
                    break
        return self._last

    def scan(self, step: int, limit_bytes: int) -> ScannedTree:
        """Read a checkpoint that was found. Raises TreeRefused (the script has deleted or changed
        it meanwhile, too), OSError."""
        snapshot = self._read_record(step)
        files: list[TreeFile] = []
        sources: dict[str, tuple[Path, int, int]] = {}
        sizes: dict[str, int] = {}
        for path in [None, *(file.path for file in snapshot.files)]:
            at = self._record_path(step) if path is None else self._outputs / path
            try:
                part = scan_tree(at, max_bytes=limit_bytes, inside=self._root)
            except FileNotFoundError as error:
                raise TreeRefused(f"{path} was deleted before it could be read") from error
            if [file.path for file in part.index.files] != [at.name]:
                raise TreeRefused(f"{path} is no longer a file")
            limit_bytes -= part.index.total_bytes
            name = RECORD if path is None else packed(path)
            files.append(part.index.files[0].model_copy(update={"path": name}))
            sizes[name] = part.index.total_bytes
            for sha256, source in part.sources.items():
                sources.setdefault(sha256, source)
        # Read one after the other, they must all have been there at one moment: this one.
        with self._open_outputs() as top:
            for file in snapshot.files:
                if self._listed(top, file.path) != file or sizes[packed(file.path)] != (
                    file.size_bytes
                ):
                    raise TreeRefused(f"{file.path} changed while it was being read")
        files.sort(key=lambda file: file.path)
        return ScannedTree(TreeIndex(files=tuple(files)), sources)

    # -- in ----------------------------------------------------------------------------------------

    def place(self, target: Path, step: int) -> bool:
        """Put the files of the checkpoint in `target` back where the script had written them.

        False: it is none of these, and stays where it is. Raises ValueError (what it records isn't
        there, or can't be read), OSError.
        """
        record = target / RECORD
        if not record.is_file() or (target / "DONE").exists():
            return False
        with record.open("rb") as opened:
            snapshot = read_record(opened.read(MAX_RECORD_BYTES + 1))
        snapshot = placed(snapshot, step, time.time_ns() // 1_000_000)
        folder_ms: dict[Path, int] = {}
        for file in snapshot.files:
            source, destination = target / packed(file.path), self._outputs / file.path
            if not source.is_file() or source.stat().st_size != file.size_bytes:
                raise ValueError(f"{file.path} is not as {RECORD} says")
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source, destination)
            _set_mtime(destination, file.mtime_ms)
            for parent in destination.relative_to(self._outputs).parents:
                folder = self._outputs / parent
                folder_ms[folder] = max(folder_ms.get(folder, 0), file.mtime_ms)
        for folder, mtime_ms in folder_ms.items():
            _set_mtime(folder, mtime_ms)
        self._write_record(snapshot)
        shutil.rmtree(target)
        return True

    # -- how it looks ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _open_outputs(self) -> Iterator[int]:
        top = os.open(self._outputs, _FOLDER)
        try:
            yield top
        finally:
            os.close(top)

    def _list(self) -> list[ListedFile]:
        """List the regular files, down to MAX_DEPTH folders. Raises TreeRefused: too many."""
        listing: list[ListedFile] = []
        left = MAX_ENTRIES  # folders count: they cost time
        pending: list[tuple[str, ...]] = [()]
        with self._open_outputs() as top:
            while pending:
                parts = pending.pop()
                try:
                    folder = _descend(top, parts)
                except (FileNotFoundError, NotADirectoryError):
                    continue  # deleted meanwhile, or replaced by a link
                try:
                    with os.scandir(folder) as entries:
                        for entry in entries:
                            left -= 1
                            if left < 0:
                                raise TreeRefused(
                                    f"the outputs folder holds more than {MAX_ENTRIES} files and"
                                    " folders, too many to look for checkpoints in it"
                                )
                            if entry.is_dir(follow_symlinks=False):
                                if len(parts) < MAX_DEPTH:
                                    pending.append((*parts, entry.name))
                                continue
                            try:
                                info = entry.stat(follow_symlinks=False)
                            except FileNotFoundError:
                                continue
                            if listed := _as_listed("/".join((*parts, entry.name)), info):
                                listing.append(listed)
                finally:
                    os.close(folder)
        return listing

    def _listed(self, top: int, path: str) -> ListedFile | None:
        *above, name = path.split("/")
        try:
            folder = _descend(top, tuple(above))
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        finally:
            os.close(folder)
        return _as_listed(path, info)

    def _is_sound(self, checkpoint: FoundCheckpoint, states: dict[str, TrainerState]) -> bool:
        """Whether its files are not torn, as far as can be told without unpickling anything."""
        # Looked at once: a job could make us read the same torn file each second.
        if checkpoint not in self._examined:
            if len(self._examined) >= _MAX_EXAMINED:
                self._examined.clear()
            self._examined[checkpoint] = self._examine(checkpoint)
        known = self._examined[checkpoint]
        if isinstance(known, TrainerState) and checkpoint.state_path is not None:
            states[checkpoint.state_path] = known
        return known is not False

    def _examine(self, checkpoint: FoundCheckpoint) -> TrainerState | bool:
        with self._open_outputs() as top:
            for path in checkpoint.torch_paths:
                with _opened(top, path) as file:
                    if file is None or not _is_whole(file):
                        return False
            if checkpoint.state_path is None:
                return True
            with _opened(top, checkpoint.state_path) as file:
                data = b"" if file is None else os.pread(file, MAX_STATE_BYTES, 0)
        return read_trainer_state(data, checkpoint.step) or False

    # -- what was found ----------------------------------------------------------------------------

    def _record_path(self, step: int) -> Path:
        return self._records / f"step-{step}.json"

    def _recorded_steps(self) -> list[int]:
        try:
            names = os.listdir(self._records)
        except FileNotFoundError:
            return []
        return sorted(int(m.group(1)) for n in names if (m := _RECORD_NAME.fullmatch(n)))

    def _read_record(self, step: int) -> Snapshot:
        try:
            return read_record(self._record_path(step).read_bytes())
        except FileNotFoundError as error:
            raise TreeRefused("it is no longer there") from error
        except ValueError as error:
            raise TreeRefused(f"what was noted of it can't be read: {error}") from error

    def _fsync(self, snapshot: Snapshot) -> None:
        """Make its files durable, and their names."""
        paths = [file.path.split("/") for file in snapshot.files]
        with self._open_outputs() as top:
            for *above, name in paths:
                with _opened(top, "/".join((*above, name))) as file:
                    if file is not None:  # or it has changed, which is noticed when it is read
                        os.fsync(file)
            for parts in {tuple(path[:depth]) for path in paths for depth in range(len(path))}:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    folder = _descend(top, parts)
                    try:
                        os.fsync(folder)
                    finally:
                        os.close(folder)

    def _write_record(self, snapshot: Snapshot) -> None:
        self._records.mkdir(exist_ok=True)
        aside = self._records / "new.tmp"
        with aside.open("wb") as file:
            file.write(snapshot.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, self._record_path(snapshot.step))
        for old in self._recorded_steps()[:-_RECORDS_KEPT]:
            self._record_path(old).unlink()
        self._last = snapshot


def _descend(top: int, parts: tuple[str, ...]) -> int:
    """Return a descriptor of the folder `parts` below `top`. Raises FileNotFoundError, and
    NotADirectoryError for a link too."""
    here = os.dup(top)
    for part in parts:
        try:
            below = os.open(part, _FOLDER, dir_fd=here)
        finally:
            os.close(here)
        here = below
    return here


@contextlib.contextmanager
def _opened(top: int, path: str) -> Iterator[int | None]:
    """Open a regular file below `top`; None: it is none, or not there (any more)."""
    *above, name = path.split("/")
    try:
        folder = _descend(top, tuple(above))
    except OSError:
        yield None
        return
    try:
        file = os.open(name, _FILE, dir_fd=folder)
    except OSError:
        yield None
        return
    finally:
        os.close(folder)
    try:
        yield file if stat.S_ISREG(os.fstat(file).st_mode) else None
    finally:
        os.close(file)


def _is_whole(file: int) -> bool:
    size = os.fstat(file).st_size
    tail = os.pread(file, ZIP_TAIL_BYTES, max(0, size - ZIP_TAIL_BYTES))
    return ends_whole(os.pread(file, 4, 0), tail)


def _as_listed(path: str, info: os.stat_result) -> ListedFile | None:
    """Return the entry, or None for what no checkpoint can hold: other than files, odd names."""
    if not stat.S_ISREG(info.st_mode):
        return None
    try:
        return ListedFile(
            path=path, size_bytes=info.st_size, mtime_ms=info.st_mtime_ns // 1_000_000
        )
    except ValidationError:
        return None


def _set_mtime(path: Path, mtime_ms: int) -> None:
    os.utime(path, ns=(mtime_ms * 1_000_000, mtime_ms * 1_000_000))
