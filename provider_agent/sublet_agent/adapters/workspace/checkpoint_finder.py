"""The checkpoints that a script left in its outputs folder: found, read, and placed again.

    runs/<lease>/layouts/step-N.json    which files each checkpoint is made of (ours, not the job's)

What is recognised, and why it is whole, stands in `sublet_contracts.framework_layouts`. The folder
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
import time
from collections.abc import Iterator
from pathlib import Path

from sublet_agent.adapters.workspace.outputs_search import as_listed, descend, opened
from sublet_contracts.checkpoint_layouts import (
    MAX_RECORD_BYTES,
    RECORD,
    Snapshot,
    packed,
    placed,
    read_record,
)
from sublet_contracts.framework_layouts import ListedFile
from sublet_contracts.tree import (
    OnChunk,
    ScannedTree,
    Source,
    TreeFile,
    TreeIndex,
    TreeRefused,
    scan_tree,
)

_RECORDS_KEPT = 4
_RECORD_NAME = re.compile(r"step-(0|[1-9][0-9]{0,15})\.json")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class CheckpointFinder:
    """The checkpoints in one run's outputs folder. `root` is the run's folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._outputs = root / "outputs"
        self._records = root / "layouts"
        self._last: Snapshot | None = None
        self._spoiled_ms = -1
        """checkpoints up to this time may have lost what was written of them"""

    # -- out ---------------------------------------------------------------------------------------

    def search_from(self, since_ms: int) -> tuple[int, int, int]:
        """Return what is of interest only: the step and the time (ms) that a new one has to be
        past, and since when. `since_ms`: when this machine was started."""
        last = self.last()
        step, mtime_ms = (last.step, last.mtime_ms) if last is not None else (0, -1)
        return step, mtime_ms, max(since_ms, self._spoiled_ms + 1)

    def take(self, fresh: Snapshot) -> None:
        """Take a checkpoint that was found: durable and written down once this returns, so that an
        agent that is killed later finds the same one under the same step. Raises OSError."""
        try:
            self._fsync(fresh)
        except OSError:
            # The kernel tells of a lost write once: the next fsync would be believed wrongly.
            self._spoiled_ms = fresh.mtime_ms
            raise
        self._write_record(fresh)

    def last(self) -> Snapshot | None:
        """Return the newest one that was found or placed; None: none was."""
        if self._last is None:
            for step in reversed(self._recorded_steps()):
                with contextlib.suppress(TreeRefused):
                    self._last = self._read_record(step)
                    break
        return self._last

    def scan(self, step: int, limit_bytes: int, on_chunk: OnChunk | None = None) -> ScannedTree:
        """Read a checkpoint that was found. Raises TreeRefused (the script has deleted or changed
        it meanwhile, too), OSError."""
        snapshot = self._read_record(step)
        files: list[TreeFile] = []
        sources: dict[str, Source] = {}
        sizes: dict[str, int] = {}
        for path in [None, *(file.path for file in snapshot.files)]:
            at = self._record_path(step) if path is None else self._outputs / path
            try:
                part = scan_tree(at, max_bytes=limit_bytes, inside=self._root, on_chunk=on_chunk)
            except FileNotFoundError as error:
                raise TreeRefused(f"{path} was deleted before it could be read") from error
            if [file.path for file in part.index.files] != [at.name]:
                raise TreeRefused(f"{path} is no longer a file")
            limit_bytes -= part.index.total_bytes
            name = RECORD if path is None else packed(path)
            files.append(part.index.files[0].model_copy(update={"path": name}))
            sizes[name] = part.index.total_bytes
            for digest, source in part.sources.items():
                sources.setdefault(digest, source)
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

    @contextlib.contextmanager
    def _open_outputs(self) -> Iterator[int]:
        top = os.open(self._outputs, _FOLDER)
        try:
            yield top
        finally:
            os.close(top)

    def _listed(self, top: int, path: str) -> ListedFile | None:
        *above, name = path.split("/")
        try:
            folder = descend(top, tuple(above))
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        finally:
            os.close(folder)
        return as_listed(path, info)

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
                with opened(top, "/".join((*above, name))) as file:
                    if file is not None:  # or it has changed, which is noticed when it is read
                        os.fsync(file)
            for parts in {tuple(path[:depth]) for path in paths for depth in range(len(path))}:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    folder = descend(top, parts)
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


def _set_mtime(path: Path, mtime_ms: int) -> None:
    os.utime(path, ns=(mtime_ms * 1_000_000, mtime_ms * 1_000_000))
