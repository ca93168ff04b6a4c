"""Fills a run's folder with what an image, or an input, has in one: the other side of unpack.py.

The archive is passed through and not read here. It is bounded as it passes, and dropped once the
unpacker has said that it is too much.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from sublet_agent.adapters.workspace.unpack import MAX_DEPTH, Order
from sublet_agent.core.runner_port import Cancel

_MODULE = "sublet_agent.adapters.workspace.unpack"
_OVERHEAD_BYTES = 1 << 30
"""what may pass beside the content: heads, and what is left out"""
_PIECE_BYTES = 1 << 20
_ANSWER_BYTES = 4096
_BLOCK_BYTES = 512
MountPoint = tuple[str, Literal["file", "folder"]]


class SeedTooLarge(Exception):
    """It is more than the run may begin with."""


class SeedBroken(Exception):
    """It is no archive that can be unpacked."""


class SeedCancelled(Exception):
    """Nobody waits for it any more."""


def seed(
    archive: Iterable[bytes],
    folder: Path,
    *,
    user: tuple[int, int],
    max_bytes: int,
    max_entries: int,
    leave_out: tuple[str, ...] = (),
    mount_points: tuple[MountPoint, ...] = (),
    cancel: Cancel | None = None,
) -> int:
    """Unpack a tar archive into a folder that is the user's; return the bytes of its files.

    Raises SeedTooLarge, SeedBroken, SeedCancelled, OSError; then the folder holds a part of it.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    held = os.open(folder, flags)
    try:
        order = Order(held, max_bytes, max_entries, *user, leave_out, mount_points)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-m", _MODULE, order.to_json()],
            cwd="/",
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(held,),
            start_new_session=True,  # Ctrl-C at a terminal is for the agent
        )
    finally:
        os.close(held)
    with process:
        try:
            _pass_on(archive, process, max_bytes + _OVERHEAD_BYTES, cancel)
            assert process.stdout is not None
            said = process.stdout.read(_ANSWER_BYTES)
            process.wait()
        except BaseException:
            process.kill()
            raise
    return _bytes_of(said)


def _pass_on(
    archive: Iterable[bytes],
    process: subprocess.Popen[bytes],
    left_bytes: int,
    cancel: Cancel | None,
) -> None:
    assert process.stdin is not None
    try:
        for piece in archive:
            if cancel is not None and cancel.is_set():
                raise SeedCancelled
            left_bytes -= len(piece)
            if left_bytes < 0:
                raise SeedTooLarge
            process.stdin.write(piece)
        process.stdin.close()
    except BrokenPipeError:
        return  # it has had enough, and says why


def _bytes_of(answer: bytes) -> int:
    try:
        said: dict[str, Any] = json.loads(answer)
    except ValueError as error:
        raise SeedBroken("the unpacker was ended") from error  # for its time, or its memory
    if "too_much" in said:
        raise SeedTooLarge(said["too_much"])
    if "failed" in said:
        raise OSError(said["errno"], said["failed"])
    if "broken" in said:
        raise SeedBroken(said["broken"])
    return int(said["bytes"])


def is_empty_folder(begin: bytes) -> bool:
    """Say whether an archive that begins so, with two blocks, is that of a folder with nothing in
    it, as far as can be told without reading it."""
    head, rest = begin[:_BLOCK_BYTES], begin[_BLOCK_BYTES : 2 * _BLOCK_BYTES]
    return len(rest) == _BLOCK_BYTES and head[156:157] == b"5" and not any(rest)


def packed_folder(folder: Path) -> Iterator[bytes]:
    """Return a folder's content as a tar archive: plain files, folders, and links as they are. For
    inputs, which the agent has placed itself. Raises OSError."""
    for above, folders, files in os.walk(folder):
        if len(Path(above).relative_to(folder).parts) >= MAX_DEPTH:
            folders.clear()
        for name in (*folders, *files):
            path = os.path.join(above, name)
            info = os.lstat(path)
            entry = tarfile.TarInfo(os.path.relpath(path, folder))
            entry.mode, entry.mtime = stat.S_IMODE(info.st_mode), int(info.st_mtime)
            if stat.S_ISDIR(info.st_mode):
                entry.type = tarfile.DIRTYPE
                yield entry.tobuf()
            elif stat.S_ISREG(info.st_mode):
                entry.size = info.st_size
                yield entry.tobuf()
                yield from _content(path, info.st_size)
            elif stat.S_ISLNK(info.st_mode):
                entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(path)
                yield entry.tobuf()
    yield bytes(2 * _BLOCK_BYTES)


def _content(path: str, size: int) -> Iterator[bytes]:
    left = size
    with open(path, "rb") as file:
        while left and (piece := file.read(min(left, _PIECE_BYTES))):
            left -= len(piece)
            yield piece
    yield bytes(left + -size % _BLOCK_BYTES)
