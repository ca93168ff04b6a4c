"""Which processes belong to a run, read from /proc; and their end, all of them.

A process belongs to a run if it descends from the run's supervisor, or carries the run's mark in
the environment it was started with: a job can hide from one of the two, hardly from both.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "SUBLET_RUN_MARK"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Process:
    """One entry of /proc. `started` (clock ticks since boot) tells two owners of a pid apart."""

    pid: int
    parent: int
    state: str
    started: int


def read_process(pid: int) -> Process | None:
    """Return the process, or None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return Process(pid, int(fields[1]), fields[0], int(fields[19]))


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
    """Kill them: all stopped first, so that none makes another while its siblings die."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def _all() -> Iterator[Process]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            found = read_process(int(name))
            if found is not None:
                yield found
