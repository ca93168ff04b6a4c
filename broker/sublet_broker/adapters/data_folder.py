"""A broker's data folder: one process at a time."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Self

from sublet_contracts.durable import make_folder

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
        make_folder(root, _PRIVATE)
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
