"""Copies of the folders that a job named as its checkpoint: taken, read, and placed again.

    runs/<lease>/snapshots/step-N/       a copy, as it is uploaded: ours, the job never sees it
    runs/<lease>/snapshots/last.json     what the newest holds, and when it was taken

When one may be taken is seen by folder_watch.py. It is a copy, so that the job may go on writing
while it is uploaded; the filesystem's own (FICLONE) where it makes such. Here, too, no link is
followed, and what changed while it was being copied makes no snapshot. A copy that a power cut
left torn is noticed when it is read: its record has the hash of each file.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sublet_agent.adapters.workspace import folders
from sublet_agent.adapters.workspace.folder_watch import Watched, WatchedFile
from sublet_agent.adapters.workspace.outputs_search import descend, open_unnoticed
from sublet_contracts.checkpoint_folders import (
    MAX_RECORD_BYTES,
    RECORD,
    FolderSnapshot,
    SavedFile,
    SavedLink,
    packed,
    read_record,
)
from sublet_contracts.tree import FileContent, OnChunk, ScannedTree, TreeRefused, scan_tree

_FICLONE = 0x40049409
_NO_CLONE = (
    errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM,
    errno.EISDIR, errno.ETXTBSY,
)  # fmt: skip
_PIECE_BYTES = 4 * 1024 * 1024
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NS_PER_MS = 1_000_000


class Changed(Exception):
    """A file changed while it was being copied: it is tried again."""


class NoRoom(Exception):
    """A copy doesn't fit. The text says so to the renter."""


@dataclass(frozen=True)
class NamedFolder:
    """Where a folder that the job named lies on this disk."""

    root: Path
    """a folder that the job can't put anything else in the place of"""
    inside: tuple[str, ...]
    """the way from there, which is the job's"""
    leave_out: tuple[str, ...] = ()
    """what is mounted in it, as seen from it: no part of it"""


class _Last(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    taken_ns: int
    snapshot: FolderSnapshot


class FolderSnapshots:
    """The snapshots of one run. `root` is the run's folder, `named` the folders as the job's
    document names them."""

    def __init__(self, root: Path, named: tuple[str, ...]) -> None:
        self._root = root / "snapshots"
        self._named = named
        self._last: _Last | None = None

    # -- out ---------------------------------------------------------------------------------------

    def last(self) -> FolderSnapshot | None:
        """Return the newest that was taken or placed; None: none was."""
        last = self._read_last()
        return None if last is None else last.snapshot

    def since_ns(self) -> int:
        """Return since when a change is new. A clock that was set back since makes all of it new:
        what is the same is seen when it is compared."""
        last = self._read_last()
        return 0 if last is None or last.taken_ns > time.time_ns() else last.taken_ns

    def holds(self, step: int) -> bool:
        """Say whether the copy of that step is here."""
        return self._path(step).is_dir()

    def held_bytes(self) -> int:
        """Return what the copies take of the disk. A copy that the filesystem shares counts in
        full: its bytes are freed only with it."""
        return folders.usage([self._root]) if self._root.is_dir() else 0

    def take(
        self, places: Sequence[NamedFolder], watched: Watched, step: int, room_bytes: int
    ) -> FolderSnapshot | None:
        """Copy what was seen; return None if what counts in it is as it was.

        Raises Changed, NoRoom, OSError.
        """
        taken_ns = max((file.ctime_ns for file in watched.files if not file.log), default=0)
        size_bytes = sum(file.size_bytes for file in watched.files)
        if size_bytes > room_bytes:
            raise NoRoom(
                f"a copy of the --checkpoint folders has {size_bytes} bytes, and {room_bytes} are "
                "left of the job's disk: ask for more with --disk, or name a smaller folder"
            )
        aside = self._root / "new.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True, mode=0o700)
        try:
            files = self._copied(places, watched, aside)
            snapshot = FolderSnapshot(
                step=step,
                trained_step=watched.trained_step,
                total_steps=watched.total_steps,
                folders=self._named,
                files=tuple(files),
                links=watched.links,
                empty=watched.empty,
            )
            if self._is_as_before(snapshot, watched.files):
                before = self._read_last()
                if before is not None:
                    self._write_last(_Last(taken_ns=taken_ns, snapshot=before.snapshot))
                return None
            (aside / RECORD).write_bytes(snapshot.to_bytes())
            shutil.rmtree(self._path(step), ignore_errors=True)
            os.rename(aside, self._path(step))
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._write_last(_Last(taken_ns=taken_ns, snapshot=snapshot))
        return snapshot

    def _copied(
        self, places: Sequence[NamedFolder], watched: Watched, aside: Path
    ) -> list[SavedFile]:
        saved: list[SavedFile] = []
        files, last = watched.files, self.last()
        before = {(file.folder, file.path): file for file in last.files} if last else {}
        with contextlib.ExitStack() as stack:
            tops = [stack.enter_context(open_named(place)) for place in places]
            for file in files:
                target = aside / packed(file.folder, file.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                with _opened(tops[file.folder], file) as source:
                    size, content = _copy(source, file, target)
                # What was placed again and left alone since was written by a run before.
                known = before.get((file.folder, file.path))
                written = file.written or (known is not None and known.written)
                saved.append(
                    SavedFile(
                        folder=file.folder,
                        path=file.path,
                        size_bytes=size,
                        mtime_ms=max(0, file.mtime_ns // _NS_PER_MS),
                        content=content,
                        written=written,
                    )
                )
            # Read one after the other, they must all have been there at one moment: this one.
            for file in files:
                if not file.log:
                    with _opened(tops[file.folder], file):
                        continue
            for link in watched.links:
                _require_link(tops[link.folder], link)
        return saved

    def _is_as_before(self, snapshot: FolderSnapshot, files: Sequence[WatchedFile]) -> bool:
        """Whether each file that counts was in the one before, with the same content."""
        last = self.last()
        if last is None:
            return False
        logs = {(file.folder, file.path) for file in files if file.log}
        before = {(file.folder, file.path): file.content for file in last.files}
        return all(
            before.get((file.folder, file.path)) == file.content
            for file in snapshot.files
            if (file.folder, file.path) not in logs
        )

    def scan(
        self, step: int, limit_bytes: int, on_chunk: OnChunk | None = None
    ) -> ScannedTree | None:
        """Read a snapshot; None: there is none of that step. Raises TreeRefused, OSError."""
        folder = self._path(step)
        if not folder.is_dir():
            return None
        tree = scan_tree(folder, max_bytes=limit_bytes + MAX_RECORD_BYTES, on_chunk=on_chunk)
        try:
            snapshot = read_record((folder / RECORD).read_bytes())
        except (OSError, ValueError) as error:
            raise TreeRefused(f"what was noted of it can't be read: {error}") from error
        read = {file.path: file.content for file in tree.index.files if file.path != RECORD}
        if read != {packed(f.folder, f.path): f.content for f in snapshot.files}:
            raise TreeRefused("its copy on this disk is damaged")
        return tree

    def delete(self, steps: Sequence[int]) -> None:
        """Delete copies that are no longer needed."""
        for step in steps:
            shutil.rmtree(self._path(step), ignore_errors=True)

    # -- in ----------------------------------------------------------------------------------------

    def place(self, target: Path, step: int, places: Sequence[NamedFolder]) -> bool:
        """Put the files of the checkpoint in `target` back where they lay, in the place of what
        the image has there.

        False: it is none of these, and stays where it is. Raises ValueError (what it records isn't
        there, or can't be read), OSError.
        """
        record = target / RECORD
        if not record.is_file() or (target / "DONE").exists():
            return False
        with record.open("rb") as opened:
            snapshot = read_record(opened.read(MAX_RECORD_BYTES + 1))
        if snapshot.folders != self._named:
            raise ValueError(f"{RECORD} is of other folders than this job names")
        shift_ms = time.time_ns() // _NS_PER_MS - snapshot.mtime_ms
        with contextlib.ExitStack() as stack:
            tops = [stack.enter_context(_made(place)) for place in places]
            for top, place in zip(tops, places, strict=True):
                _clear(top, place.leave_out)
            for file in snapshot.files:
                source = target / packed(file.folder, file.path)
                if not source.is_file() or source.stat().st_size != file.size_bytes:
                    raise ValueError(f"{file.path} is not as {RECORD} says")
                mtime_ms = max(0, file.mtime_ms + shift_ms)
                _move(source, tops[file.folder], file.path, mtime_ms)
            for link in snapshot.links:
                *above, name = link.path.split("/")
                with _made_below(tops[link.folder], above) as folder:
                    try:
                        os.symlink(link.target, name, dir_fd=folder)
                    except FileExistsError as error:  # where something is mounted
                        raise ValueError(f"{link.path} is not as {RECORD} says") from error
            for empty in snapshot.empty:
                with _made_below(tops[empty.folder], empty.path.split("/")):
                    continue
        self._root.mkdir(parents=True, mode=0o700, exist_ok=True)
        placed = snapshot.model_copy(update={"step": step})
        self._write_last(_Last(taken_ns=time.time_ns(), snapshot=placed))
        shutil.rmtree(target)
        return True

    # -- what was taken ----------------------------------------------------------------------------

    def _path(self, step: int) -> Path:
        return self._root / f"step-{step}"

    def _read_last(self) -> _Last | None:
        if self._last is None:
            # None at all, or one that a power cut left torn: what is there is compared anew.
            with contextlib.suppress(FileNotFoundError, ValidationError):
                data = (self._root / "last.json").read_bytes()
                self._last = _Last.model_validate_json(data)
        return self._last

    def _write_last(self, last: _Last) -> None:
        aside = self._root / "last.tmp"
        aside.write_bytes(last.model_dump_json().encode())
        os.rename(aside, self._root / "last.json")
        self._last = last


@contextlib.contextmanager
def open_named(place: NamedFolder, *, at_hand: bool = False) -> Iterator[int | None]:
    """Open a folder that a job named; None: it isn't there, or is none. `at_hand`: merely to be
    handed on (O_PATH)."""
    flags = _FOLDER | os.O_PATH if at_hand else _FOLDER
    try:
        folder = os.open(place.root, flags)
        for part in place.inside:
            above = folder
            try:
                folder = os.open(part, flags, dir_fd=above)
            finally:
                os.close(above)
    except OSError:
        yield None
        return
    try:
        yield folder
    finally:
        os.close(folder)


@contextlib.contextmanager
def _opened(top: int | None, file: WatchedFile) -> Iterator[int]:
    """Open a file that must be what it was, before and after. Raises Changed, OSError."""
    *above, name = file.path.split("/")
    if top is None:
        raise Changed(file.path)
    try:
        folder = descend(top, tuple(above))
        try:
            opened = open_unnoticed(name, folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise Changed(file.path) from error
    try:
        _require_same(opened, file)
        yield opened
        _require_same(opened, file)
    finally:
        os.close(opened)


def _require_same(opened: int, file: WatchedFile) -> None:
    info = os.fstat(opened)
    same = stat.S_ISREG(info.st_mode) and (
        file.log
        or (info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)
        == (file.size_bytes, file.mtime_ns, file.ctime_ns, file.inode)
    )
    if not same:
        raise Changed(file.path)


def _require_link(top: int | None, link: SavedLink) -> None:
    """Raises Changed: it isn't what it was."""
    *above, name = link.path.split("/")
    try:
        folder = descend(top or 0, tuple(above))
        try:
            same = top is not None and os.readlink(name, dir_fd=folder) == link.target
        finally:
            os.close(folder)
    except OSError as error:
        raise Changed(link.path) from error
    if not same:
        raise Changed(link.path)


def _copy(source: int, file: WatchedFile, target: Path) -> tuple[int, str]:
    """Copy a file; return the copy's size and its content's name. Raises OSError."""
    executable = os.fstat(source).st_mode & stat.S_IXUSR
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    copy = os.open(target, flags, 0o700 if executable else 0o600)
    try:
        content = FileContent()
        cloned = _clone(source, copy, file)
        size = 0
        while size < file.size_bytes:
            wanted = min(_PIECE_BYTES, file.size_bytes - size)
            piece = os.pread(copy if cloned else source, wanted, size)
            if not piece:
                break
            content.update(piece)
            if not cloned:
                _write(copy, piece)
            size += len(piece)
        return size, content.name()
    finally:
        os.close(copy)


def _clone(source: int, copy: int, file: WatchedFile) -> bool:
    try:
        fcntl.ioctl(copy, _FICLONE, source)
    except OSError as error:
        if error.errno not in _NO_CLONE:
            raise
        return False
    os.truncate(copy, file.size_bytes)  # a log may have grown
    return True


def _write(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


@contextlib.contextmanager
def _made(place: NamedFolder) -> Iterator[int]:
    """Open a named folder, made where it isn't there; what the image has in its way goes."""
    folder = os.open(place.root, _FOLDER)
    try:
        for part in place.inside:
            above, folder = folder, _below(folder, part)
            os.close(above)
        yield folder
    finally:
        os.close(folder)


def _below(above: int, name: str) -> int:
    """Open the folder of that name, in the place of whatever else is called so."""
    try:
        return os.open(name, _FOLDER, dir_fd=above)
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        os.unlink(name, dir_fd=above)
    os.mkdir(name, 0o755, dir_fd=above)
    return os.open(name, _FOLDER, dir_fd=above)


def _clear(folder: int, kept: tuple[str, ...]) -> None:
    """Delete what is in an open folder, but for what is mounted there and the ways to it."""
    tops = {path.split("/")[0] for path in kept}
    for name in os.listdir(folder):
        if name not in tops:
            folders.delete_in(folder, name)


def _move(source: Path, top: int, path: str, mtime_ms: int) -> None:
    *above, name = path.split("/")
    with _made_below(top, above) as folder:
        os.rename(source, name, dst_dir_fd=folder)
        times = (mtime_ms * _NS_PER_MS, mtime_ms * _NS_PER_MS)
        os.utime(name, ns=times, dir_fd=folder, follow_symlinks=False)
        mode = 0o755 if os.stat(name, dir_fd=folder).st_mode & stat.S_IXUSR else 0o644
        os.chmod(name, mode, dir_fd=folder)


@contextlib.contextmanager
def _made_below(top: int, parts: Sequence[str]) -> Iterator[int]:
    """Open a folder below an open one, made where it isn't there."""
    folder = os.dup(top)
    try:
        for part in parts:
            before, folder = folder, _below(folder, part)
            os.close(before)
        yield folder
    finally:
        os.close(folder)
