"""A few megabytes that the agent keeps for itself: it can write even when the disk is full.

The file is there for nothing but to be deleted when a write finds no room. It comes back once there
is enough again.
"""

import functools
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from sublet_agent.adapters.workspace.disk_space import LEAST_FREE_BYTES

RESERVE_BYTES = 8 * 1024 * 1024
P = ParamSpec("P")
T = TypeVar("T")


class Reserve:
    """The file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held = path.exists()

    def hold(self) -> None:
        """Take the room, where it isn't taken yet and there is plenty. Cheap: call it often."""
        if self._held or shutil.disk_usage(self._path.parent).free < 2 * LEAST_FREE_BYTES:
            return
        try:
            with self._path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError:
            # Somebody was quicker: next time.
            self._path.unlink(missing_ok=True)
            return
        self._held = True

    def release(self) -> bool:
        """Give the room away; False: it was given away already."""
        held, self._held = self._held, False
        self._path.unlink(missing_ok=True)
        return held


class HasReserve(Protocol):
    """Who writes, and may use it."""

    @property
    def reserve(self) -> Reserve: ...


S = TypeVar("S", bound=HasReserve)


def with_reserve(write: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Have a method that writes to SQLite, all or nothing, try again with the reserve's room."""

    def written(self: S, /, *arguments: P.args, **options: P.kwargs) -> T:
        try:
            return write(self, *arguments, **options)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL or not self.reserve.release():
                raise
            return write(self, *arguments, **options)

    functools.update_wrapper(written, write)
    return written
