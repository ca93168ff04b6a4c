"""Sees how the processes of a container ended, by the kernel's own word: its process events.

An engine tells a container's exit code, and its init has made 128 + n of a signal n by then; a job
can return that number as well. The kernel's process connector (a netlink socket) tells each fork,
exec and exit on the machine, an exit with the raw wait status. So the processes below a container's
init are followed by pid, and noted of them is

- how the job's own process ended, the one that the init started: it returned a code, or a signal
  ended it;
- which signals ended others of its processes, and when last;
- from when on nobody was looking, where events were lost or the run was found and not started.

What that means is decided in core/engine_evidence.py. A pid is believed only where its control
group bears the container's id: an engine can be on another machine. The kernel is listened to only
while there are runs. Events that were lost (`ENOBUFS`) make what follows unknown, never wrong. It
takes the machine's own pid namespace and, before Linux 6.6, CAP_NET_ADMIN, which root has; anybody
else goes without (`why_not`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import sys
import threading
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
_LOOK_EVERY_S = 0.01
"""how often a container that is about to start is looked for: its init has not begun the job yet"""
_EXPECTED_FOR_S = 120.0
_MOST_AT_ONCE = 65_536
_MOST_PROCESSES = 16_384
"""of one run; an engine lets a job have 1024 at a time"""
_CGROUPS = ("/sys/fs/cgroup/pids", "/sys/fs/cgroup/memory", "/sys/fs/cgroup")
_LISTED = 64


@dataclass
class _Watched:
    """A container whose init is known."""

    run_id: str
    init: int
    main: int | None = None
    """the job's own process"""
    processes: set[int] = field(default_factory=set)
    ended_by: dict[int, int] = field(default_factory=dict)
    """signal -> when it last ended another process of the run than the main one, in ns"""


@dataclass
class _Expected:
    """A container that is about to be started."""

    run_id: str
    container_id: str
    until_s: float


class ExitWitness:
    """The witness of one runner's containers. Any thread may ask."""

    def __init__(self, note: Note) -> None:
        """`note` is told what was seen of a run: from any thread, and it returns at once."""
        self._note = note
        self._lock = threading.RLock()
        self._socket: socket.socket | None = None
        self._wake = -1
        self._expected: dict[str, _Expected] = {}
        self._watched: dict[str, _Watched] = {}
        self._by_pid: dict[int, _Watched] = {}

    def why_not(self) -> str:
        """Say in a few words why the kernel tells us nothing; empty: it does."""
        with self._lock:
            try:
                if self._socket is None:
                    _listening().close()
            except OSError as error:
                return (error.strerror or str(error)).lower()
            return ""

    def expect(self, run_id: str, container_id: str) -> None:
        """This container is started now: find its init before the job's own process is there."""
        with self._lock:
            if run_id not in self._watched and self._begin():
                until_s = time.monotonic() + _EXPECTED_FOR_S
                self._expected[run_id] = _Expected(run_id, container_id, until_s)
                os.eventfd_write(self._wake, 1)

    def know(self, run_id: str, container_id: str, init: int, *, found: bool) -> None:
        """The engine says which process is the container's init; nothing happens if that is known.
        `found`: it has been running for a while, and nobody knows what happened in it."""
        with self._lock:
            if run_id in self._watched or not self._begin():
                return
            self._drain()
            self._expected.pop(run_id, None)
            if _belongs(init, container_id):
                self._watch(run_id, init)
                if found:
                    self._note(run_id, EngineFact(time.time_ns(), "blind"))
            self._rest()

    def settle(self) -> None:
        """Take in all that the kernel has told by now: what has ended was told before."""
        with self._lock:
            self._drain()
            self._rest()

    def forget(self, run_id: str) -> None:
        """The run was removed. The last one's end is the end of listening."""
        with self._lock:
            self._expected.pop(run_id, None)
            self._drop(run_id)
            self._rest()

    # -- the kernel ------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Listen, if that isn't so already; say whether it can be done."""
        if self._socket is not None:
            return True
        try:
            self._socket = _listening()
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            return False
        threading.Thread(
            target=self._follow,
            args=(self._socket, self._wake),
            name="sublet-exit-witness",
            daemon=True,
        ).start()
        return True

    def _follow(self, kernel: socket.socket, wake: int) -> None:
        """Take in events while there are runs; then close what was opened for it."""
        poll = select.poll()
        poll.register(kernel, select.POLLIN)
        poll.register(wake, select.POLLIN)
        wait_ms: float | None = None
        while True:
            poll.poll(wait_ms)
            with self._lock:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(wake)
                self._drain()
                self._look_for_expected()
                if not self._expected and not self._watched:
                    self._socket = None
                    kernel.close()
                    os.close(wake)
                    return
                wait_ms = _LOOK_EVERY_S * 1000 if self._expected else None

    def _drain(self) -> None:
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
                    self._give_up()
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

    def _look_for_expected(self) -> None:
        for expected in list(self._expected.values()):
            init = _init_of(expected.container_id)
            if init is not None:
                self._watch(expected.run_id, init)
            if init is not None or time.monotonic() > expected.until_s:
                del self._expected[expected.run_id]

    def _watch(self, run_id: str, init: int) -> None:
        watched = self._watched[run_id] = _Watched(run_id, init)
        self._survey(watched)

    def _survey(self, watched: _Watched) -> None:
        """Take in what runs below the init now. What forks meanwhile is told afterwards."""
        self._add(watched, watched.init)
        children = _children(watched.init)
        watched.main = children[0] if children else None  # an init starts one, and adopts the rest
        left = children
        while left and len(watched.processes) < _MOST_PROCESSES:
            pid = left.pop()
            if pid not in watched.processes:
                self._add(watched, pid)
                left += _children(pid)

    def _add(self, watched: _Watched, pid: int) -> None:
        watched.processes.add(pid)
        self._by_pid[pid] = watched

    def _forked(self, watched: _Watched, parent: int, pid: int) -> None:
        if len(watched.processes) >= _MOST_PROCESSES:
            self._drop(watched.run_id)
            return
        self._add(watched, pid)
        if parent == watched.init and watched.main is None:
            watched.main = pid

    def _exited(self, watched: _Watched, pid: int, status: int, at_ns: int) -> None:
        watched.processes.discard(pid)
        del self._by_pid[pid]
        by_signal = status & 0x7F
        if pid == watched.init:
            self._drop(watched.run_id)
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
            self._drop(watched.run_id)
            if main is None or _children(watched.init)[:1] != [main]:
                continue  # how it ended, or which one it is, was among what is missing
            self._watch(watched.run_id, watched.init)
            self._watched[watched.run_id].ended_by = ended_by
            self._note(watched.run_id, EngineFact(time.time_ns(), "blind"))

    def _drop(self, run_id: str) -> None:
        watched = self._watched.pop(run_id, None)
        if watched is not None:
            for pid in watched.processes:
                del self._by_pid[pid]

    def _give_up(self) -> None:
        """The kernel's socket is broken: of what runs now, nothing more is known."""
        self._expected.clear()
        for run_id in list(self._watched):
            self._drop(run_id)

    def _rest(self) -> None:
        """Have the thread end where there is nothing to be seen any more."""
        if self._socket is not None and not self._watched and not self._expected:
            os.eventfd_write(self._wake, 1)


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


def _init_of(container_id: str) -> int | None:
    """Return the container's init, as soon as there is one: pid 1 of a namespace of its own."""
    for base in _CGROUPS:
        for name in (f"docker/{container_id}", f"system.slice/docker-{container_id}.scope"):
            with contextlib.suppress(OSError, ValueError):
                listed = Path(base, name, "cgroup.procs").read_text().split()[:_LISTED]
                for pid in map(int, listed):
                    if _is_init(pid):
                        return pid
    return None


def _is_init(pid: int) -> bool:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith("NSpid:"):
                pids = line.split()[1:]
                return len(pids) > 1 and pids[-1] == "1"
    return False


def _belongs(pid: int, container_id: str) -> bool:
    """Say whether a pid of the engine's is this machine's, and that container's."""
    with contextlib.suppress(OSError):
        return pid > 0 and container_id in Path(f"/proc/{pid}/cgroup").read_text(errors="replace")
    return False


def _children(pid: int) -> list[int]:
    """Return the children of a process, the oldest first of its first thread."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in sorted(map(int, os.listdir(f"/proc/{pid}/task"))):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/task/{task}/children").read_text()
                found += map(int, text.split())
    return found
