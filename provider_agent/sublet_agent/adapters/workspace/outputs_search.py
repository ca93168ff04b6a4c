"""The search for checkpoints that a script left in its outputs folder: what is there, and whole.

The folder is the job's, which may put anything there at any moment: everything is opened from its
folder's descriptor, no link is followed, and listing ends at a bound. It runs in the process that
reads for the agent (reader.py).
"""

import contextlib
import os
import stat
import time
from collections.abc import Container, Generator, Iterator

from pydantic import ValidationError

from sublet_agent.adapters.workspace.open_writers import has_writer
from sublet_contracts.checkpoint_layouts import (
    MAX_STATE_BYTES,
    QUIET_MS,
    Snapshot,
    TrainerState,
    next_snapshot,
    read_trainer_state,
)
from sublet_contracts.encoding import MAX_INTEGER
from sublet_contracts.file_formats import Read, Verdict, check_file, holds_optimizer
from sublet_contracts.framework_layouts import FoundCheckpoint, ListedFile, find_checkpoints
from sublet_contracts.tree import MAX_FILES, TreeRefused

MAX_ENTRIES = 2 * MAX_FILES
MAX_DEPTH = 16
_MAX_EXAMINED = 1000
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class OutputsSearch:
    """What is known of one run's outputs folder."""

    def __init__(self) -> None:
        self._examined: dict[FoundCheckpoint, TrainerState | bool] = {}

    def newest(
        self, top: int, *, after_step: int, last_mtime_ms: int, quiet_ms: int, since_ms: int
    ) -> Snapshot | None:
        """Return the newest checkpoint in the folder `top` that is newer than `last_mtime_ms`, and
        not older than `since_ms`; its step comes after `after_step`. None: there is none.

        Raises TreeRefused where there is too much to look through, or no step is left; OSError.
        """
        listing = _list(top)
        now_ms = time.time_ns() // 1_000_000
        found = [
            checkpoint
            for checkpoint in find_checkpoints(listing)
            if since_ms
            <= checkpoint.mtime_ms
            <= now_ms - (QUIET_MS if checkpoint.must_be_quiet else quiet_ms)
        ]
        if not found or found[0].mtime_ms <= last_mtime_ms:
            return None
        if after_step >= MAX_INTEGER:
            raise TreeRefused(f"no step comes after {after_step}, which was saved before")
        states: dict[str, TrainerState] = {}
        sound = [checkpoint for checkpoint in found if self._is_sound(top, checkpoint, states)]
        if not sound or sound[0].mtime_ms <= last_mtime_ms:
            return None
        return next_snapshot(sound, states, None, after_step)

    def _is_sound(
        self, top: int, checkpoint: FoundCheckpoint, states: dict[str, TrainerState]
    ) -> bool:
        """Whether its files are not torn, as far as can be told without unpickling anything, and
        nobody still writes them."""
        if any(_is_open(top, file.path) for file in checkpoint.files):
            return False
        # Looked at once: a job could make us read the same torn file each second.
        if checkpoint not in self._examined:
            if len(self._examined) >= _MAX_EXAMINED:
                self._examined.clear()
            self._examined[checkpoint] = _examine(top, checkpoint)
        known = self._examined[checkpoint]
        if isinstance(known, TrainerState) and checkpoint.state_path is not None:
            states[checkpoint.state_path] = known
        return known is not False


def _list(top: int) -> list[ListedFile]:
    """List the regular files, down to MAX_DEPTH folders. Raises TreeRefused: too many."""
    listing: list[ListedFile] = []
    left = MAX_ENTRIES  # folders count: they cost time
    with contextlib.closing(entries_below(top, MAX_DEPTH)) as below:
        for _, path, entry in below:
            left -= 1
            if left < 0:
                raise TreeRefused(
                    f"the outputs folder holds more than {MAX_ENTRIES} files and folders, too many "
                    "to look for checkpoints in it"
                )
            if entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(FileNotFoundError):
                if listed := as_listed(path, entry.stat(follow_symlinks=False)):
                    listing.append(listed)
    return listing


def _examine(top: int, checkpoint: FoundCheckpoint) -> TrainerState | bool:
    optimizer = not checkpoint.needs_optimizer
    for listed in checkpoint.files:
        with opened(top, listed.path) as file:
            verdict = None if file is None else judged(file, listed.path)
            if file is not None and not optimizer:
                optimizer = holds_optimizer(listed.size_bytes, _reading(file))
        if verdict is None or verdict.kind == "torn":
            return False
        if checkpoint.must_be_known(listed.path) and verdict.kind != "whole":
            return False
    if not optimizer:
        return False
    if checkpoint.state_path is None:
        return True
    with opened(top, checkpoint.state_path) as file:
        data = b"" if file is None else os.pread(file, MAX_STATE_BYTES, 0)
    return read_trainer_state(data, checkpoint.step) or False


def judged(file: int, path: str) -> Verdict:
    """Judge an open file by its format. Raises OSError."""
    return check_file(path, os.fstat(file).st_size, _reading(file))


def _reading(file: int) -> Read:
    def read(offset: int, length: int) -> bytes:
        return os.pread(file, length, offset)

    return read


def _is_open(top: int, path: str) -> bool:
    with opened(top, path) as file:
        return file is not None and has_writer(file) is True


def entries_below(
    top: int, depth: int, *, leave_out: Container[str] = ()
) -> Generator[tuple[int, str, os.DirEntry[str]]]:
    """Go through all that lies below a job's folder: of each entry the open folder that it is in,
    its path from the top, and itself. No link is followed, and no folder entered that is in
    `leave_out` or lies deeper than `depth`; how many there are is for the caller to bound."""
    pending: list[tuple[str, ...]] = [()]
    while pending:
        parts = pending.pop()
        try:
            folder = descend(top, parts)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # deleted meanwhile, or replaced by a link, or closed
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = "/".join((*parts, entry.name))
                    yield folder, path, entry
                    enters = len(parts) < depth and path not in leave_out
                    if enters and entry.is_dir(follow_symlinks=False):
                        pending.append((*parts, entry.name))
        finally:
            os.close(folder)


def descend(top: int, parts: tuple[str, ...]) -> int:
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


def open_unnoticed(name: str, folder: int) -> int:
    """Open a file to read, leaving alone when it was read last: that tells whether its job has read
    it. Raises OSError."""
    try:
        return os.open(name, _FILE | os.O_NOATIME, dir_fd=folder)
    except PermissionError:  # another user's: only its owner may ask for that
        return os.open(name, _FILE, dir_fd=folder)


@contextlib.contextmanager
def opened(top: int, path: str) -> Iterator[int | None]:
    """Open a regular file below `top`; None: it is none, or not there (any more)."""
    *above, name = path.split("/")
    try:
        folder = descend(top, tuple(above))
    except OSError:
        yield None
        return
    try:
        file = open_unnoticed(name, folder)
    except OSError:
        yield None
        return
    finally:
        os.close(folder)
    try:
        yield file if stat.S_ISREG(os.fstat(file).st_mode) else None
    finally:
        os.close(file)


def as_listed(path: str, info: os.stat_result) -> ListedFile | None:
    """Return the entry, or None for what no checkpoint can hold: other than files, odd names."""
    if not stat.S_ISREG(info.st_mode):
        return None
    try:
        return ListedFile(
            path=path, size_bytes=info.st_size, mtime_ms=info.st_mtime_ns // 1_000_000
        )
    except ValidationError:
        return None
