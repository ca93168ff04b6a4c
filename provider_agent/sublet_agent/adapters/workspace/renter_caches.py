"""Caches that live on between a renter's runs on this machine, where the owner allows it.

    renter-caches/<renter>/files/   what his runs have put there (pip, hub, Triton, compilers)
    renter-caches/<renter>/used     when the last of them began

One folder for each renter, by his key, which his job's signature proves; nobody else's run ever
sees it. All of them together hold no more than the owner said: the least recently used goes first,
and one that is too large by itself goes, too. What a run uses is left alone, and what it adds
counts as its own disk.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from sublet_agent.adapters.workspace import folders
from sublet_agent.core.layout import Layout
from sublet_contracts.amounts import format_bytes

FOLDER = "renter-caches"
MAX_ENTRIES = 100_000
"""files and folders of one renter: more are not kept, for they would have to be counted"""
_ENTRY_BYTES = 4096  # what an empty file costs at least


@dataclass(frozen=True)
class _Cache:
    folder: Path
    used_ns: int
    held_bytes: int
    too_many: bool


class RenterCaches:
    """All of one agent. Called from several threads."""

    def __init__(self, state: Path, cap_bytes: int) -> None:
        """`cap_bytes`: the most that all may hold together; 0: there are none."""
        self._root = state / FOLDER
        self._cap_bytes = cap_bytes
        self._lock = threading.Lock()

    def folder_of(self, renter: str) -> Path | None:
        """Return where a renter's runs may keep what they like, made if it isn't there; None: the
        owner allows none. Raises OSError."""
        if not self._cap_bytes:
            return None
        with self._lock:
            home = self._root / _name(renter)
            (home / "files").mkdir(parents=True, exist_ok=True)
            (home / "used").touch()
            os.utime(home / "used")
            return home / "files"

    def noted(self, layout: Layout, cache: Path | None) -> Layout:
        """Return a run's layout with the caches that it has, and what they hold before it."""
        if cache is None:
            return layout
        held = folders.usage([cache], 2 * self._cap_bytes)
        return replace(layout, cache_dir=str(cache), cache_bytes=held)

    def tidy(self, in_use: Callable[[], Iterable[str]]) -> list[str]:
        """Let go of what is too much. `in_use`: renters who have a run here, asked when nobody can
        be given a folder. Returns what went, in words. Raises OSError."""
        if not self._cap_bytes:
            return []
        with self._lock:
            kept = {_name(renter) for renter in in_use()}
            caches = sorted(self._all(), key=lambda cache: cache.used_ns)
            total = sum(cache.held_bytes for cache in caches)
            said = []
            for cache in caches:
                too_much = total > self._cap_bytes or cache.too_many
                if too_much and cache.folder.name not in kept and folders.delete(cache.folder):
                    total -= cache.held_bytes
                    said.append(_gone(cache))
            return said

    def forget(self, in_use: Callable[[], Iterable[str]]) -> tuple[int, int]:
        """Delete all that no run uses. Return how many went, and their bytes. Raises OSError."""
        with self._lock:
            kept = {_name(renter) for renter in in_use()}
            gone = [
                cache
                for cache in self._all()
                if cache.folder.name not in kept and folders.delete(cache.folder)
            ]
            return len(gone), sum(cache.held_bytes for cache in gone)

    def _all(self) -> list[_Cache]:
        if not self._root.is_dir():
            return []
        return [_looked_at(folder, self._cap_bytes) for folder in self._root.iterdir()]


def _name(renter: str) -> str:
    return sha256(renter.encode()).hexdigest()[:32]


def _looked_at(folder: Path, cap_bytes: int) -> _Cache:
    try:
        used_ns = (folder / "used").stat().st_mtime_ns
    except OSError:
        used_ns = 0
    total, entries = 0, 0
    waiting = [os.fspath(folder / "files")]
    while waiting and entries <= MAX_ENTRIES:
        try:
            with os.scandir(waiting.pop()) as listed:
                for entry in listed:
                    entries += 1
                    info = entry.stat(follow_symlinks=False)
                    total += max(info.st_blocks * 512, _ENTRY_BYTES)
                    if stat.S_ISDIR(info.st_mode):
                        waiting.append(entry.path)
        except OSError:
            continue  # closed, or gone: what can't be counted is deleted as well as it can be
    return _Cache(folder, used_ns, total, entries > MAX_ENTRIES)


def _gone(cache: _Cache) -> str:
    why = f"more than {MAX_ENTRIES} files" if cache.too_many else "for want of room"
    return f"let go of a renter's cache ({format_bytes(cache.held_bytes)}): {why}"
