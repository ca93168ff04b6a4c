"""Folders that a power cut leaves where they are: a name is durable once its folder was fsynced."""

import errno
import os
from contextlib import suppress
from pathlib import Path

_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder, and what is missing above it, where it isn't there. Its name is durable before
    anything is put into it. Raises OSError."""
    made = True
    try:
        folder.mkdir(mode)
    except FileNotFoundError:
        make_folder(folder.parent)
        folder.mkdir(mode, exist_ok=True)
    except OSError:
        if not folder.is_dir():
            raise
        made = False
    try:
        if made:
            # Who made the folder above may have died before that one's name was durable.
            _keep_names(folder.parent.parent)
        _keep_names(folder.parent)
    except OSError:
        # The kernel tells of a lost write once: what is there at the next attempt is believed.
        with suppress(OSError):
            folder.rmdir()
        raise


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep_names(folder: Path) -> None:
    try:
        fsync_folder(folder)
    except OSError as error:
        if error.errno not in _NOT_OURS:  # another's folder, with one for us in it
            raise
