"""The broker's data folder, and in it the blobs: content-addressed files.

    lock         held (flock) by the one broker that uses the folder
    sublet.sqlite
    blobs/blake3/ab/cd/abcd...   a blob, by its digest: the algorithm's folder, the hex digits
    blobs/packs/ab/abcd...   a pack of chunks, named by the id that the database gave it
    blobs/tmp/            what is being written; swept when the broker starts
    blobs/quarantine/     what was found damaged, kept for a person to look at

A blob or a pack is written to tmp, fsynced, renamed and its folder fsynced, in this order: at every
moment it is whole, or not there, and whoever is told that it is kept can count on it after a power
cut. A pack's id is new, so nothing lies there yet, and nobody counts on it before it is kept.
"""

import errno
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from sublet_broker.adapters.blobs.disk import Disk
from sublet_broker.service.ports import BlobMissing, StorageFailing, StorageFull
from sublet_contracts.digests import ALGORITHM, digest_of, from_hex, hex_of

_NAME = re.compile(r"[0-9a-f]{64}")
_TWO = re.compile(r"[0-9a-f]{2}")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PRIVATE = 0o700
_READ_BYTES = 1 << 20


class FileBlobs:
    """ports.BlobStore in a folder. Any number of this process' threads may use it at once, and
    other processes read and delete in it; who else puts may have a folder taken away."""

    def __init__(self, root: Path, disk: Disk = os) -> None:
        self._disk = disk
        # Strings, for each blob that is read or written makes a path.
        self._root = str(root)
        self._blobs = f"{root}/{ALGORITHM}"
        self._above = str(root.parent)
        self._tmp = str(root / "tmp")
        self._token = secrets.token_hex(16)
        self._numbers = count()
        """Of what this process writes: with the token no other has the same."""
        self._folders = threading.RLock()
        self._kept_folders: set[str] = set()
        """Whose names this process has made durable: a broker before it may have died at that."""
        self._doubted: set[str] = set()
        """Folders that could not be fsynced: which of their names were lost isn't known."""

    def prepare(self) -> None:
        """Make the folders and sweep what a killed broker left half-written.

        Only the holder of the data folder may call it.
        """
        self._keep_folder(self._root)
        self._make_folder(self._tmp)
        for left in self._disk.listdir(self._tmp):
            self._remove(f"{self._tmp}/{left}")

    def put(self, digest: str, data: bytes) -> None:
        """See ports.BlobStore."""
        target = self._path(digest)
        if digest_of(data) != digest:
            raise ValueError("the content does not match its digest; send it again")
        folder = _parent(target)
        with _told_in_our_words():
            if folder not in self._kept_folders:
                self._keep_folder(folder)
            if folder not in self._doubted and self._holds(target, data):
                # It is whole; yet who wrote it may have died before its name was durable.
                try:
                    self._fsync_folder(folder)
                except OSError:
                    self._doubted.add(folder)  # as below
                    raise
            else:
                self._write(target, (data,))

    def put_pack(self, pack: str, parts: Iterable[bytes]) -> None:
        """See ports.BlobStore."""
        target = self._pack_path(pack)
        with _told_in_our_words():
            if _parent(target) not in self._kept_folders:
                self._keep_folder(_parent(target))
            self._write(target, parts)

    def read_pack(self, pack: str, offset_bytes: int, size_bytes: int) -> bytes:
        """See ports.BlobStore."""
        disk = self._disk
        try:
            descriptor = disk.open(self._pack_path(pack), os.O_RDONLY)
        except FileNotFoundError as error:
            raise BlobMissing(f"no pack {pack}") from error
        try:
            parts: list[bytes] = []
            while size_bytes:
                data = disk.pread(descriptor, size_bytes, offset_bytes)
                if not data:
                    break  # It is shorter than it should be.
                parts.append(data)
                offset_bytes += len(data)
                size_bytes -= len(data)
            return b"".join(parts)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return b""  # The disk can't read it any more: that is damage, too.
        finally:
            disk.close(descriptor)

    def has_pack(self, pack: str) -> bool:
        """See ports.BlobStore."""
        return self._is_file(self._pack_path(pack))

    def delete_pack(self, pack: str) -> None:
        """See ports.BlobStore."""
        self._remove(self._pack_path(pack))

    def set_pack_aside(self, pack: str) -> None:
        """See ports.BlobStore: it goes to quarantine/."""
        self._quarantine(self._pack_path(pack))

    def packs(self) -> Iterator[str]:
        """See ports.BlobStore."""
        for first in filter(_TWO.fullmatch, self._listed(f"{self._root}/packs")):
            for name in self._listed(f"{self._root}/packs/{first}"):
                if _NAME.fullmatch(name):
                    yield name

    def _write(self, target: str, parts: Iterable[bytes]) -> None:
        disk = self._disk
        written = f"{self._tmp}/{self._token}.{next(self._numbers)}"
        try:
            descriptor = self._new_file(written)
            try:
                for part in parts:
                    rest = memoryview(part)
                    while rest:
                        rest = rest[disk.write(descriptor, rest) :]
                disk.fsync(descriptor)
            finally:
                disk.close(descriptor)
            disk.rename(written, target)
        except BaseException:
            self._remove(written)
            raise
        try:
            self._fsync_folder(_parent(target))
        except OSError:
            # The kernel tells of a lost write once: a second fsync would be believed wrongly. So
            # the name goes, and what is sent again is written anew.
            self._doubted.add(_parent(target))
            self._remove(target)
            raise

    def _new_file(self, path: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            return self._disk.open(path, flags, 0o600)
        except FileNotFoundError:
            self._make_folder(self._tmp)
            return self._disk.open(path, flags, 0o600)

    def get(self, digest: str) -> bytes:
        """See ports.BlobStore. A damaged blob is moved to quarantine/ and counts as missing."""
        path = self._path(digest)
        try:
            data = self._read(path)
        except FileNotFoundError as error:
            raise BlobMissing(f"no blob {digest}") from error
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # The disk can't read it any more: that is damage, too.
            data = b""
        if digest_of(data) != digest:
            self._quarantine(path)
            raise BlobMissing(f"blob {digest} has been damaged on disk; it is in quarantine")
        return data

    def has(self, digest: str) -> bool:
        """See ports.BlobStore."""
        return self._is_file(self._path(digest))

    def _is_file(self, path: str) -> bool:
        try:
            return stat.S_ISREG(self._disk.stat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def delete(self, digest: str) -> None:
        """See ports.BlobStore."""
        self._remove(self._path(digest))

    def names(self) -> Iterator[str]:
        """See ports.BlobStore."""
        for first in filter(_TWO.fullmatch, self._listed(self._blobs)):
            for second in filter(_TWO.fullmatch, self._listed(f"{self._blobs}/{first}")):
                for name in self._listed(f"{self._blobs}/{first}/{second}"):
                    if _NAME.fullmatch(name):
                        yield from_hex(name)

    def _path(self, digest: str) -> str:
        digits = hex_of(digest)
        return f"{self._blobs}/{digits[:2]}/{digits[2:4]}/{digits}"

    def _pack_path(self, pack: str) -> str:
        if not _NAME.fullmatch(pack):
            raise ValueError("a pack's id is 64 lower-case hex digits")
        return f"{self._root}/packs/{pack[:2]}/{pack}"

    def _keep_folder(self, folder: str) -> None:
        """Make a folder where it isn't there, and its name durable."""
        with self._folders:
            if folder in self._kept_folders:
                return
            above = self._above
            if folder != self._root:
                above = _parent(folder)
                self._keep_folder(above)
            if not self._make_folder(folder) and folder != self._root:
                # Nothing is put into one whose name isn't durable. An empty one may be left by a
                # broker that died, and its name be lost already: so it is made anew.
                self._remove_empty(folder)
                self._make_folder(folder)
            try:
                self._fsync_folder(above)
            except OSError:
                # As above.
                self._remove_empty(folder)
                raise
            self._kept_folders.add(folder)

    def _remove_empty(self, folder: str) -> None:
        with suppress(OSError):
            self._disk.rmdir(folder)

    def _make_folder(self, folder: str) -> bool:
        """Return whether it is new."""
        try:
            self._disk.mkdir(folder, _PRIVATE)
        except OSError:
            if not self._is_folder(folder):
                raise
            return False
        return True

    def _is_folder(self, path: str) -> bool:
        try:
            return stat.S_ISDIR(self._disk.stat(path).st_mode)
        except OSError:
            return False

    def _fsync_folder(self, folder: str) -> None:
        descriptor = self._disk.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._disk.fsync(descriptor)
        finally:
            self._disk.close(descriptor)

    def _holds(self, path: str, data: bytes) -> bool:
        try:
            return self._disk.stat(path).st_size == len(data) and self._read(path) == data
        except OSError:
            return False  # not there, or not readable: it is written anew

    def _read(self, path: str) -> bytes:
        disk = self._disk
        descriptor = disk.open(path, os.O_RDONLY)
        try:
            # One byte more than there should be: what is shorter than that was the end.
            left = disk.fstat(descriptor).st_size + 1
            data = disk.read(descriptor, left)
            if len(data) == left - 1:
                return data
            parts = [data]
            while data:
                data = disk.read(descriptor, _READ_BYTES)
                parts.append(data)
            return b"".join(parts)
        finally:
            disk.close(descriptor)

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._disk.unlink(path)

    def _listed(self, folder: str) -> list[str]:
        try:
            return self._disk.listdir(folder)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return []

    def _quarantine(self, path: str) -> None:
        aside = f"{self._root}/quarantine"
        self._make_folder(aside)
        name = path.rpartition("/")[2]
        try:
            self._disk.rename(path, f"{aside}/{name}.{secrets.token_hex(4)}")
        except FileNotFoundError:
            return  # another reader was first


@contextmanager
def _told_in_our_words() -> Iterator[None]:
    """What a disk says while something is written. Raises StorageFull, or the error as it is."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EROFS:
            raise StorageFailing("the broker's disk can't be written: see its log") from error
        if error.errno not in _FULL:
            raise
        raise StorageFull("the broker's disk is full: free some space on it") from error


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
