"""The small files of a run's folder, written durably and read with care.

On this runner a job has the agent's own rights, so whatever lies there may be the job's work: a
pipe that nobody writes to, a link, a gigabyte. Nothing here waits, follows or swallows.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import IO, Any

_NO_SURPRISE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY


def replace(path: Path, value: dict[str, Any], *, durably: bool = False) -> None:
    """Replace a JSON file, so that whoever reads it finds the old one or the new one.

    Raises OSError; what lies in the way is neither followed nor written into.
    """
    tmp = path.with_suffix(".tmp")
    tmp.unlink(missing_ok=True)
    with tmp.open("x") as file:
        json.dump(value, file)
        if durably:
            file.flush()
            os.fsync(file.fileno())
    os.replace(tmp, path)


def write_durably(path: Path, value: dict[str, Any]) -> None:
    """Replace a JSON file so that after a crash it is the old one or the new one. As `replace`."""
    replace(path, value, durably=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def open_plain(path: Path) -> IO[bytes]:
    """Open a plain file for reading. Raises OSError, for a link, a pipe or a folder as well."""
    handle = os.open(path, _NO_SURPRISE)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """Return a plain file's content. Raises OSError; a file that is longer is one as well."""
    with open_plain(path) as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise OSError(errno.EFBIG, f"more than {limit_bytes} bytes", str(path))
    return content
