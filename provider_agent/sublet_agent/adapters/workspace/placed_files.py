"""Whether a job has opened what it was restored from, by the access times of the files.

    runs/<lease>/placed.json    the largest of the files that were placed, as they were then
    runs/<lease>/placed/N       a hard link to each, out of the job's reach

A file that is placed gets its last change as its access time, so that Linux notes the first read
(relatime). Where the filesystem keeps no access times that is seen once, with a file of ours,
and nothing is said of the job then. A script may load a file and put the next one in its place
before anybody looks: so a link keeps the one that was placed until that was seen once, and no
longer, for it takes up room. Nothing here reads what it watches, and who else does reads it
unnoticed (outputs_search.py). A container that sees a file through a read-only mount leaves no
trace: such files are not to be watched.
"""

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sublet_agent.adapters.workspace.outputs_search import descend

WATCHED = 8
"""the largest: models are; what a script opens for other reasons (itself, its settings) is not"""
_RECORD = "placed.json"
_LINKS = "placed"
_MAX_RECORD_BYTES = 256 * 1024
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DAY_NS = 86_400 * 10**9


@dataclass(frozen=True)
class PlacedFile:
    """Where a file was placed: below a folder of ours that the job can't replace."""

    root: Path
    parts: tuple[str, ...]


@dataclass(frozen=True)
class _Seen:
    file: PlacedFile
    device: int
    inode: int
    read_ns: int
    """its access time as it was placed"""


class PlacedFiles:
    """The placed files of one run. `root` is the run's folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._watched: tuple[_Seen, ...] | None = None
        self._opened: bool | None = None

    def watch(self, files: Iterable[PlacedFile]) -> None:
        """Note these files as they are now, just placed. Raises OSError."""
        found = []
        for file in files:
            info = _stat(file)
            if info is not None:
                found.append((-info.st_size, file.parts, file))
        largest = [file for _, _, file in sorted(found, key=lambda entry: entry[:2])[:WATCHED]]
        keeps = bool(largest) and keeps_access_times(self._root)
        self._let_go()
        if keeps:
            (self._root / _LINKS).mkdir(exist_ok=True)
        infos = [
            (file, _stat(file, unread=True, link=self._link(number)))
            for number, file in enumerate(largest if keeps else ())
        ]
        self._watched = tuple(
            _Seen(file, info.st_dev, info.st_ino, info.st_atime_ns)
            for file, info in infos
            if info is not None
        )
        aside = self._root / f"{_RECORD}.tmp"
        aside.write_text(json.dumps([_as_json(seen) for seen in self._watched]))
        os.rename(aside, self._root / _RECORD)

    def opened(self) -> bool | None:
        """Say whether one of them was opened since; None: nothing was placed, or it can't be known.

        A file that was replaced or deleted before anybody read it was not opened.
        """
        watched = self._read()
        if not self._opened and watched:
            looks = [self._was_read(number, seen) for number, seen in enumerate(watched)]
            self._opened = any(looks)
            if self._opened:
                self._let_go()
        return self._opened

    def _was_read(self, number: int, seen: _Seen) -> bool:
        info = _stat(seen.file)
        if not _is_same(info, seen):
            # Replaced: what was placed will not be read any more, and only the link knows it.
            link = self._link(number)
            with contextlib.suppress(FileNotFoundError):
                info = os.stat(link, follow_symlinks=False)
                link.unlink()
        return info is not None and _is_same(info, seen) and info.st_atime_ns != seen.read_ns

    def _link(self, number: int) -> Path:
        return self._root / _LINKS / str(number)

    def _let_go(self) -> None:
        for number in range(WATCHED):
            self._link(number).unlink(missing_ok=True)

    def _read(self) -> Sequence[_Seen]:
        if self._watched is None:
            self._watched = ()
            with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
                with (self._root / _RECORD).open("rb") as record:
                    data = record.read(_MAX_RECORD_BYTES)
                self._watched = tuple(_from_json(one) for one in json.loads(data))
        return self._watched


def keeps_access_times(folder: Path) -> bool:
    """Say whether the filesystem of `folder` notes the first read of a file. Raises OSError."""
    probe = folder / "access-time.tmp"
    probe.write_bytes(b"read me")
    try:
        then_ns = time.time_ns() - _DAY_NS // 24
        os.utime(probe, ns=(then_ns, then_ns))
        probe.read_bytes()
        return probe.stat().st_atime_ns > then_ns
    finally:
        probe.unlink()


def _is_same(info: os.stat_result | None, seen: _Seen) -> bool:
    return info is not None and (info.st_dev, info.st_ino) == (seen.device, seen.inode)


def _stat(
    file: PlacedFile, *, unread: bool = False, link: Path | None = None
) -> os.stat_result | None:
    """Look at a file without following a link; None: it is no file (any more). `unread`: first set
    its access time back to its last change. `link`: where to link it to, if the filesystem can."""
    try:
        top = os.open(file.root, _FOLDER)
    except OSError:
        return None
    try:
        folder = descend(top, file.parts[:-1])
    except OSError:
        return None
    finally:
        os.close(top)
    name = file.parts[-1]
    try:
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if unread:
            times = (info.st_mtime_ns, info.st_mtime_ns)
            os.utime(name, ns=times, dir_fd=folder, follow_symlinks=False)
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if link is not None and stat.S_ISREG(info.st_mode):
            with contextlib.suppress(OSError):  # another filesystem: then the path alone tells
                os.link(name, link, src_dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None
    finally:
        os.close(folder)
    return info if stat.S_ISREG(info.st_mode) else None


def _as_json(seen: _Seen) -> list[object]:
    return [str(seen.file.root), list(seen.file.parts), seen.device, seen.inode, seen.read_ns]


def _from_json(one: list[object]) -> _Seen:
    root, parts, *numbers = one
    if not isinstance(parts, list) or not all(isinstance(number, int) for number in numbers):
        raise ValueError(_RECORD)
    device, inode, read_ns = (int(str(number)) for number in numbers)
    return _Seen(PlacedFile(Path(str(root)), tuple(map(str, parts))), device, inode, read_ns)
