"""Sees how the processes of a container ended, by the kernel's own word.

An engine tells a container's exit code, and its init has made 128 + n of a signal n by then; a job
can return that number as well. So what runs below a container's init is followed, by the process
events of adapters/process/exit_events.py. A pid is believed only where its control group bears the
container's id: an engine can be on another machine. The kernel is listened to only while there are
runs. A run that was found and not started has a time in which nobody was looking: that is noted.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from sublet_agent.adapters.process import exit_events
from sublet_agent.adapters.process.exit_events import ExitEvents, Note
from sublet_agent.core.engine_evidence import EngineFact

_LOOK_EVERY_S = 0.01
"""how often a container that is about to start is looked for: its init has not begun the job yet"""
_EXPECTED_FOR_S = 120.0
_CGROUPS = ("/sys/fs/cgroup/pids", "/sys/fs/cgroup/memory", "/sys/fs/cgroup")
_LISTED = 64


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
        self._events = ExitEvents(note)
        self._wake = -1
        self._expected: dict[str, _Expected] = {}

    def why_not(self) -> str:
        """Say in a few words why the kernel tells us nothing; empty: it does."""
        with self._lock:
            return "" if self._events.listens else exit_events.why_not()

    def expect(self, run_id: str, container_id: str) -> None:
        """This container is started now: find its init before the job's own process is there."""
        with self._lock:
            if not self._events.watches(run_id) and self._begin():
                until_s = time.monotonic() + _EXPECTED_FOR_S
                self._expected[run_id] = _Expected(run_id, container_id, until_s)
                os.eventfd_write(self._wake, 1)

    def know(self, run_id: str, container_id: str, init: int, *, found: bool) -> None:
        """The engine says which process is the container's init; nothing happens if that is known.
        `found`: it has been running for a while, and nobody knows what happened in it."""
        with self._lock:
            if self._events.watches(run_id) or not self._begin():
                return
            self._events.take_in()
            self._expected.pop(run_id, None)
            if _belongs(init, container_id):
                self._events.watch(run_id, init)
                if found:
                    self._note(run_id, EngineFact(time.time_ns(), "blind"))
            self._rest()

    def settle(self) -> None:
        """Take in all that the kernel has told by now: what has ended was told before."""
        with self._lock:
            self._events.take_in()
            self._rest()

    def forget(self, run_id: str) -> None:
        """The run was removed. The last one's end is the end of listening."""
        with self._lock:
            self._expected.pop(run_id, None)
            self._events.drop(run_id)
            self._rest()

    def _begin(self) -> bool:
        """Listen, if that isn't so already; say whether it can be done."""
        if self._events.listens:
            return True
        try:
            kernel = self._events.listen()
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self._events.close()
            return False
        threading.Thread(
            target=self._follow, args=(kernel, self._wake), name="sublet-exit-witness", daemon=True
        ).start()
        return True

    def _follow(self, kernel: int, wake: int) -> None:
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
                self._events.take_in()
                self._look_for_expected()
                if not self._expected and not self._events.watches_any:
                    self._events.close()
                    os.close(wake)
                    return
                wait_ms = _LOOK_EVERY_S * 1000 if self._expected else None

    def _look_for_expected(self) -> None:
        for expected in list(self._expected.values()):
            init = _init_of(expected.container_id)
            if init is not None:
                self._events.watch(expected.run_id, init)
            if init is not None or time.monotonic() > expected.until_s:
                del self._expected[expected.run_id]

    def _rest(self) -> None:
        """Have the thread end where there is nothing to be seen any more."""
        if self._events.listens and not self._expected and not self._events.watches_any:
            os.eventfd_write(self._wake, 1)


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
