"""The blob stores under test, each in the same few words: a new one adds an opener to OPENERS.

What the suite needs beyond ports.BlobStore it needs of every store: a second client of the same
place, a way to damage what lies there, and, where that can be simulated, a place that is full.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from sublet_broker.adapters.blobs.file_blobs import FileBlobs
from sublet_broker.adapters.blobs.s3_blobs import S3Blobs, blob_key, pack_key
from sublet_broker.adapters.blobs.s3_place import S3Place
from sublet_broker.adapters.memory.blobs import MemoryBlobs
from sublet_broker.service.ports import BlobStore
from sublet_contracts.digests import hex_of
from tests import services
from tests.stores import s3_servers
from tests.stores.s3_front import Fault, Front, front


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
    examples: int = 30
    """How many sequences of calls are tried: fewer where each is a request."""
    whole: bool = True
    """Nobody sees what is half written. s3rver writes into the file that it serves."""


def open_memory(_: Path) -> BlobPlace:
    """Content in memory: it has one process, and no disk that could be full."""
    store = MemoryBlobs()
    return BlobPlace(store, store, store.damage, store.damage_pack, full=None)


def open_files(folder: Path) -> BlobPlace:
    """Content in files below `folder`."""
    root = folder / "blobs"
    store = FileBlobs(root)
    store.prepare()

    def damage(digest: str) -> None:
        digits = hex_of(digest)
        path = root / "blake3" / digits[:2] / digits[2:4] / digits
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


def open_moto(_: Path) -> BlobPlace:
    """Content in moto's server, behind a front that can say that it is full."""
    before = _front_of_moto()
    place = s3_servers.new_place(before.endpoint)
    store, other = (S3Blobs(place, lambda: s3_servers.KEY) for _ in range(2))

    def full(method: str, path: str) -> Fault | None:
        return Fault(507, "QuotaExceeded") if method == "PUT" else None

    return BlobPlace(
        store, other, _damage_s3(place), _damage_s3_pack(place), lambda: before.does(full), 3
    )


def open_s3rver(_: Path) -> BlobPlace:
    """Content in s3rver."""
    services.require("s3rver")
    place = s3_servers.new_place(s3_servers.s3rver())
    store, other = (S3Blobs(place, lambda: s3_servers.KEY) for _ in range(2))
    return BlobPlace(store, other, _damage_s3(place), _damage_s3_pack(place), None, 3, whole=False)


@functools.cache
def _front_of_moto() -> Front:
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(front(s3_servers.moto()))


def _damage_s3(place: S3Place) -> Callable[[str], None]:
    objects = s3_servers.objects(place)

    def damage(name: str) -> None:
        data = bytes(objects.get(blob_key(name)).bytes())
        objects.put(blob_key(name), bytes([data[0] ^ 1]) + data[1:] if data else b"\0")

    return damage


def _damage_s3_pack(place: S3Place) -> Callable[[str, int], None]:
    objects = s3_servers.objects(place)

    def damage(pack: str, offset_bytes: int) -> None:
        data = bytearray(objects.get(pack_key(pack)).bytes())
        data[offset_bytes] ^= 1
        objects.put(pack_key(pack), bytes(data))

    return damage


OPENERS: dict[str, Callable[[Path], BlobPlace]] = {
    "memory": open_memory,
    "files": open_files,
    "moto": open_moto,
    "s3rver": open_s3rver,
}
"""By name: what makes an empty place, for which it may use an empty folder."""
CAN_BE_FULL = ("files", "moto")
"""Those of which a test can say that they are."""
