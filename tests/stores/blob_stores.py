"""The blob stores under test, each in the same few words: a new one adds an opener to OPENERS.

What the suite needs beyond ports.BlobStore it needs of every store: a second client of the same
place, a way to damage what lies there, and, where that can be simulated, a place that is full.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from sublet_broker.adapters.blobs.file_blobs import FileBlobs
from sublet_broker.adapters.memory.blobs import MemoryBlobs
from sublet_broker.service.ports import BlobStore


@dataclass(frozen=True)
class BlobPlace:
    """One empty place for blobs, and what a test may do to it behind the store's back."""

    store: BlobStore
    other_client: BlobStore
    """Another client of the same place, as another process would have it: at any time it reads and
    deletes; it puts only while nobody else does, for a broker has its place to itself."""
    damage: Callable[[str], None]
    """Flip a bit of the blob with this SHA-256, which lies there."""
    damage_pack: Callable[[str, int], None]
    """Flip a bit of that byte of a pack, which lies there."""
    full: Callable[[], AbstractContextManager[None]] | None
    """While this is entered there is no room for another byte. None: it has no end of its own."""


def open_memory(_: Path) -> BlobPlace:
    """Content in memory: it has one process, and no disk that could be full."""
    store = MemoryBlobs()
    return BlobPlace(store, store, store.damage, store.damage_pack, full=None)


def open_files(folder: Path) -> BlobPlace:
    """Content in files below `folder`."""
    root = folder / "blobs"
    store = FileBlobs(root)
    store.prepare()

    def damage(sha256: str) -> None:
        path = root / sha256[:2] / sha256[2:4] / sha256
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:] if data else b"\0")

    def damage_pack(pack: str, offset_bytes: int) -> None:
        path = root / "packs" / pack[:2] / pack
        data = bytearray(path.read_bytes())
        data[offset_bytes] ^= 1
        path.write_bytes(data)

    return BlobPlace(store, FileBlobs(root), damage, damage_pack, full=_disk_full)


@contextmanager
def _disk_full() -> Iterator[None]:
    """A disk takes the first half of what is written, and then says that it is full."""
    really_write = os.write

    def write(descriptor: int, data: Any) -> int:
        really_write(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(os, "write", write):
        yield


OPENERS: dict[str, Callable[[Path], BlobPlace]] = {"memory": open_memory, "files": open_files}
"""By name: what makes an empty place, for which it may use an empty folder."""
