"""Reads a folder of outputs: what can be carried is carried, and the rest is listed.

The folder is a stranger's and was left as it came, by a run that ended in whatever way. Nothing in
it costs the rest of it. Rules:

1. A regular file with a plain name is carried: a hard link as a file of its own.
2. A link, a socket, a FIFO, a device, an odd name, what can't be read or goes away meanwhile, is
   left out and listed (WhyLeftOut). A folder with an odd name is one entry, with all below it.
3. Of more than MAX_FILES files the biggest are carried: a model rather than its samples. What lies
   at the top comes before what lies deeper, in the order of names, up to `max_bytes`, and as many
   as an index can list. A file that is too big for what is left keeps out no smaller one after it.
4. Looking ends at MAX_LOOKED entries, MAX_DEPTH folders, and when `has_time` says no more.
5. An error that tells of the reader (no descriptors, no memory) is no property of the folder: it is
   raised.
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sublet_contracts.amounts import format_bytes
from sublet_contracts.paths import check_relative_path
from sublet_contracts.tree import (
    LEFT_OUT_SAYS,
    MAX_FILES,
    MAX_INDEX_BYTES,
    MAX_LEFT_OUT,
    Chunk,
    LeftOut,
    ScannedTree,
    TreeFile,
    TreeIndex,
    TreeRefused,
    WhyLeftOut,
    cut_file,
    note_sources,
    open_below,
    open_root,
    shown,
)

MAX_LOOKED = 200_000
MAX_DEPTH = 128

_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR})
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP})
_INDEX_RESERVE_BYTES = 1024 * 1024
"""of an index, for its list of what is left out"""
_FILE_BYTES, _CHUNK_BYTES = 160, 110
"""what a file and a chunk take up in an index, beside the file's name, at the most"""


@dataclass(frozen=True)
class _Found:
    """A file that can be carried as far as its name and kind go."""

    parts: tuple[str, ...]
    size_bytes: int

    @property
    def path(self) -> str:
        return "/".join(self.parts)

    @property
    def place(self) -> tuple[int, tuple[str, ...]]:
        """Its place in the order of reading."""
        return len(self.parts), self.parts


class _Unfit(Exception):
    """An entry is left out."""

    def __init__(self, why: WhyLeftOut, detail: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.detail = detail


def scan_outputs(
    root: Path,
    *,
    max_bytes: int,
    inside: Path,
    on_bytes: Callable[[int], None] | None = None,
    has_time: Callable[[], bool] = lambda: True,
    wanted: Callable[[str, os.stat_result], bool] = lambda path, status: True,
) -> ScannedTree:
    """Read what can be carried of the folder `root`; see the rules above.

    `inside` is a folder above it that is ours: from there on no link is followed. A root that is no
    folder (any more) holds nothing, and is listed. `wanted` says which files are of interest, by
    path and status: the others are neither carried nor listed. Raises OSError where the reader
    itself is in trouble, and what `on_bytes` raises, which is told of each piece that was read.
    """
    reading = _Reading(root, max_bytes, on_bytes, has_time, wanted)
    try:
        top = open_root(root, inside)
    except TreeRefused:
        reading.leave_out("", WhyLeftOut.LINK, "the folder itself was replaced")
        return reading.tree()
    except OSError as error:
        if error.errno in _OURS:
            raise
        reading.leave_out("", WhyLeftOut.UNREADABLE, error.strerror or "")
        return reading.tree()
    try:
        reading.read(top)
    finally:
        os.close(top)
    return reading.tree()


def left_out_text(entry: LeftOut) -> str:
    """Return what was left out and why."""
    detail = f" ({entry.detail})" if entry.detail else ""
    return f"{entry.path or 'the folder'}: {LEFT_OUT_SAYS[entry.why]}{detail}"


def left_out_lines(index: TreeIndex, most: int = 20) -> list[str]:
    """Return a sentence for each entry that was left out, `most` of them, and how many more."""
    lines = [left_out_text(entry) for entry in index.left_out[:most]]
    more = index.left_out_total - len(lines)
    return [*lines, f"and {more} more"] if more else lines


class _Reading:
    """One reading of a folder."""

    def __init__(
        self,
        root: Path,
        max_bytes: int,
        on_bytes: Callable[[int], None] | None,
        has_time: Callable[[], bool],
        wanted: Callable[[str, os.stat_result], bool],
    ) -> None:
        self._root = root
        self._left_bytes = max_bytes
        self._left_index_bytes = MAX_INDEX_BYTES - _INDEX_RESERVE_BYTES
        self._left_looks = MAX_LOOKED
        self._on_bytes = on_bytes
        self._has_time = has_time
        self._wanted = wanted
        self._found: list[_Found] = []
        self._files: list[TreeFile] = []
        self._sources: dict[str, tuple[Path, int, int]] = {}
        self._left_out: list[LeftOut] = []
        self._left_out_total = 0

    def leave_out(self, path: str, why: WhyLeftOut, detail: str = "") -> None:
        """List an entry, or at least count it."""
        self._left_out_total += 1
        if len(self._left_out) < MAX_LEFT_OUT:
            self._left_out.append(LeftOut(path=shown(path), why=why, detail=shown(detail)))

    def tree(self) -> ScannedTree:
        """Return what was read."""
        index = TreeIndex(
            files=tuple(sorted(self._files, key=lambda file: file.path)),
            left_out=tuple(self._left_out),
            left_out_total=self._left_out_total,
        )
        return ScannedTree(index, self._sources)

    def read(self, top: int) -> None:
        """Read the folder that `top` is a descriptor of."""
        self._list(top)
        huge = [found for found in self._found if found.size_bytes > self._left_bytes]
        for found in huge:
            self.leave_out(found.path, WhyLeftOut.TOO_BIG, format_bytes(found.size_bytes))
        self._found = [found for found in self._found if found.size_bytes <= self._left_bytes]
        biggest = sorted(self._found, key=lambda found: (-found.size_bytes, found.place))
        for found in sorted(biggest[MAX_FILES:], key=lambda found: found.place):
            self.leave_out(found.path, WhyLeftOut.TOO_MANY)
        wanted = sorted(biggest[:MAX_FILES], key=lambda found: found.place)
        for parts, files in groupby(wanted, key=lambda found: found.parts[:-1]):
            self._carry_folder(top, parts, list(files))

    def _list(self, top: int) -> None:
        """Note all files, level by level."""
        pending: deque[tuple[str, ...]] = deque([()])
        while pending and self._left_looks > 0:
            parts = pending.popleft()
            path = "/".join(parts)
            if len(parts) > MAX_DEPTH:
                self.leave_out(path, WhyLeftOut.TOO_DEEP)
                continue
            try:
                # From the root each time, so that a deep tree does not cost a descriptor per level.
                folder = open_below(top, parts)
            except (TreeRefused, OSError) as error:
                self._unfit(path, error)
                continue
            try:
                pending += [(*parts, name) for name in self._list_folder(folder, parts)]
            finally:
                os.close(folder)
        if pending or self._left_looks <= 0:
            self.leave_out("", WhyLeftOut.TOO_MANY, f"looking ended at {MAX_LOOKED} entries")

    def _list_folder(self, folder: int, parts: tuple[str, ...]) -> list[str]:
        """Note the files of one folder; return the names of the folders in it."""
        try:
            with os.scandir(folder) as listing:
                entries = []
                for entry in listing:
                    self._left_looks -= 1
                    if self._left_looks < 0:
                        break
                    entries.append(entry)
        except OSError as error:
            self._unfit("/".join(parts), error)
            return []
        below = []
        for entry in sorted(entries, key=lambda item: item.name):
            path = "/".join((*parts, entry.name))
            try:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    _check_name(path, "with all that lies in it")
                    below.append(entry.name)
                elif self._wanted(path, status):
                    _check_name(path)
                    _check_kind(folder, entry.name, status)
                    self._found.append(_Found((*parts, entry.name), status.st_size))
            except (_Unfit, OSError) as error:
                self._unfit(path, error)
        return below

    def _carry_folder(self, top: int, parts: tuple[str, ...], files: list[_Found]) -> None:
        """Read these files of one folder."""
        try:
            folder = open_below(top, parts)
        except (TreeRefused, OSError) as error:
            for found in files:
                self._unfit(found.path, error)
            return
        try:
            for found in files:
                try:
                    self._carry(folder, found)
                except (_Unfit, TreeRefused, OSError) as error:
                    self._unfit(found.path, error)
        finally:
            os.close(folder)

    def _unfit(self, path: str, error: _Unfit | TreeRefused | OSError) -> None:
        if isinstance(error, _Unfit):
            self.leave_out(path, error.why, error.detail)
            return
        cause = error.__cause__ if isinstance(error, TreeRefused) else error
        if not isinstance(cause, OSError) or cause.errno in _GONE:
            self.leave_out(path, WhyLeftOut.CHANGED)
        elif cause.errno in _OURS:
            raise error
        else:
            self.leave_out(path, WhyLeftOut.UNREADABLE, cause.strerror or "")

    def _carry(self, folder: int, found: _Found) -> None:
        if found.size_bytes > self._left_bytes:
            raise _Unfit(WhyLeftOut.TOO_BIG, format_bytes(found.size_bytes))
        if not self._has_time():
            raise _Unfit(WhyLeftOut.NO_TIME)

        def on_chunk(chunk: Chunk, _offset: int) -> None:
            if self._on_bytes:
                self._on_bytes(chunk.size_bytes)
            if not self._has_time():
                raise _Unfit(WhyLeftOut.NO_TIME)

        with os.fdopen(open_below(folder, found.parts[-1:]), "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _Unfit(WhyLeftOut.CHANGED)
            file = cut_file(opened, found.path, self._left_bytes, status.st_mode, on_chunk)
        if file is None:
            raise _Unfit(WhyLeftOut.TOO_BIG)
        listed = _FILE_BYTES + 6 * len(file.path) + _CHUNK_BYTES * len(file.chunks)
        if listed > self._left_index_bytes:
            raise _Unfit(WhyLeftOut.TOO_MANY, "no more can be listed")
        self._left_index_bytes -= listed
        self._left_bytes -= file.size_bytes
        self._files.append(file)
        note_sources(self._sources, file, self._root / file.path)


def _check_name(path: str, detail: str = "") -> None:
    try:
        check_relative_path(path)
    except ValueError as error:
        raise _Unfit(WhyLeftOut.NAME, detail) from error


def _check_kind(folder: int, name: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise _Unfit(WhyLeftOut.LINK, _target(folder, name))
    if not stat.S_ISREG(status.st_mode):
        raise _Unfit(WhyLeftOut.NOT_A_FILE)


def _target(folder: int, name: str) -> str:
    """Where a link points to, if that is beside or below it: an absolute path may be the
    machine's own."""
    target = os.readlink(name, dir_fd=folder)
    return "" if target.startswith("/") else f"to {target}"
