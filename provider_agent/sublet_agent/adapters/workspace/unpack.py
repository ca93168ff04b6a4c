"""Unpacks what an image has in a folder into a run's folder, in a process that can do nothing else.

    python -I -m sublet_agent.adapters.workspace.unpack ORDER

The archive comes on stdin and is a stranger's: he made the image. So it is read here: as the job's
user, without a capability or a way to get one, within memory, processor time and file size. Every
step of a path is opened by itself and no link is followed, so nothing lands outside the folder.
What becomes of it is one line of JSON on stdout: `bytes` and `entries` that are there now, or
`too_much`, or `broken`.

Taken along are folders, plain files, and links as they are. Left out are devices, pipes, sockets,
owners, and the bits that would run a file as somebody else. All is the job's to read and write.
ORDER is JSON, as `Order` has it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO, Literal

from sublet_agent.adapters.workspace.reader import become

MAX_DEPTH = 100
MEMORY_BYTES = 512 * 1024 * 1024
CPU_S = 120
_PIECE_BYTES = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class TooMuch(Exception):
    """The archive has more than the run may begin with."""


@dataclass(frozen=True)
class Order:
    """What is to be unpacked where."""

    folder: int
    """descriptor of the folder"""
    max_bytes: int
    max_entries: int
    uid: int
    gid: int
    leave_out: tuple[str, ...] = ()
    """what of the archive is not wanted, with all below it"""
    mount_points: tuple[tuple[str, Literal["file", "folder"]], ...] = ()
    """what is made where it isn't there: something is mounted over it"""

    def to_json(self) -> str:
        """Write it as `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        """Read it."""
        told = json.loads(text)
        told["leave_out"] = tuple(told["leave_out"])
        told["mount_points"] = tuple((path, kind) for path, kind in told["mount_points"])
        return cls(**told)


def parts_of(name: str) -> list[str] | None:
    """Return the steps of a path in an archive; None: it leads out, or is too deep."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or len(parts) > MAX_DEPTH or any("\0" in part for part in parts):
        return None
    return parts


class Unpacker:
    """One archive into one folder."""

    def __init__(self, order: Order) -> None:
        self._top = order.folder
        self._bytes_left = order.max_bytes
        self._entries_left = order.max_entries
        self._leave_out = [parts_of(path) or [] for path in order.leave_out]
        self._mount_points = order.mount_points
        self._now_s = time.time()
        self.bytes = self.entries = 0
        self._folder_times: list[tuple[list[str], int, float]] = []

    def unpack(self, stream: IO[bytes]) -> None:
        """Unpack it. Raises TooMuch, tarfile.TarError, OSError."""
        with tarfile.open(fileobj=stream, mode="r|", errorlevel=1) as archive:
            for entry in archive:
                self._entries_left -= 1
                if self._entries_left < 0:
                    raise TooMuch("files")
                parts = parts_of(entry.name)
                if parts is not None and not self._is_left_out(parts):
                    self._take(archive, entry, parts)
        # Inside first, and now that nothing comes into them any more.
        for parts, mode, mtime in reversed(self._folder_times):
            with self._folder(parts) as folder:
                os.fchmod(folder, mode)
                os.utime(folder, (mtime, mtime))
        for path, kind in self._mount_points:
            self._make_mount_point(parts_of(path) or [], kind)

    def _is_left_out(self, parts: list[str]) -> bool:
        return any(parts[: len(path)] == path for path in self._leave_out)

    def _make_mount_point(self, parts: list[str], kind: str) -> None:
        """Made here it is the job's; made by the engine it would be root's. Where the image has a
        link or a file on the way it is the engine's to say what it makes of that."""
        with contextlib.suppress(OSError):
            if kind == "folder":
                with self._folder(parts, make=True):
                    return
            with self._folder(parts[:-1], make=True) as above:
                os.close(os.open(parts[-1], _NEW_FILE, 0o644, dir_fd=above))

    def _take(self, archive: tarfile.TarFile, entry: tarfile.TarInfo, parts: list[str]) -> None:
        if not parts:
            return  # the folder itself: it is the job's, with rights of ours
        mtime = min(max(0.0, float(entry.mtime)), self._now_s)
        with self._folder(parts[:-1], make=True) as above:
            name = parts[-1]
            # An archive may name a thing twice: the first counts.
            with contextlib.suppress(FileExistsError):
                if entry.isdir():
                    os.mkdir(name, 0o700, dir_fd=above)
                    self._folder_times.append((parts, entry.mode & 0o777 | 0o700, mtime))
                elif entry.issym():
                    os.symlink(entry.linkname, name, dir_fd=above)
                elif entry.islnk():
                    self._link(entry.linkname, name, above)
                elif entry.isreg():
                    self._write(archive, entry, name, above, mtime)
                else:
                    return
                self.entries += 1

    def _link(self, target: str, name: str, above: int) -> None:
        parts = parts_of(target)
        if not parts:
            return
        with contextlib.suppress(FileNotFoundError), self._folder(parts[:-1]) as there:
            os.link(parts[-1], name, src_dir_fd=there, dst_dir_fd=above, follow_symlinks=False)

    def _write(
        self,
        archive: tarfile.TarFile,
        entry: tarfile.TarInfo,
        name: str,
        above: int,
        mtime: float,
    ) -> None:
        content = archive.extractfile(entry)
        assert content is not None
        file = os.open(name, _NEW_FILE, 0o600, dir_fd=above)
        try:
            while piece := content.read(_PIECE_BYTES):
                self._bytes_left -= len(piece)
                if self._bytes_left < 0:
                    raise TooMuch("bytes")
                while piece:
                    piece = piece[os.write(file, piece) :]
            os.fchmod(file, entry.mode & 0o777 | 0o600)
            os.utime(file, (mtime, mtime))
            self.bytes += entry.size
        finally:
            os.close(file)

    @contextlib.contextmanager
    def _folder(self, parts: list[str], *, make: bool = False) -> Iterator[int]:
        at = os.open(".", _FOLDER, dir_fd=self._top)
        try:
            for part in parts:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=at)
                        self._entries_left -= 1
                below = os.open(part, _FOLDER, dir_fd=at)
                os.close(at)
                at = below
            yield at
        finally:
            os.close(at)


def main(arguments: list[str]) -> int:
    """Unpack stdin; tell on stdout what came of it."""
    order = Order.from_json(arguments[0])
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    become(
        order.uid,
        order.gid,
        {
            resource.RLIMIT_AS: MEMORY_BYTES,
            resource.RLIMIT_NOFILE: 64,
            resource.RLIMIT_FSIZE: order.max_bytes,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NPROC: 0,
        },
    )
    unpacker = Unpacker(order)
    try:
        unpacker.unpack(sys.stdin.buffer)
        said: dict[str, object] = {"bytes": unpacker.bytes, "entries": unpacker.entries}
    except TooMuch as error:
        said = {"too_much": str(error)}
    except OSError as error:
        if error.errno == errno.EFBIG:
            said = {"too_much": "bytes"}
        else:
            said = {"failed": os.strerror(error.errno or 0), "errno": error.errno}
    except (tarfile.TarError, MemoryError, RecursionError, ValueError, EOFError) as error:
        said = {"broken": type(error).__name__}
    sys.stdout.write(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
