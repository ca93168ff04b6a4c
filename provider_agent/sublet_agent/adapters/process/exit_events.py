"""Sees how the processes below one process end, by the kernel's own word: its process events.

A wait status is told to a parent only, and what ended the child of a child its parent may pass on
as a code of its own: shells make 128 + n of a signal n. The kernel's process connector (a netlink
socket) tells each fork, exec and exit on the machine, an exit with the raw wait status. So the
processes below an init (a container's, or the supervisor of a job) are followed by pid, and noted
of them is

- how the job's own process ended, the one that the init started: it returned a code, or a signal
  ended it;
- which signals ended others of its processes, and when last;
- from when on nobody was looking, where events were lost.

What that means is decided in core/engine_evidence.py. Events that were lost (`ENOBUFS`) make what
follows unknown, never wrong. It takes the machine's own pid namespace and, before Linux 6.6,
CAP_NET_ADMIN, which root has; anybody else goes without (`why_not`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sublet_agent.core.engine_evidence import EngineFact, Kind

Note = Callable[[str, EngineFact], None]

_NETLINK_CONNECTOR = 11
_CN_IDX_PROC, _CN_VAL_PROC = 1, 1
_LISTEN = 1
_NLMSG_DONE = 3
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
_BUFFER_BYTES = 8 * 1024 * 1024
_EVENT_AT = 16 + 20
"""an event stands behind the head of netlink and that of the connector"""
_DATA_AT = _EVENT_AT + 16
_ANSWERS_AT = 16 + 12
"""which question is answered, plus one"""
_ANSWERS = struct.Struct("=I")
_HEAD = struct.Struct("=IIQ")
_FORK, _EXEC, _EXIT, _ACK = 0x00000001, 0x00000002, 0x80000000, 0x00000000
_FORKED = struct.Struct("=IIII")
_EXITED = struct.Struct("=III")
_PIDS = struct.Struct("=II")
_ACKED = struct.Struct("=I")
_ANSWERS_WITHIN_S = 2.0
_MOST_AT_ONCE = 65_536
_MOST_PROCESSES = 16_384
"""of one run; an engine lets a job have 1024 at a time"""


@dataclass
class _Watched:
    """A run whose init is known."""

    run_id: str
    init: int
    main: int | None = None
    """the job's own process"""
    processes: set[int] = field(default_factory=set)
    ended_by: dict[int, int] = field(default_factory=dict)
    """signal -> when it last ended another process of the run than the main one, in ns"""


class ExitEvents:
    """What the kernel tells of the runs that are watched. For one thread at a time."""

    def __init__(self, note: Note) -> None:
        """`note` is told what was seen of a run, and returns at once."""
        self._note = note
        self._socket: socket.socket | None = None
        self._watched: dict[str, _Watched] = {}
        self._by_pid: dict[int, _Watched] = {}

    @property
    def listens(self) -> bool:
        """Whether the kernel is listened to."""
        return self._socket is not None

    @property
    def watches_any(self) -> bool:
        """Whether there is a run to be seen."""
        return bool(self._watched)

    def watches(self, run_id: str) -> bool:
        """Whether this run's end is still to be seen."""
        return run_id in self._watched

    def listen(self) -> int:
        """Begin to listen, if that isn't so already; return what to poll. Raises OSError."""
        if self._socket is None:
            self._socket = _listening()
        return self._socket.fileno()

    def close(self) -> None:
        """Listen no more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def watch(self, run_id: str, init: int) -> None:
        """Follow what runs below a process, from now on."""
        watched = self._watched[run_id] = _Watched(run_id, init)
        self._survey(watched)

    def drop(self, run_id: str) -> None:
        """Follow that run no more."""
        watched = self._watched.pop(run_id, None)
        if watched is not None:
            for pid in watched.processes:
                del self._by_pid[pid]

    def take_in(self) -> None:
        """Take in all that the kernel has told by now: what has ended was told before."""
        if self._socket is None:
            return
        # Wall time of an event: it bears the monotonic clock's.
        offset_ns = time.time_ns() - time.monotonic_ns()
        for _ in range(_MOST_AT_ONCE):
            try:
                data = self._socket.recv(512)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    self._drop_all()
                    return
                self._lost()
                continue
            if len(data) >= _DATA_AT + _FORKED.size:
                what, _, at_ns = _HEAD.unpack_from(data, _EVENT_AT)
                self._take(what, data, at_ns + offset_ns)

    def _take(self, what: int, data: bytes, at_ns: int) -> None:
        if what == _FORK:
            _, parent, pid, tgid = _FORKED.unpack_from(data, _DATA_AT)
            watched = self._by_pid.get(parent)
            if watched is not None and pid == tgid:
                self._forked(watched, parent, pid)
        elif what == _EXEC:
            _, pid = _PIDS.unpack_from(data, _DATA_AT)
            watched = self._by_pid.get(pid)
            if watched is not None and pid == watched.init:
                # It was the engine's own program until now, which may have run hooks.
                watched.main = None
        elif what == _EXIT:
            pid, tgid, status = _EXITED.unpack_from(data, _DATA_AT)
            watched = self._by_pid.get(pid)
            if watched is not None and pid == tgid:
                self._exited(watched, pid, status, at_ns)

    # -- the runs --------------------------------------------------------------------------------

    def _survey(self, watched: _Watched) -> None:
        """Take in what runs below the init now. What forks meanwhile is told afterwards."""
        self._add(watched, watched.init)
        children = children_of(watched.init)
        watched.main = children[0] if children else None  # an init starts one, and adopts the rest
        left = children
        while left and len(watched.processes) < _MOST_PROCESSES:
            pid = left.pop()
            if pid not in watched.processes:
                self._add(watched, pid)
                left += children_of(pid)

    def _add(self, watched: _Watched, pid: int) -> None:
        watched.processes.add(pid)
        self._by_pid[pid] = watched

    def _forked(self, watched: _Watched, parent: int, pid: int) -> None:
        if len(watched.processes) >= _MOST_PROCESSES:
            self.drop(watched.run_id)
            return
        self._add(watched, pid)
        if parent == watched.init and watched.main is None:
            watched.main = pid

    def _exited(self, watched: _Watched, pid: int, status: int, at_ns: int) -> None:
        watched.processes.discard(pid)
        del self._by_pid[pid]
        by_signal = status & 0x7F
        if pid == watched.init:
            self.drop(watched.run_id)
        elif pid == watched.main:
            for number, hit_ns in watched.ended_by.items():
                self._note(watched.run_id, EngineFact(hit_ns, "worker", number))
            kind: Kind = "killed" if by_signal else "exited"
            number = by_signal or (status >> 8) & 0xFF
            self._note(watched.run_id, EngineFact(at_ns, kind, number))
        elif by_signal:
            watched.ended_by[by_signal] = at_ns

    def _lost(self) -> None:
        """Events are missing: look anew at what runs, and say that something may be unseen."""
        for watched in list(self._watched.values()):
            main, ended_by = watched.main, watched.ended_by
            self.drop(watched.run_id)
            if main is None or children_of(watched.init)[:1] != [main]:
                continue  # how it ended, or which one it is, was among what is missing
            self.watch(watched.run_id, watched.init)
            self._watched[watched.run_id].ended_by = ended_by
            self._note(watched.run_id, EngineFact(time.time_ns(), "blind"))

    def _drop_all(self) -> None:
        """The kernel's socket is broken: of what runs now, nothing more is known."""
        for run_id in list(self._watched):
            self.drop(run_id)


def why_not() -> str:
    """Say in a few words why the kernel tells us nothing; empty: it does."""
    try:
        _listening().close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _listening() -> socket.socket:
    """Return a socket on which the kernel tells of processes. Raises OSError."""
    kernel = socket.socket(
        socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_CONNECTOR
    )
    try:
        with contextlib.suppress(OSError):  # a smaller one loses more, and says so
            kernel.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        _leave_out_threads(kernel)
        kernel.bind((0, _CN_IDX_PROC))
        kernel.settimeout(_ANSWERS_WITHIN_S)
        asked = int.from_bytes(os.urandom(3), sys.byteorder)
        _ask(kernel, _LISTEN, asked)
        until_s = time.monotonic() + _ANSWERS_WITHIN_S
        # Without the rights, or in a pid namespace of its own, it is silent.
        while True:
            data = kernel.recv(512)
            if len(data) >= _DATA_AT + _ACKED.size:
                what, _, _ = _HEAD.unpack_from(data, _EVENT_AT)
                (code,) = _ACKED.unpack_from(data, _DATA_AT)
                (answers,) = _ANSWERS.unpack_from(data, _ANSWERS_AT)
                ours = what == _ACK and answers == asked + 1  # everybody's answers are told to all
                if ours and code:
                    raise OSError(code, os.strerror(code))
                if ours:
                    break
            if time.monotonic() > until_s:
                raise TimeoutError(errno.ETIMEDOUT, "the kernel tells nothing here")
        kernel.setblocking(False)
    except TimeoutError as error:
        kernel.close()
        raise OSError(errno.ETIMEDOUT, "the kernel tells nothing here") from error
    except BaseException:
        kernel.close()
        raise
    return kernel


def _ask(kernel: socket.socket, operation: int, question: int) -> None:
    said = struct.pack("=I", operation)
    head = (_CN_IDX_PROC, _CN_VAL_PROC, 0, question, len(said), 0)
    message = struct.pack("=IIIIHH", *head) + said
    kernel.send(struct.pack("=IHHII", 16 + len(message), _NLMSG_DONE, 0, 0, 0) + message)


def _leave_out_threads(kernel: socket.socket) -> None:
    """Have the kernel drop what is no fork, exec or exit of a whole process: most of it."""
    load, to_index, jump, equal, equal_index, answer = 0x20, 0x07, 0x05, 0x15, 0x1D, 0x06
    fork, exec_, exit_, ack = (socket.htonl(what) for what in (_FORK, _EXEC, _EXIT, _ACK))
    program = (
        (load, 0, 0, _EVENT_AT),
        (equal, 3, 0, fork),
        (equal, 6, 0, exit_),
        (equal, 9, 0, exec_),
        (equal, 8, 9, ack),
        (load, 0, 0, _DATA_AT + 8),  # of a fork: the new task, and the process that it is part of
        (to_index, 0, 0, 0),
        (load, 0, 0, _DATA_AT + 12),
        (jump, 0, 0, 3),
        (load, 0, 0, _DATA_AT),  # of an exit: the same
        (to_index, 0, 0, 0),
        (load, 0, 0, _DATA_AT + 4),
        (equal_index, 0, 1, 0),
        (answer, 0, 0, 0xFFFF),
        (answer, 0, 0, 0),
    )
    code = b"".join(struct.pack("=HBBI", *step) for step in program)
    held = ctypes.create_string_buffer(code, len(code))
    described = struct.pack("@HP", len(program), ctypes.addressof(held))
    kernel.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)


def children_of(pid: int) -> list[int]:
    """Return the children of a process, the oldest first of its first thread."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in sorted(map(int, os.listdir(f"/proc/{pid}/task"))):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/task/{task}/children").read_text()
                found += map(int, text.split())
    return found
