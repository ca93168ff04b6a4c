"""Sees who sends a job's own process a signal, where the kernel lets us: a witness by ptrace.

A wait status tells what a job made of a signal, not who sent it, nor even that there was one: a
handler that ends with 0 looks like a job that is done. So the supervisor seizes the job's main
process (`PTRACE_SEIZE`; none of its children or other threads, no system call, nothing of its
memory) and is told of each signal before it is delivered, with its sender. It lets every one pass.

- The kernel says the sender's pid; whose that is, is looked up while the job is held, so a sender
  that lives, or died a moment ago, is known. Of one that is gone for good: it was none of the run
  if no process of the run has gone since (`Survey.reaped_faults`) or if it was another user's;
  else nobody can tell, and that is what is said.
- KILL is never shown to a tracer, nor a signal that the job blocks and waits for by itself. Those
  stay unseen, and the end is unattributed at worst.
- A job's own process can't be traced twice: a debugger inside the job can't attach to it. Its
  children are free. `SUBLET_WITNESS=off` in the agent's environment does without the witness.
- Should the supervisor be killed, the kernel kills what it has seized.
- A job that gets more than 300 signals in a second is left alone for two: the witness must
  slow nobody down.
- Where seizing is refused (Yama, a container's filter) the run goes on without it.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from sublet_agent.adapters.process import tree as process_tree

_PTRACE_CONT = 7
_PTRACE_DETACH = 17
_PTRACE_GETSIGINFO = 0x4202
_PTRACE_SEIZE = 0x4206
_PTRACE_LISTEN = 0x4208
_PTRACE_O_EXITKILL = 1 << 20
_PTRACE_EVENT_STOP = 128
_STOPPING = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_HARMLESS = _STOPPING | {signal.SIGCONT, signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH}
"""What ends no program: not even looked at."""
_ASKING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
"""What asks a program to end: it may take its time, and choose its exit code."""
_BY_SOMEBODY = frozenset({0, -1, -6})
"""si_code of kill, sigqueue, tgkill; what else there is comes from the kernel itself."""
_MEMORY_S = 2.0
_MARGIN_S = 10.0
_KILLED_WITHIN_S = 10.0
_MOST_STOPS = 300
_REST_S = 2.0
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_LIBC.ptrace.restype = ctypes.c_long


class _SigInfo(ctypes.Structure):
    """siginfo_t of a 64-bit Linux, as far as a sent signal fills it."""

    _fields_ = (
        ("number", ctypes.c_int),
        ("error", ctypes.c_int),
        ("code", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("pid", ctypes.c_int),
        ("uid", ctypes.c_uint),
        ("rest", ctypes.c_byte * 104),
    )


class Sender(StrEnum):
    """Where a signal came from."""

    RUN = "run"
    """the job's own processes, or who looks after it"""
    OURS = "ours"
    """our own asking it to stop, which is written down before"""
    OUTSIDE = "outside"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Sighting:
    """A signal that came from outside, or nobody can tell from where. `at_s`: monotonic."""

    number: int
    sender: Sender
    says: str
    at_s: float


@dataclass(frozen=True)
class Statement:
    """What the witness has to say of an end; each text is empty, or for people."""

    outside_signal: str = ""
    unknown_signal: str = ""


def statement(
    sightings: list[Sighting], killed_by: int | None, ended_s: float, grace_s: float
) -> Statement:
    """Return what the sightings say of an end. Newest first, and first match counts:

    1. The signal that killed it, if that was just seen.
    2. One that asks a program to end, if the end came within the time that the job itself says it
       needs for that (`grace_s`), and a margin. What it outlived for longer did not end it.
    """
    for seen in reversed(sightings):
        ago_s = ended_s - seen.at_s
        fatal = seen.number == killed_by and ago_s <= _KILLED_WITHIN_S
        asked = seen.number in _ASKING and ago_s <= grace_s + _MARGIN_S
        if fatal or asked:
            if seen.sender is Sender.OUTSIDE:
                return Statement(outside_signal=seen.says)
            return Statement(unknown_signal=seen.says)
    return Statement()


class Witness:
    """The witness of one process, a child of this one, which must have this one thread only."""

    def __init__(self, pid: int, is_ours: Callable[[int], bool]) -> None:
        """`is_ours` says of a sender's pid whether it was us who asked the job to stop."""
        self._pid = pid
        self._is_ours = is_ours
        self._refused = False
        self._rests_until_s = 0.0
        self._second_began_s = 0.0
        self._stops = 0
        self._looks: collections.deque[tuple[float, process_tree.Survey]] = collections.deque()
        self._sightings: dict[int, Sighting] = {}

    @property
    def sightings(self) -> list[Sighting]:
        """The last one of each signal, the oldest first."""
        return sorted(self._sightings.values(), key=lambda seen: seen.at_s)

    def attend(self) -> None:
        """Seize the process, unless that was refused before.

        Again and again: a thread that calls exec takes the process's place, unseized.
        """
        if self._refused or time.monotonic() < self._rests_until_s:
            return
        if process_tree.tracer_of(self._pid):
            return
        try:
            _ptrace(_PTRACE_SEIZE, self._pid, data=_PTRACE_O_EXITKILL)
        except ProcessLookupError:
            return
        except OSError:
            self._refused = True

    def remember(self, survey: process_tree.Survey) -> None:
        """Keep in mind what was below the supervisor, for a while."""
        now = time.monotonic()
        self._looks.append((now, survey))
        while len(self._looks) > 1 and now - self._looks[1][0] > _MEMORY_S:
            self._looks.popleft()

    def pass_on(self, status: int) -> None:
        """Look at a stop of the process, as its wait status tells it, and let it go on.

        It may be dead by now (KILL waits for nobody): then there is nothing to be done.
        """
        number, event = os.WSTOPSIG(status), status >> 16
        if not event and number not in _HARMLESS:
            with contextlib.suppress(OSError):
                self._look_at(number)
        with contextlib.suppress(ProcessLookupError):
            if event == _PTRACE_EVENT_STOP and number in _STOPPING:
                # Stopped as any process may be: so it stays, until somebody says CONT.
                _ptrace(_PTRACE_LISTEN, self._pid)
            else:
                rests = self._must_rest()
                request = _PTRACE_DETACH if rests else _PTRACE_CONT
                _ptrace(request, self._pid, data=0 if event else number)

    def _must_rest(self) -> bool:
        """Count one more stop, and say whether this second has had too many."""
        now = time.monotonic()
        if now - self._second_began_s >= 1.0:
            self._second_began_s, self._stops = now, 0
        self._stops += 1
        if self._stops <= _MOST_STOPS:
            return False
        self._rests_until_s = now + _REST_S
        return True

    def _look_at(self, number: int) -> None:
        info = _SigInfo()
        _ptrace(_PTRACE_GETSIGINFO, self._pid, data=ctypes.addressof(info))
        if info.code not in _BY_SOMEBODY or process_tree.ignores(self._pid, number):
            return
        sender, name = self._sender(info.pid, info.uid)
        if sender in (Sender.RUN, Sender.OURS):
            return
        called = _name(number)
        if sender is Sender.UNKNOWN:
            says = f"{called} came from process {info.pid}, which had ended before it was looked at"
        elif info.pid == 0:
            says = f"{called} came from outside of the agent's own container"
        else:
            says = f"{called} came from outside of the run, from process {info.pid} ({name})"
        self._sightings[number] = Sighting(number, sender, says, time.monotonic())

    def _sender(self, pid: int, uid: int) -> tuple[Sender, str]:
        if pid == 0:
            return Sender.OUTSIDE, ""
        if self._is_ours(pid):
            return Sender.OURS, ""
        name = process_tree.name_of(pid)
        descends = process_tree.descends(pid, os.getpid())
        if descends is not None:
            return (Sender.RUN if descends else Sender.OUTSIDE), name
        if uid != os.getuid():
            return Sender.OUTSIDE, f"gone since, of user {uid}"
        if any(pid in survey.everyone for _, survey in self._looks):
            return Sender.RUN, ""
        gone = process_tree.survey(os.getpid()).reaped_faults
        if all(gone == survey.reaped_faults for _, survey in self._looks) and self._looks:
            return Sender.OUTSIDE, "gone since"
        return Sender.UNKNOWN, ""


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name.removeprefix("SIG")
    except ValueError:
        return f"signal {number}"


def _ptrace(request: int, pid: int, *, data: int = 0) -> None:
    if _LIBC.ptrace(request, pid, None, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))  # ProcessLookupError, PermissionError, ...
