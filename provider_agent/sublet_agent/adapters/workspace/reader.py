"""Reads what jobs wrote, for the agent, in a process that can do nothing else.

    python -I -m sublet_agent.adapters.workspace.reader SOCKET look|walk UID GID

A job may fill its folders with anything, and whoever reads that may be kept busy or be broken by
it. So it is read here: by the user whom the folders belong to, without a capability or a way to get
one, without a right to write, within memory, processor time and numbers of entries that are bounded
by the system and by this file. The agent asks over a socket and hands the folders over as
descriptors; each question has one answer, in JSON behind its length.

No link is followed; what is no regular file is not opened; a folder that its owner has closed is
opened again, so that nothing can be hidden in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import resource
import socket
import stat
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sublet_agent.adapters.workspace.open_writers import ignore_breaks

MAX_OUT_ENTRIES = 4_096
"""in the checkpoint folder's out/: an agent that looks five times a second leaves a handful"""
MAX_ENTRIES = 200_000
"""files and folders in all that a run may have on disk"""
MAX_DEPTH = 128
MAX_PROGRESS_BYTES = 64 * 1024
MAX_REQUEST_BYTES = 160 * 1024
"""a job's document, which names what is mounted where, has at most 64 KiB"""
CPU_S = {"look": 2, "walk": 20}
"""processor time for one answer"""
MEMORY_BYTES = {"look": 256 * 1024 * 1024, "walk": 1024 * 1024 * 1024}
LENGTH = struct.Struct("!I")
DONE = "DONE"
_FOLDERS_PER_REQUEST = 16
_SEARCHES_KEPT = 64
_ENTRY_BYTES = 4096  # what an empty file costs at least, so that a million of them count
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,14})")
_METRIC = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ /:@+-]{0,127}")
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_CLONE_NEWNET = 0x40000000
_CAPABILITY_VERSION = 0x20080522

Progress = tuple[int, int, dict[str, float]]
"""step, total steps and metrics, as the job told them"""


class TooMuch(ValueError):
    """A job has put more into its folders than anybody is to read. Says what, and the bound."""


@dataclass(frozen=True)
class Look:
    """What lies in the checkpoint folder now."""

    steps: tuple[int, ...] = ()
    """of the whole checkpoints in out/: renamed, with DONE"""
    by_protocol: bool = False
    """whether the job saves there, or was given what it saved there"""
    progress: Progress | None = None
    """None: nothing sensible"""
    restored: bool | None = None
    """whether the job says that it has loaded what it was restored from; None: it says nothing"""


# -- what is read ----------------------------------------------------------------------------------


def look(checkpoint: int) -> Look:
    """Look into a checkpoint folder. Raises TooMuch."""
    steps: list[int] = []
    with _folder("out", checkpoint) as out:
        if out is not None:
            with os.scandir(out) as entries:
                for count, entry in enumerate(entries):
                    if count >= MAX_OUT_ENTRIES:
                        raise TooMuch(
                            f"more than {MAX_OUT_ENTRIES} entries lie in the checkpoint folder's "
                            "out/: nobody can save so fast, and nobody is to look through them"
                        )
                    match = _STEP.fullmatch(entry.name)
                    if match and _has_done(out, entry.name):
                        steps.append(int(match.group(1)))
    by_protocol = bool(steps)
    with _folder("in", checkpoint) as restored:
        if restored is not None and not by_protocol:
            with os.scandir(restored) as entries:
                by_protocol = next(entries, None) is not None
    told = _told(checkpoint)
    return Look(tuple(sorted(steps)), by_protocol, read_progress(told), _restored(checkpoint, told))


def usage(tops: list[int], stop_at_bytes: int | None = None) -> int:
    """Return the bytes on disk in these folders and below, each file once, links not followed.

    Ends early once `stop_at_bytes` is passed. What vanishes meanwhile, or is closed to us, counts
    nothing. Raises TooMuch: it has too many entries, or is too deep.
    """
    total, left = 0, MAX_ENTRIES
    seen: set[tuple[int, int]] = set()
    for top in tops:
        stack: list[tuple[int, Iterator[os.DirEntry[str]]]] = []
        try:
            begin = _open_folder(".", top)
            if begin is None:
                continue
            stack.append(_listing(begin))
            while stack:
                folder, entries = stack[-1]
                entry = next(entries, None)
                if entry is None:
                    os.close(stack.pop()[0])
                    continue
                left -= 1
                if left < 0:
                    raise TooMuch(f"more than {MAX_ENTRIES} files and folders lie on disk")
                try:
                    info = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
                    if (info.st_dev, info.st_ino) in seen:
                        continue
                    seen.add((info.st_dev, info.st_ino))
                total += max(info.st_blocks * 512, _ENTRY_BYTES)
                if stop_at_bytes is not None and total > stop_at_bytes:
                    return total
                if stat.S_ISDIR(info.st_mode):
                    if len(stack) >= MAX_DEPTH:
                        raise TooMuch(f"folders lie in one another more than {MAX_DEPTH} deep")
                    below = _open_folder(entry.name, folder)
                    if below is not None:
                        stack.append(_listing(below))
        finally:
            for folder, _ in stack:
                os.close(folder)
    return total


def read_progress(data: bytes) -> Progress | None:
    """Read progress.json as a stranger's: what doesn't fit is left out."""
    if len(data) > MAX_PROGRESS_BYTES:
        return None
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    step, total, metrics = said.get("step"), said.get("total"), said.get("metrics")
    good: dict[str, float] = {}
    for name, value in metrics.items() if isinstance(metrics, dict) else ():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # As it will be written: an integer just below the bound is on it once it is a float.
        fits = number and abs(value) < 1e300 and abs(float(value)) < 1e300
        if fits and _METRIC.fullmatch(name) and len(good) < 32:
            good[name] = float(value)
    return _count(step), _count(total), good


def _count(value: object) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    return value if whole and isinstance(value, int) else 0


def _told(checkpoint: int) -> bytes:
    """Return what progress.json holds; nothing if it is none, or not there."""
    try:
        file = os.open("progress.json", _FILE, dir_fd=checkpoint)
    except OSError:
        return b""
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return b""
        return os.pread(file, MAX_PROGRESS_BYTES + 1, 0)
    finally:
        os.close(file)


def _restored(checkpoint: int, told: bytes) -> bool | None:
    """Return what the helper says of it: any process of the job that restored it counts."""
    try:
        os.stat("restored", dir_fd=checkpoint, follow_symlinks=False)
    except OSError:
        return read_restored(told)
    return True


def read_restored(data: bytes) -> bool | None:
    """Read what progress.json says of a restore: a stranger's word."""
    if len(data) > MAX_PROGRESS_BYTES:
        return None
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return None
    word = said.get("restored") if isinstance(said, dict) else None
    return word if isinstance(word, bool) else None


def _has_done(out: int, name: str) -> bool:
    try:
        folder = os.stat(name, dir_fd=out, follow_symlinks=False)
        done = os.stat(f"{name}/{DONE}", dir_fd=out, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISDIR(folder.st_mode) and stat.S_ISREG(done.st_mode)


def _listing(folder: int) -> tuple[int, Iterator[os.DirEntry[str]]]:
    return folder, os.scandir(folder)


@contextlib.contextmanager
def _folder(name: str, above: int) -> Iterator[int | None]:
    found = _open_folder(name, above)
    try:
        yield found
    finally:
        if found is not None:
            os.close(found)


def _open_folder(name: str, above: int) -> int | None:
    """Open a folder; None: it is none (any more), or closed to us for good."""
    for attempt in range(2):
        try:
            return os.open(name, _FOLDER, dir_fd=above)
        except PermissionError:
            if attempt:
                return None
            # Closed, by its owner who we are; or the folder above it is.
            _reopen(".", above)
            _reopen(name, above)
        except OSError:
            return None
    return None


def _reopen(name: str, above: int) -> None:
    with contextlib.suppress(OSError):
        path = f"/proc/self/fd/{above}"
        if name != ".":
            held = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
            path = f"/proc/self/fd/{held}"
        else:
            held = os.dup(above)
        try:
            os.chmod(path, stat.S_IMODE(os.fstat(held).st_mode) | stat.S_IRWXU)
        finally:
            os.close(held)


# -- the process -----------------------------------------------------------------------------------


class _Reader:
    """Answers one question after the other."""

    def __init__(self, line: socket.socket, lane: str) -> None:
        self._line = line
        self._lane = lane
        self._searches: dict[str, Any] = {}
        """by run: what of its outputs was examined already"""
        self._watches: dict[str, Any] = {}
        """by run: what is known of its --checkpoint folders"""

    def serve(self) -> None:
        while True:
            request, folders = self._receive()
            if request is None:
                return
            _allow_cpu(CPU_S[self._lane])
            try:
                answer = {"answer": self._answered(request, folders)}
            except (TooMuch, RecursionError) as error:
                answer = {"refused": str(error)[:1000]}
            except MemoryError:
                answer = {"refused": "it takes too much memory to read"}
            except OSError as error:
                answer = {"failed": f"{type(error).__name__}: {os.strerror(error.errno or 0)}"}
            except Exception:  # noqa: BLE001 - told, as evidence, to who asked
                answer = {"error": traceback.format_exc()[-8000:]}
            finally:
                for folder in folders:
                    os.close(folder)
            send(self._line, answer)

    def _receive(self) -> tuple[dict[str, Any] | None, list[int]]:
        head, folders, _, _ = socket.recv_fds(self._line, LENGTH.size, _FOLDERS_PER_REQUEST)
        if len(head) < LENGTH.size:
            return None, folders
        data = receive_exactly(self._line, LENGTH.unpack(head)[0])
        return json.loads(data), folders

    def _answered(self, request: dict[str, Any], folders: list[int]) -> Any:
        try:
            return self._answer(request, folders)
        except MemoryError:
            # It may be the others' runs that are known too well.
            self._searches.clear()
            self._watches.clear()
        return self._answer(request, folders)

    def _answer(self, request: dict[str, Any], folders: list[int]) -> Any:
        match request["do"]:
            case "look":
                found = look(folders[0])
                return [found.steps, found.by_protocol, found.progress, found.restored]
            case "usage":
                return usage(self._measured(folders), request["stop_at_bytes"])
            case "search":
                return self._search(request, folders[0])
            case "watch":
                return self._watch(request, folders)
            case "saved":
                return self._saved(request, folders)
        raise AssertionError(f"unknown question {request['do']!r}")

    def _saved(self, request: dict[str, Any], folders: list[int]) -> list[int | str] | None:
        from sublet_agent.adapters.workspace.saved_files import newest_saved

        with contextlib.ExitStack() as stack:
            tops = [stack.enter_context(_folder(".", folder)) for folder in folders]
            return newest_saved([-1 if top is None else top for top in tops], request["since_ns"])

    def _measured(self, folders: list[int]) -> list[int]:
        """Of the checkpoint folder what the job writes; of the others all."""
        out = _open_folder("out", folders[0])
        if out is not None:
            folders.append(out)
        return folders[1:]

    def _search(self, request: dict[str, Any], outputs: int) -> str | None:
        from sublet_contracts.tree import TreeRefused  # who only looks needs none of it

        search = _kept(self._searches, request["run"], _make_search)
        with _folder(".", outputs) as top:
            if top is None:
                return None
            try:
                found = search.newest(
                    top,
                    after_step=request["after_step"],
                    last_mtime_ms=request["last_mtime_ms"],
                    quiet_ms=request["quiet_ms"],
                    since_ms=request["since_ms"],
                )
            except TreeRefused as error:
                raise TooMuch(str(error)) from error
        return None if found is None else found.to_bytes().decode()

    def _watch(self, request: dict[str, Any], folders: list[int]) -> Any:
        from sublet_agent.adapters.workspace.folder_watch import Wish
        from sublet_contracts.tree import TreeRefused

        watch = _kept(self._watches, request["run"], _make_watch)
        tops: list[int | None] = [None] * request["folders"]
        with contextlib.ExitStack() as stack:
            for number, folder in zip(request["there"], folders, strict=True):
                tops[number] = stack.enter_context(_folder(".", folder))
            wish = Wish(
                leave_out=tuple(tuple(paths) for paths in request["leave_out"]),
                waited_ms=request["waited_ms"],
                interval_ms=request["interval_ms"],
                since_ns=request["since_ns"],
                begun_ns=request["begun_ns"],
                ended=request["ended"],
            )
            try:
                return watch.look(tops, wish).model_dump_json()
            except TreeRefused as error:
                raise TooMuch(str(error)) from error


def _kept(known: dict[str, Any], run: str, make: Callable[[], Any]) -> Any:
    """Return what is known of a run; of the runs that were asked about longest ago it is
    forgotten."""
    found = known.pop(run, None) or make()
    known[run] = found
    if len(known) > _SEARCHES_KEPT:
        del known[next(iter(known))]
    return found


def _make_search() -> Any:
    from sublet_agent.adapters.workspace.outputs_search import OutputsSearch

    return OutputsSearch()


def _make_watch() -> Any:
    from sublet_agent.adapters.workspace.folder_watch import FolderWatch

    return FolderWatch()


def send(line: socket.socket, message: object) -> None:
    """Send JSON behind its length."""
    data = json.dumps(message).encode()
    line.sendall(LENGTH.pack(len(data)) + data)


def receive_exactly(line: socket.socket, size: int) -> bytes:
    """Read so many bytes. Raises EOFError."""
    if size > MAX_REQUEST_BYTES:
        raise EOFError(f"a question of {size} bytes")
    data = bytearray()
    while len(data) < size:
        piece = line.recv(size - len(data))
        if not piece:
            raise EOFError("the agent is gone")
        data += piece
    return bytes(data)


def _allow_cpu(seconds: int) -> None:
    """Let the kernel end this process if the next answer takes longer."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time()) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


class _CapabilityHead(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def drop_privileges(lane: str, uid: int, gid: int) -> None:
    """Become that user, without any capability; bound memory, files and processes. For good."""
    become(
        uid,
        gid,
        {
            resource.RLIMIT_AS: MEMORY_BYTES[lane],
            resource.RLIMIT_NOFILE: 2 * MAX_DEPTH + 64,  # a listing holds one of its own
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NPROC: 0,
        },
    )


def become(uid: int, gid: int, limits: dict[int, int]) -> None:
    """Become that user, where that is ours to do, within limits and without any capability or a
    way to get one. For good."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        libc.unshare(_CLONE_NEWNET)  # no network; where it isn't ours to say, there is one unused
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    head = _CapabilityHead(_CAPABILITY_VERSION, 0)
    if libc.capset(ctypes.byref(head), (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def main(arguments: list[str]) -> int:
    """Serve until the agent hangs up."""
    descriptor, lane, uid, gid = arguments
    ignore_breaks()
    line = socket.socket(fileno=int(descriptor))
    if lane == "walk":
        os.nice(5)
        _make_search()  # imported while it still can be
        _make_watch()
    drop_privileges(lane, int(uid), int(gid))
    send(line, {"ready": True})
    with contextlib.suppress(EOFError, ConnectionError):
        _Reader(line, lane).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
