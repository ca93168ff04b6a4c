"""Decides which durable write meets which fault, and sees that strace brings it about.

A *crash point* is a place in our code at which a process makes something durable: the process, the
sort of file, and the use-case (or the innermost functions) in which it happens. Each process under
test stops before such a write and says where it is (gate/sitecustomize.py); the gatekeeper, which
knows what each point has met already, lets it go on, or first attaches strace to that very thread
with the fault that is due, so that the thread's next fsync or fdatasync meets it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.chaos.strace import CALLS, Strace

MEET_LIMIT_S = 30.0
LET_GO_LIMIT_S = 60.0
RARE = 3
REST = 25
"""Between two faults of a kind of process it makes up to so many durable writes undisturbed."""
TRIES = 4
LATER = (2, 3)
LATER_TRIES = 80
"""A commit is one durable write. At times SQLite also moves its log into the database, which takes
a second and a third: crash points of their own, looked for at any commit."""
JOURNAL = "journal.db"
ASIDE = re.compile(r"\.tmp(/|$)|[/.]key\.\d+\.[0-9a-f]+$|/blobs/tmp/")
LAZY = "spool.db"
"""Written with synchronous=NORMAL: its commits aren't durable writes, only those moves are."""


class Point(NamedTuple):
    """A crash point."""

    process: str
    file: str
    place: str

    def __str__(self) -> str:
        return f"{self.process}: {self.file} in {self.place}"


@dataclass
class Met:
    """What one crash point has met. `call`: which one after the gate it is; `move`: of SQLite's log
    into the database, so that most commits don't come to it."""

    call: int = 1
    move: bool = False
    passed: int = 0
    tries: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


class Watched:
    """A thread that strace is on."""

    def __init__(self) -> None:
        self.passed = threading.Event()
        """It has come to its next durable write."""
        self.over = threading.Event()
        """Strace has let it go."""


class Gatekeeper:
    """Listens to the gates of one run's processes."""

    def __init__(
        self,
        root: Path,
        processes: Sequence[str],
        faults: Sequence[str],
        seed: int,
        limit: int | None = None,
    ) -> None:
        self.address = f"sublet-gate-{secrets.token_hex(8)}"
        self.points: dict[Point, Met] = {}
        self.paths: Counter[tuple[str, str, str]] = Counter()
        """How often (process, sort of file, fault) was met, by the file that strace saw."""
        self.faulted: dict[int, str] = {}
        """Process ids that met a fault, and which was the last."""
        self.doomed: dict[int, tuple[str, float]] = {}
        """Agents whose journal failed, and must end: of what, and since when (monotonic)."""
        self.owed: dict[str, str] = {}
        """Paths whose fsync failed and hasn't succeeded since, and at which point that was."""
        self._root = root
        self._processes = processes
        self._faults = faults
        self._limit = limit
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._one = threading.Lock()
        self._enabled = False
        self._rest: Counter[str] = Counter()
        self._watched: dict[int, Watched] = {}
        self._number = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind("\0" + self.address)
        self._socket.listen(512)
        self.restless = False
        """Whether faults may come one after the other."""
        self.news_s = time.monotonic()
        self.troubles: list[str] = []
        threading.Thread(target=self._listen, name="gatekeeper", daemon=True).start()

    def enable(self, on: bool) -> None:
        """Let faults happen from now on, or none; a fault that is under way ends first."""
        with self._one:
            self._enabled = on

    def close(self) -> None:
        """Stop listening: all gates stand open."""
        self.enable(False)
        self._socket.close()

    def met(self) -> Counter[str]:
        """Return how often each fault was met."""
        with self._lock:
            total: Counter[str] = Counter()
            for met in self.points.values():
                total.update(met.faults)
            return total

    def due(self) -> list[str]:
        """Return what is still to be met, as far as is known."""
        with self._lock:
            return [
                f"{point}: {fault}"
                for point, met in self.points.items()
                for fault in self._faults_of(point)
                if _is_due(met, fault)
            ]

    def left(self) -> bool:
        """Whether more faults may come."""
        full = self._limit is not None and self.met().total() >= self._limit
        return not full and bool(self.due())

    def is_asked_for(self, point: Point) -> bool:
        """Whether faults are for this point's process."""
        return point.process in self._processes

    # -- the gates ---------------------------------------------------------------------------------

    def _listen(self) -> None:
        while True:
            try:
                line, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(line,), daemon=True).start()

    def _serve(self, line: socket.socket) -> None:
        with line, contextlib.suppress(OSError, ValueError):
            said = json.loads(line.makefile("rb").readline(1 << 20))
            self._let_go_first(said["tid"])
            try:
                strace, fault, point = self._decide(said)
            except ProcessLookupError:
                return
            except AssertionError as error:
                self.troubles.append(str(error))
                return
            if strace is None:
                line.sendall(b"g")
                return
            try:
                self._watch(line, said, strace, fault, point)
            except AssertionError as error:
                self.troubles.append(str(error))
            finally:
                self._one.release()

    def _let_go_first(self, thread: int) -> None:
        """A thread that strace is on has come to its next write: it waits until strace is off, or
        that would be met, half seen."""
        with self._lock:
            watched = self._watched.pop(thread, None)
        if watched is not None:
            watched.passed.set()
            watched.over.wait(LET_GO_LIMIT_S)

    def _faults_of(self, point: Point) -> Sequence[str]:
        return self._faults if point.process in self._processes else ()

    def _passed(self, point: Point, call: int = 1, *, move: bool = False) -> Met:
        met = self.points.get(point)
        if met is None:
            met = self.points[point] = Met(call, move)
            self.news_s = time.monotonic()
        met.passed += 1
        return met

    def _decide(self, said: dict[str, Any]) -> tuple[Strace | None, str, Point]:
        point = Point(said["process"], said["file"], said["place"])
        with self._lock:
            lazy = point.file == LAZY
            candidates = [] if lazy else [(point, self._passed(point))]
            if said["how"] != "commit":
                self.owed.pop(said["path"], None)
            rare = any(met.passed <= RARE for _, met in candidates)
            rested = rare or self.restless or self._rest[point.process] <= 0
            self._rest[point.process] -= 1
            if said["how"] == "commit":
                for call in (1, 2) if lazy else LATER:
                    place = f"call {call} of a commit: SQLite moves its log into the database"
                    later = Point(point.process, point.file, place)
                    candidates.append((later, self._passed(later, call, move=True)))
            due = [
                (point, met, fault)
                for point, met in candidates
                for fault in self._faults_of(point)
                if _is_due(met, fault)
            ]
        if not due or not rested or not self._one.acquire(blocking=False):
            return None, "", point
        try:
            full = self._limit is not None and self.met().total() >= self._limit
            if not self._enabled or full:
                self._one.release()
                return None, "", point
            # Its own faults before those that any commit may meet.
            own = [one for one in due if not one[1].move] or due
            point, met, fault = self._random.choice(own)
            with self._lock:
                met.tries[fault] += 1
                self._number += 1
            out = self._root / f"strace-{self._number}"
            # Strace counts fsync and fdatasync apart: only the one that comes is to be met.
            calls = CALLS if said["how"] == "commit" else said["how"]
            strace = Strace(said["tid"], fault, out, first=met.call, calls=calls)
            return strace, fault, point
        except BaseException:
            self._one.release()
            raise

    def _watch(
        self, line: socket.socket, said: dict[str, Any], strace: Strace, fault: str, point: Point
    ) -> None:
        """Let the thread go on, and wait until it met the fault or did without a durable write."""
        watched = Watched()
        with self._lock:
            self._watched[said["tid"]] = watched
            before = self.faulted.get(said["pid"])
            self.faulted[said["pid"]] = f"{fault} at {point}"
        line.sendall(b"g")
        deadline = time.monotonic() + MEET_LIMIT_S
        try:
            while strace.running and not strace.met() and not watched.passed.is_set():
                if time.monotonic() > deadline:
                    break
                time.sleep(0.002)
            strace.let_go()
        finally:
            watched.over.set()
        met = strace.met()
        with self._lock:
            self._watched.pop(said["tid"], None)
            if not met:
                if before is None and not strace.cut_off():
                    self.faulted.pop(said["pid"], None)
                return
            self.points[point].faults[fault] += 1
            lives = said["pid"] in self.faulted
            if lives and point.file == JOURNAL and not self.points[point].move:
                self.doomed[said["pid"]] = f"{fault} at {point}", time.monotonic()
            self._rest[point.process] = self._random.randrange(REST)
            self.news_s = time.monotonic()
            for call in met:
                self.paths[(point.process, file_of(call.path), fault)] += 1
                if said["how"] != "commit" and call.path == said["path"]:
                    self.owed[call.path] = f"{fault} at {point}"

    def forget(self, pid: int) -> str | None:
        """A process has ended, and another may get its number. Return the last fault it met."""
        with self._lock:
            self.doomed.pop(pid, None)
            return self.faulted.pop(pid, None)

    def still_owed(self) -> list[str]:
        """Return the paths that are there and were never made durable after a fault, but for what
        is written aside: it counts for nothing before it is renamed."""
        with self._lock:
            return [
                f"{path} ({why})"
                for path, why in self.owed.items()
                if os.path.exists(path) and not ASIDE.search(path)
            ]


def file_of(path: str) -> str:
    """Name the sort of file of a path that strace saw."""
    name = path.rsplit("/", 1)[-1]
    if name.endswith(("-wal", "-journal")):
        return "write-ahead log"
    if name.endswith((".sqlite", ".db")):
        return "database"
    if "/blobs/" in path:
        return "blob" if "/tmp/" in path.rsplit("/blobs", 1)[-1] else "blob folder"
    if "/checkpoint/" in path:
        return "checkpoint"
    return "file"


def _is_due(met: Met, fault: str) -> bool:
    tries = LATER_TRIES if met.move else TRIES
    return not met.faults[fault] and met.tries[fault] < tries
