"""Which processes belong to a run, read from /proc; and their end, all of them.

A process belongs to a run if it descends from the run's supervisor, or carries the run's mark in
the environment it was started with: a job can hide from one of the two, hardly from both.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "SUBLET_RUN_MARK"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Process:
    """One entry of /proc. `started` (clock ticks since boot) tells two owners of a pid apart."""

    pid: int
    parent: int
    group: int
    state: str
    started: int


def read_process(pid: int) -> Process | None:
    """Return the process, or None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return Process(pid, int(fields[1]), int(fields[2]), fields[0], int(fields[19]))


def is_alive(pid: int, started: int) -> bool:
    """Say whether that very process is there and no zombie."""
    found = read_process(pid)
    return found is not None and found.started == started and found.state not in "ZX"


def descendants(root: int) -> set[int]:
    """Return the pids below `root`, zombies left out."""
    children: dict[int, list[Process]] = {}
    for process in _all():
        children.setdefault(process.parent, []).append(process)
    found: set[int] = set()
    waiting = [root]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            waiting.append(child.pid)
            if child.state not in "ZX":
                found.add(child.pid)
    return found


def marked(mark: str) -> set[int]:
    """Return the pids that were started with this mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = set()
    for process in _all():
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if wanted in environment.split(b"\0"):
            found.add(process.pid)
    return found


def private_bytes(pid: int) -> int:
    """Return the memory that is this process's own, shared pages left out; 0 once it is gone."""
    try:
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return 0
    return max(0, int(resident) - int(shared)) * _PAGE_BYTES


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


def _signal(send: Callable[[int, int], None], to: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(to, number)


def _all() -> Iterator[Process]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            found = read_process(int(name))
            if found is not None:
                yield found
