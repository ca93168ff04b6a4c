"""Folders that a job writes into and the agent works in: measured, asked through, handed over.

A job may put anything there, links too, so nothing here follows one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

TOO_DEEP_BYTES = 2**60
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PASSES = 3
_ENTRY_BYTES = 4096  # what an empty file costs at least, so that a million of them count


def usage(paths: Iterable[Path], stop_at_bytes: int | None = None) -> int:
    """Return the bytes on disk below `paths`, each file once, links not followed.

    Ends early once `stop_at_bytes` is passed, so that a job can't keep the agent counting. A path
    that vanishes meanwhile, or that is closed to us, counts nothing; one that is too deep to be
    looked at counts more than any limit.
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
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return total + TOO_DEEP_BYTES
            continue
    return total


def delete(path: Path) -> bool:
    """Delete a folder that a job filled, however deep it is and whatever it has closed. Return
    whether it is gone: what the system keeps (a file that root made immutable) is left."""
    top = _parent(path)
    if top is None:
        return not os.path.lexists(path)
    try:
        return delete_in(top, path.name)
    finally:
        os.close(top)


def delete_in(above: int, name: str) -> bool:
    """Delete what is called so in an open folder; return whether it is gone.

    Level by level: what lies in a subfolder is moved up beside it first. So it takes no recursion,
    and two descriptors, however deep the job has gone.
    """
    for _ in range(_PASSES):
        folder = _opened(name, above)
        if folder is None:
            return _unlink(name, above)
        try:
            _empty(folder)
        finally:
            os.close(folder)
        try:
            os.rmdir(name, dir_fd=above)
        except FileNotFoundError:
            return True
        except OSError:
            continue  # somebody still writes there, or it can't be emptied
        return True
    return False


def _empty(top: int) -> None:
    waiting: list[str] = []
    with os.scandir(top) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.name)
            else:
                _unlink(entry.name, top)
    moved = 0
    while waiting:
        name = waiting.pop()
        folder = _opened(name, top)
        if folder is None:
            continue
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False):
                        _unlink(entry.name, folder)
                        continue
                    moved += 1
                    beside = f".{secrets.token_hex(8)}-{moved}"
                    if _move_up(entry.name, folder, beside, top):
                        waiting.append(beside)
        finally:
            os.close(folder)
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=top)


def _move_up(name: str, folder: int, beside: str, top: int) -> bool:
    for _ in range(2):
        try:
            os.rename(name, beside, src_dir_fd=folder, dst_dir_fd=top)
        except PermissionError:
            # Its owner has closed it, and who is moved has to be told where its parent is.
            held = _opened(name, folder)
            if held is not None:
                os.close(held)
        except OSError:
            return False
        else:
            return True
    return False


def _opened(name: str, above: int) -> int | None:
    """Open a folder, also where its owner, who we are, has closed it; None: it is none."""
    try:
        held = os.open(name, os.O_PATH | _FOLDER, dir_fd=above)
    except OSError:
        return None
    try:
        mode = stat.S_IMODE(os.fstat(held).st_mode)
        if mode & stat.S_IRWXU != stat.S_IRWXU:
            with contextlib.suppress(OSError):
                os.chmod(f"/proc/self/fd/{held}", mode | stat.S_IRWXU)
        return os.open(".", _FOLDER, dir_fd=held)
    except OSError:
        return None
    finally:
        os.close(held)


def _parent(path: Path) -> int | None:
    try:
        return os.open(path.parent, _FOLDER)
    except OSError:
        return None


def _unlink(name: str, folder: int) -> bool:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def ask(checkpoint_dir: Path, question: Literal["STOP", "SAVE"]) -> None:
    """Put the question where the job's helper looks for it; nothing if it or no folder is there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        os.close(os.open(checkpoint_dir / question, flags, 0o644))
    except OSError:
        return  # asked already; or whatever the job has made of its folder is its own loss


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
