"""Which processes belong to a run, as the kernel tells it in /proc; and their end, all of them.

A process belongs to a run if it descends from the run's supervisor, carries the run's mark in the
environment it was started with, or its brand: a number that stands as the limit of file locks,
which Linux has not looked at for twenty years, and which every child inherits through fork and
exec. A job can hide from one of the three; from all of them only if it means to.

Names and files of strangers' processes are bytes: nothing here decodes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "SUBLET_RUN_MARK"
RLIMIT_LOCKS = 10
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_LOCKS_LINE = b"Max file locks"
_RETRIES = 20


@dataclass(frozen=True)
class Mark:
    """What a run's processes are known by."""

    text: str
    """the value of the variable MARK"""
    brand: int
    """the limit of file locks"""


def mark_of(owner: str, run_id: str) -> Mark:
    """Return the mark of this agent's run; it stands in no file that a job could change."""
    digest = hashlib.sha256(f"{owner}\0{run_id}".encode()).digest()
    return Mark(digest[:8].hex(), 2**61 | int.from_bytes(digest[8:15], "big"))


@dataclass(frozen=True)
class Process:
    """One entry of /proc. `started` (clock ticks since boot) tells two owners of a pid apart."""

    pid: int
    parent: int
    group: int
    state: str
    started: int
    reaped_faults: int
    """The page faults of the children that were waited for, and of theirs: it grows whenever a
    process below this one is gone for good, for none lives without one."""

    @property
    def alive(self) -> bool:
        """Whether it is no zombie."""
        return self.state not in "ZX"


@dataclass(frozen=True)
class Survey:
    """What was below a process, at one look."""

    alive: frozenset[int]
    everyone: frozenset[int]
    """zombies too"""
    reaped_faults: int
    """of all of them and the root: unchanged, nobody below the root has gone meanwhile"""


def read_process(pid: int) -> Process | None:
    """Return the process, or None where there is none."""
    fields = _about(pid, "stat").rpartition(b")")[2].split()  # the name before may hold anything
    try:
        return Process(
            pid,
            parent=int(fields[1]),
            group=int(fields[2]),
            state=fields[0].decode("ascii", "replace"),
            started=int(fields[19]),
            reaped_faults=int(fields[8]),
        )
    except (IndexError, ValueError):
        return None


def is_alive(pid: int, started: int) -> bool:
    """Say whether that very process is there and no zombie."""
    found = read_process(pid)
    return found is not None and found.started == started and found.alive


def survey(root: int) -> Survey:
    """Look at everything below `root`."""
    children: dict[int, list[Process]] = {}
    top: Process | None = None
    for process in _all():
        children.setdefault(process.parent, []).append(process)
        if process.pid == root:
            top = process
    found: list[Process] = []
    waiting = [root]
    while waiting:
        below = children.pop(waiting.pop(), [])
        found += below
        waiting += [child.pid for child in below]
    return Survey(
        frozenset(process.pid for process in found if process.alive),
        frozenset(process.pid for process in found),
        sum(process.reaped_faults for process in found) + (top.reaped_faults if top else 0),
    )


def descendants(root: int) -> set[int]:
    """Return the pids below `root`, zombies left out."""
    return set(survey(root).alive)


def descends(pid: int, root: int) -> bool | None:
    """Say whether the process is `root` or below it; None where it is gone. A zombie is there."""
    for _ in range(_RETRIES):
        at = pid
        while at != root:
            found = read_process(at)
            if found is None:
                if at == pid:
                    return None
                break  # a parent went meanwhile: its children have another one now
            if found.parent == 0:
                return False
            at = found.parent
        else:
            return True
    return None


def is_marked(pid: int, mark: Mark) -> bool:
    """Say whether a process carries the mark or the brand."""
    if f"{MARK}={mark.text}".encode() in _about(pid, "environ").split(b"\0"):
        return True
    limits = _about(pid, "limits").splitlines()
    line = next((line for line in limits if line.startswith(_LOCKS_LINE)), b"")
    return str(mark.brand).encode() in line.split()


def marked(mark: Mark) -> set[int]:
    """Return the pids that carry the mark or the brand, zombies left out."""
    return {process.pid for process in _all() if process.alive and is_marked(process.pid, mark)}


def started_as(*words: str) -> set[int]:
    """Return the pids, zombies left out, whose command line ends with these words."""
    wanted = [word.encode() for word in words]
    return {
        process.pid
        for process in _all()
        if process.alive
        and _about(process.pid, "cmdline").split(b"\0")[:-1][-len(wanted) :] == wanted
    }


def boot_id() -> str:
    """Return what names this start of the machine; pids and times of another one mean nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii", "replace").strip()
    except OSError:
        return ""


def name_of(pid: int) -> str:
    """Return a process's name as it may be shown to people; empty where it is gone."""
    shown = _about(pid, "comm").strip()[:32].decode("ascii", "replace")
    return "".join(letter if letter.isprintable() else "?" for letter in shown)


def private_bytes(pid: int) -> int:
    """Return the memory that is this process's own, shared pages left out; 0 once it is gone."""
    try:
        resident, shared = _about(pid, "statm").split()[1:3]
        return max(0, int(resident) - int(shared)) * _PAGE_BYTES
    except ValueError:
        return 0


def cpu_s(pid: int) -> float:
    """Return the time of a processor, in seconds, that the process and what it has waited for have
    used; 0 once it is gone."""
    fields = _about(pid, "stat").rpartition(b")")[2].split()
    try:
        return sum(map(int, fields[11:15])) / _TICKS_A_SECOND
    except ValueError:
        return 0.0


def end(pids: set[int]) -> None:
    """Kill them, by their process groups first: those hold a run's processes and no others, for it
    begins in a session of its own.

    A group is killed whole, with what is being forked in it. One by one, a bomb on a busy machine
    forks faster than anybody can look. What has made itself a group meanwhile is stopped before it
    is killed, so that none makes another while its siblings die.
    """
    groups = {found.group for pid in pids if (found := read_process(pid)) is not None}
    for group in groups - {0, os.getpgrp()}:
        _signal(os.killpg, group, signal.SIGKILL)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            _signal(os.kill, pid, number)


def wake(pid: int) -> None:
    """Let a process go on that somebody may have stopped."""
    _signal(os.kill, pid, signal.SIGCONT)


def ignores(pid: int, number: int) -> bool:
    """Say whether the process ignores this signal, by its own wish."""
    lines = _about(pid, "status").splitlines()
    mask = next((line for line in lines if line.startswith(b"SigIgn:")), b"SigIgn: 0").split()[1]
    return bool(int(mask, 16) & 1 << (number - 1))


def tracer_of(pid: int) -> int:
    """Return the pid of who traces the process; 0 for nobody, and for a process that is gone."""
    lines = _about(pid, "status").splitlines()
    return int(next((line for line in lines if line.startswith(b"TracerPid:")), b": 0").split()[1])


def _about(pid: int, file: str) -> bytes:
    """Return what the kernel says of a process; nothing where it is gone, or not ours to read."""
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""


def _signal(send: Callable[[int, int], None], to: int, number: signal.Signals) -> None:
    # Gone, or (a program that runs as another user) not ours to end.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        send(to, number)


def _all() -> Iterator[Process]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            found = read_process(int(name))
            if found is not None:
                yield found
