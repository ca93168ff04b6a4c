"""Writes a tree: its files at their full size first, then chunks as they come, in any order and
from several threads, each straight to all its places. What is nothing but zeros is left a hole.

Nothing is fsynced: who needs that to survive a power cut does it, or begins anew.
"""

import os
import weakref
from pathlib import Path

from sublet_contracts.tree import CHUNK_BYTES, Chunk, TreeIndex

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_THERE = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_ZEROS = bytes(CHUNK_BYTES)


class TreeWriter:
    """A tree below `root` (an empty or new folder) that is being filled. Raises OSError."""

    def __init__(self, index: TreeIndex, root: Path) -> None:
        self._places: dict[str, list[tuple[str, int]]] = {}
        self.chunks: list[Chunk] = []
        """each distinct one, in the order in which files need them"""
        folders = {""}
        root.mkdir(parents=True, exist_ok=True)
        # What is written late, after somebody gave up and began anew there, goes nowhere.
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._root)
        for entry in index.files:
            _make_folder(root, entry.path, folders)
            mode = 0o755 if entry.executable else 0o644
            descriptor = os.open(root / entry.path, _NEW, mode)
            try:
                os.ftruncate(descriptor, entry.size_bytes)
            finally:
                os.close(descriptor)
            at = 0
            for chunk in entry.chunks:
                places = self._places.setdefault(chunk.digest, [])
                if not places:
                    self.chunks.append(chunk)
                places.append((entry.path, at))
                at += chunk.size_bytes
        for link in index.links:
            _make_folder(root, link.path, folders)
            os.symlink(link.target, root / link.path)

    def write(self, chunk: Chunk, data: bytes) -> None:
        """Write a chunk, whose content the caller has compared with its digest, to its places."""
        if not data[0] and data == _ZEROS[: len(data)]:
            return
        for path, at in self._places[chunk.digest]:
            descriptor = os.open(path, _THERE, dir_fd=self._root)
            try:
                _write_all(descriptor, data, at)
            finally:
                os.close(descriptor)


def _make_folder(root: Path, path: str, made: set[str]) -> None:
    folder = path.rpartition("/")[0]
    if folder not in made:
        (root / folder).mkdir(parents=True, exist_ok=True)
        made.add(folder)


def _write_all(descriptor: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written
