"""Inputs that stay on this machine when their run is over, for the same renter's next one.

    input-cache/<renter>/<digest>/tree/   as it was fetched; <digest>: the hex digits of its index's
    input-cache/<renter>/<digest>/bytes   how large it is; its time is when it was last used

Where a job can't write its inputs (a container has them read-only) a run gets hard links: neither
time nor disk. Elsewhere it gets a copy, which shares its blocks where the filesystem can. Either
way a run's files are hashed before it begins with them, so what was damaged here is fetched again.
Which of them are kept is decided by core/kept_inputs.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from sublet_agent.adapters.workspace import folders
from sublet_agent.core.kept_inputs import KeptInput, inputs_to_evict, is_worth_keeping
from sublet_contracts.amounts import format_bytes
from sublet_contracts.digests import digest_of, hex_of
from sublet_contracts.tree import TreeIndex

FOLDER = "input-cache"
_FICLONE = 0x40049409
_ASIDE = "new-"


class InputCache:
    """All that one agent keeps. Called from several threads.

    `cap_bytes`: the most that it holds; 0: nothing is kept. `links`: jobs can't write their inputs.
    """

    def __init__(
        self,
        state: Path,
        cap_bytes: int,
        *,
        links: bool,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._root = state / FOLDER
        self._cap_bytes = cap_bytes
        self._links = links
        self._now_ms = now_ms
        self._lock = threading.Lock()

    def place(self, renter: str, digest: str, index: TreeIndex, target: Path) -> bool:
        """Place a tree that is here as `target`, which isn't there yet; return whether it was.
        Raises OSError: the disk is full, or broken."""
        if not self._cap_bytes:
            return False
        entry = self._entry(renter, digest)
        try:
            os.utime(entry / "bytes")
            self._share(entry / "tree", target)
            whole = _is_whole(index, target)
        except FileNotFoundError:
            whole = False  # it isn't here, or was let go at this moment
        except OSError:
            shutil.rmtree(target, ignore_errors=True)
            raise
        if not whole:
            shutil.rmtree(target, ignore_errors=True)
            with self._lock:
                folders.delete(entry)
        return whole

    def keep(self, renter: str, digest: str, index: TreeIndex, source: Path) -> None:
        """Keep what was just fetched, if it is worth it. That it can't be kept harms nobody."""
        entry = self._entry(renter, digest)
        size_bytes = index.total_bytes
        if not is_worth_keeping(size_bytes, self._cap_bytes) or entry.is_dir():
            return
        aside = entry.parent / f"{_ASIDE}{secrets.token_hex(8)}"
        with self._lock:
            gone = inputs_to_evict(
                self._all(), self._cap_bytes, self._now_ms(), for_bytes=size_bytes
            )
            for one in gone:
                folders.delete(self._root / one.name)
        try:
            aside.mkdir(parents=True)
            self._share(source, aside / "tree")
            (aside / "bytes").write_text(str(size_bytes))
            os.rename(aside, entry)
        except OSError:
            folders.delete(aside)  # for want of disk, or another run was faster

    def tidy(self, short_bytes: int = 0) -> list[str]:
        """Let go of what is too much or too old, and of `short_bytes` more, which the disk lacks.
        Returns what went, in words."""
        with self._lock:
            self._forget_unfinished()
            kept = self._all()
            gone = inputs_to_evict(kept, self._cap_bytes, self._now_ms(), short_bytes=short_bytes)
            return [
                f"let go of an input that was kept ({format_bytes(one.size_bytes)})"
                for one in gone
                if folders.delete(self._root / one.name)
            ]

    def forget(self) -> tuple[int, int]:
        """Let go of all; return how many there were, and their bytes."""
        with self._lock:
            kept = self._all()
            if self._root.is_dir():
                folders.delete(self._root)
            return len(kept), sum(one.size_bytes for one in kept)

    def held_bytes(self) -> int:
        """Return how much is kept: it can be let go whenever there is need."""
        with self._lock:
            return sum(one.size_bytes for one in self._all())

    def _entry(self, renter: str, digest: str) -> Path:
        return self._root / sha256(renter.encode()).hexdigest()[:32] / hex_of(digest)

    def _all(self) -> list[KeptInput]:
        return [found for found in map(self._look, self._entries()) if found is not None]

    def _entries(self) -> Iterator[Path]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for renter in self._root.iterdir():
                yield from renter.iterdir()

    def _look(self, entry: Path) -> KeptInput | None:
        with contextlib.suppress(OSError, ValueError):
            size_bytes = int((entry / "bytes").read_text("ascii"))
            used_ms = (entry / "bytes").stat().st_mtime_ns // 1_000_000
            return KeptInput(str(entry.relative_to(self._root)), size_bytes, used_ms)
        return None

    def _forget_unfinished(self) -> None:
        """Let go of what was being kept when the agent died."""
        old_s = time.time() - 3_600
        for entry in self._entries():
            with contextlib.suppress(OSError):
                if self._look(entry) is None and entry.stat().st_mtime < old_s:
                    folders.delete(entry)

    def _share(self, source: Path, target: Path) -> None:
        """Have the same files in both places. Raises OSError."""
        link_or_copy = _link if self._links else _copy
        for folder, folders_here, names in os.walk(source, onerror=_raise):
            there = target / Path(folder).relative_to(source)
            there.mkdir()
            for name in (*names, *(n for n in folders_here if os.path.islink(f"{folder}/{n}"))):
                link_or_copy(os.path.join(folder, name), there / name)


def _raise(error: OSError) -> None:
    raise error


def _is_whole(index: TreeIndex, root: Path) -> bool:
    """Look at all links and hash all files of a tree. Raises OSError."""
    for link in index.links:
        if os.readlink(root / link.path) != link.target:
            return False
    for listed in index.files:
        with (root / listed.path).open("rb") as file:
            for chunk in listed.chunks:
                if digest_of(file.read(chunk.size_bytes)) != chunk.digest:
                    return False
            if file.read(1):
                return False
    return True


def _link(source: str, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        _copy(source, target)


def _copy(source: str, target: Path) -> None:
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    with open(source, "rb") as old, open(target, "xb") as new:
        os.fchmod(new.fileno(), os.fstat(old.fileno()).st_mode & 0o777)
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:
            shutil.copyfileobj(old, new, 1024 * 1024)
