"""The broker's data folder, and in it the blobs: content-addressed files.

    lock         held (flock) by the one broker that uses the folder
    sublet.sqlite
    blobs/ab/cd/abcd...   a blob, named by its SHA-256
    blobs/tmp/            what is being written; swept when the broker starts
    blobs/quarantine/     what was found damaged, kept for a person to look at

A blob is written to tmp, fsynced, renamed and its folder fsynced, in this order: at every moment it
is whole, or not there, and whoever is told that it is kept can count on it after a power cut.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from sublet_broker.service.ports import BlobMissing, StorageFailing, StorageFull

_NAME = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PRIVATE = 0o700


class FolderInUse(Exception):
    """Another broker uses this data folder."""


class DataFolder:
    """The folder of `--data`, locked for as long as this object is open."""

    def __init__(self, root: Path, lock: int) -> None:
        self.root = root
        self._lock: int | None = lock

    @classmethod
    def open(cls, root: Path) -> Self:
        """Make the folder if need be and take it. Raises FolderInUse, or OSError where it can't
        be made."""
        root = root.absolute()
        root.mkdir(parents=True, exist_ok=True, mode=_PRIVATE)
        lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            who = f" (process {holder})" if holder else ""
            raise FolderInUse(
                f"{root} is in use by another broker{who}: stop it, or name another --data"
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return cls(root, lock)

    @property
    def database_url(self) -> str:
        """The embedded database, for SQLAlchemy."""
        return f"sqlite:///{self.root / 'sublet.sqlite'}"

    @property
    def blobs_root(self) -> Path:
        """Where FileBlobs keeps its files."""
        return self.root / "blobs"

    def close(self) -> None:
        """Let another broker have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class FileBlobs:
    """ports.BlobStore in a folder. Any number of threads and processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tmp = root / "tmp"
        self._kept_folders: set[Path] = set()
        """Whose names this process has made durable: a broker before it may have died at that."""

    def prepare(self) -> None:
        """Make the folders and sweep what a killed broker left half-written.

        Only the holder of the data folder may call it.
        """
        self._tmp.mkdir(parents=True, exist_ok=True, mode=_PRIVATE)
        for left in self._tmp.iterdir():
            left.unlink(missing_ok=True)

    def put(self, sha256: str, data: bytes) -> None:
        """See ports.BlobStore."""
        target = self._path(sha256)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("the content does not match its SHA-256; send it again")
        with _storage_full():
            self._keep_folder(target.parent)
            if _holds(target, data):
                # It is whole; yet who wrote it may have died before its name was durable.
                _fsync_folder(target.parent)
            else:
                self._write(target, data)

    def _write(self, target: Path, data: bytes) -> None:
        self._tmp.mkdir(parents=True, exist_ok=True, mode=_PRIVATE)
        written = self._tmp / secrets.token_hex(16)
        try:
            descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            written.rename(target)
        except BaseException:
            written.unlink(missing_ok=True)
            raise
        try:
            _fsync_folder(target.parent)
        except OSError:
            # The kernel tells of a lost write once: a second fsync would be believed wrongly. So
            # the name goes, and what is sent again is written anew.
            target.unlink(missing_ok=True)
            raise

    def get(self, sha256: str) -> bytes:
        """See ports.BlobStore. A damaged blob is moved to quarantine/ and counts as missing."""
        path = self._path(sha256)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise BlobMissing(f"no blob {sha256}") from error
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # The disk can't read it any more: that is damage, too.
            data = b""
        if hashlib.sha256(data).hexdigest() != sha256:
            self._quarantine(path)
            raise BlobMissing(f"blob {sha256} has been damaged on disk; it is in quarantine")
        return data

    def has(self, sha256: str) -> bool:
        """See ports.BlobStore."""
        return self._path(sha256).is_file()

    def delete(self, sha256: str) -> None:
        """See ports.BlobStore."""
        self._path(sha256).unlink(missing_ok=True)

    def names(self) -> Iterator[str]:
        """See ports.BlobStore."""
        for path in self._root.glob("[0-9a-f][0-9a-f]/[0-9a-f][0-9a-f]/*"):
            if _NAME.fullmatch(path.name):
                yield path.name

    def _path(self, sha256: str) -> Path:
        if not _NAME.fullmatch(sha256):
            raise ValueError("a blob's name is 64 lower-case hex digits")
        return self._root / sha256[:2] / sha256[2:4] / sha256

    def _keep_folder(self, folder: Path) -> None:
        """Make a folder where it isn't there, and its name durable."""
        if folder in self._kept_folders:
            return
        if folder == self._root:
            folder.mkdir(parents=True, exist_ok=True, mode=_PRIVATE)
        else:
            self._keep_folder(folder.parent)
            folder.mkdir(exist_ok=True, mode=_PRIVATE)
        try:
            _fsync_folder(folder.parent)
        except OSError:
            # As above. One that holds anything stays: its name was durable once.
            with suppress(OSError):
                folder.rmdir()
            raise
        self._kept_folders.add(folder)

    def _quarantine(self, path: Path) -> None:
        aside = self._root / "quarantine"
        aside.mkdir(exist_ok=True, mode=_PRIVATE)
        try:
            path.rename(aside / f"{path.name}.{secrets.token_hex(4)}")
        except FileNotFoundError:
            return  # another reader was first


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False  # not there, or not readable: it is written anew


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EROFS:
            raise StorageFailing("the broker's disk can't be written: see its log") from error
        if error.errno not in _FULL:
            raise
        raise StorageFull("the broker's disk is full: free some space on it") from error
