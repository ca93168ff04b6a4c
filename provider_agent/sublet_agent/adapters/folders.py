"""Folders that a job writes into and the agent works in: measured, asked through, handed over.

A job may put anything there, links too, so nothing here follows one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

_ENTRY_BYTES = 4096  # what an empty file costs at least, so that a million of them count


def usage(paths: Iterable[Path], stop_at_bytes: int | None = None) -> int:
    """Return the bytes on disk below `paths`, each file once, links not followed.

    Ends early once `stop_at_bytes` is passed, so that a job can't keep the agent counting. A path
    that vanishes meanwhile counts nothing.
    """
    total = 0
    seen: set[tuple[int, int]] = set()
    waiting = [os.fspath(path) for path in paths]
    while waiting and (stop_at_bytes is None or total <= stop_at_bytes):
        path = waiting.pop()
        try:
            info = os.lstat(path)
            if (info.st_dev, info.st_ino) in seen:
                continue
            seen.add((info.st_dev, info.st_ino))
            total += max(info.st_blocks * 512, _ENTRY_BYTES)
            if stat.S_ISDIR(info.st_mode):
                with os.scandir(path) as entries:
                    waiting.extend(entry.path for entry in entries)
        except FileNotFoundError:
            continue
    return total


def ask(checkpoint_dir: Path, question: Literal["STOP", "SAVE"]) -> None:
    """Put the question where the job's helper looks for it; nothing if it or no folder is there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        os.close(os.open(checkpoint_dir / question, flags, 0o644))
    except (FileExistsError, FileNotFoundError):
        return


def hand_over(path: Path, uid: int, gid: int) -> None:
    """Give a folder and all in it to the job's user; as root only, links themselves included."""
    if os.geteuid() != 0:
        return
    os.chown(path, uid, gid, follow_symlinks=False)
    for parent, folders, files in os.walk(path):
        for name in (*folders, *files):
            os.chown(os.path.join(parent, name), uid, gid, follow_symlinks=False)


def make_readable(path: Path) -> None:
    """Let every user read a folder and all in it; links are left alone."""
    for parent, _, files in os.walk(path):
        _add_mode(parent, 0o555)
        for name in files:
            _add_mode(os.path.join(parent, name), 0o444)


def _add_mode(path: str, bits: int) -> None:
    mode = os.lstat(path).st_mode
    if not stat.S_ISLNK(mode) and mode & bits != bits:
        os.chmod(path, stat.S_IMODE(mode) | bits)
