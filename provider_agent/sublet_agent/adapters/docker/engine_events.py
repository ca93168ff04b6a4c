"""Reads what the Docker Engine says of this agent's containers, and remembers it over restarts.

A thread follows the engine's events and connects again when they break. The engine remembers its
last 256 events only, and none over a restart of its own; so each fact of a run is also a line in a
small file of the agent's (no job can write there), as is each signal before we ask for it. What
the facts mean is decided in core/engine_evidence.py.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import docker
import requests
from docker.errors import DockerException

from sublet_agent.core.engine_evidence import EngineFact, EngineMemory, Kind, from_lines, to_line
from sublet_agent.core.runner_port import RunnerError

LABEL = "sublet"
_REMEMBERS = 256
"""So many events the engine keeps; where it has as many, it may have forgotten others."""
_MOST_READ = 4 * _REMEMBERS
_MOST_OOMS = 500
"""A job can bring them about as fast as it likes: of more, the newest alone is kept."""
_MOST_PAUSES = 2000
_MOST_GAPS = 100
_AGAIN_S = 0.5
_KINDS: Mapping[str, Kind] = {
    "kill": "signal",
    "oom": "oom",
    "pause": "pause",
    "unpause": "unpause",
    "die": "die",
}
_NUMBER_IN = {"kill": "signal", "die": "exitCode"}


class EngineEvents:
    """The facts of this agent's runs. Any thread may ask; the engine is asked by `look` alone."""

    def __init__(
        self, client: Callable[[], docker.DockerClient], owner: str, folder: Path | None
    ) -> None:
        """`folder`: where facts are kept; None: in memory only."""
        self._client = client
        self._owner = owner
        self._folder = folder
        self._lock = threading.Lock()
        self._facts: dict[str, list[EngineFact]] = {}
        self._read_bytes: dict[str, int] = {}
        self._away: list[tuple[int, int | None]] = []
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Follow the engine's events from now on, and what it remembers."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._follow, name="sublet-engine-events", daemon=True
                )
                self._thread.start()

    def know(self, run_id: str) -> None:
        """From now on, what happens to this run is noted. Of others nothing is: they were removed,
        and the engine still tells of them."""
        with self._lock:
            self._facts.setdefault(run_id, [])

    def about_to_send(self, run_id: str, number: int) -> None:
        """Note a signal of ours, before the engine is asked to send it."""
        self._add(run_id, EngineFact(time.time_ns(), "own", number))

    def began(self, run_id: str, at_ns: int) -> None:
        """Note when the container was started by us."""
        self._add(run_id, EngineFact(at_ns, "began"))

    def saw(self, run_id: str, kind: Kind) -> None:
        """Note what is so now, and of which no event told."""
        self._add(run_id, EngineFact(time.time_ns(), kind))

    def note(self, run_id: str, fact: EngineFact) -> None:
        """Note what another witness saw of a run."""
        self._add(run_id, fact)

    def facts(self, run_id: str) -> tuple[EngineFact, ...]:
        """Return what is known of a run."""
        with self._lock:
            self._facts.setdefault(run_id, [])
            return tuple(self._known(run_id))

    def away(self) -> list[tuple[int, int]]:
        """Return from when to when, in ms, the engine's events were broken."""
        now_ms = time.time_ns() // 1_000_000
        with self._lock:
            return [(since, now_ms if until is None else until) for since, until in self._away]

    def look(self, wait_s: float = 0.0) -> EngineMemory:
        """Take in all that the engine remembers by now, or by `wait_s` from now."""
        until = f"{time.time() + wait_s:.9f}"
        count = 0
        for event in self._client().api.events(since="0", until=until, decode=True):
            count += 1
            self._take(event)
            if count >= _MOST_READ:
                break
        return EngineMemory(count, full=count >= _REMEMBERS)

    def forget(self, run_id: str) -> None:
        """The run was removed."""
        with self._lock:
            self._facts.pop(run_id, None)
            self._read_bytes.pop(run_id, None)
            if self._folder is not None:
                self._file(run_id).unlink(missing_ok=True)

    # -- the thread ------------------------------------------------------------------------------

    def _follow(self) -> None:
        wanted = {"type": "container", "label": f"{LABEL}.owner={self._owner}"}
        while True:
            # The engine is away, or starts: RunnerError says so, and the others do.
            with contextlib.suppress(
                RunnerError, DockerException, requests.RequestException, OSError, ValueError
            ):
                stream = self._client().api.events(since="0", filters=wanted, decode=True)
                self._came_back()
                for event in stream:
                    self._take(event)
            self._broke()
            time.sleep(_AGAIN_S)

    def _broke(self) -> None:
        with self._lock:
            if not self._away or self._away[-1][1] is not None:
                self._away = [*self._away, (time.time_ns() // 1_000_000, None)][-_MOST_GAPS:]

    def _came_back(self) -> None:
        with self._lock:
            if self._away and self._away[-1][1] is None:
                self._away[-1] = (self._away[-1][0], time.time_ns() // 1_000_000)

    def _take(self, event: Mapping[str, Any]) -> None:
        about = (event.get("Actor") or {}).get("Attributes") or {}
        action = str(event.get("Action"))
        at_ns = event.get("timeNano")
        run_id = about.get(f"{LABEL}.run")
        ours = event.get("Type") == "container" and about.get(f"{LABEL}.owner") == self._owner
        if not ours or action not in _KINDS or not run_id or not isinstance(at_ns, int):
            return
        said = str(about.get(_NUMBER_IN.get(action, ""), "0"))
        number = int(said) if said.isdigit() else 0
        self._add(run_id, EngineFact(at_ns, _KINDS[action], number))

    # -- the files -------------------------------------------------------------------------------

    def _add(self, run_id: str, fact: EngineFact) -> None:
        with self._lock:
            if run_id not in self._facts and not self._has_file(run_id):
                return
            known = self._known(run_id)
            if fact in known:
                return
            alike = [other for other in known if other.kind == fact.kind]
            if fact.kind in ("pause", "unpause") and len(alike) >= _MOST_PAUSES:
                return
            crowded = fact.kind == "oom" and len(alike) >= _MOST_OOMS
            if crowded:
                known.remove(alike[-1])
            known.append(fact)
            known.sort()
            if self._folder is None or crowded:
                return
            # On a full disk they are in memory only: that ends runs for a reason of its own.
            with contextlib.suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                file = os.open(self._file(run_id), flags, 0o600)
                try:
                    os.write(file, to_line(fact).encode())
                finally:
                    os.close(file)

    def _known(self, run_id: str) -> list[EngineFact]:
        """Return the facts, with what another process (the agent before, the watchdog) noted."""
        known = self._facts.setdefault(run_id, [])
        if self._folder is not None:
            with contextlib.suppress(OSError):
                size = self._file(run_id).stat().st_size
                if size != self._read_bytes.get(run_id):
                    self._read_bytes[run_id] = size
                    noted = from_lines(self._file(run_id).read_text("ascii", "replace"))
                    known[:] = sorted({*known, *noted})
        return known

    def _has_file(self, run_id: str) -> bool:
        return self._folder is not None and self._file(run_id).exists()

    def _file(self, run_id: str) -> Path:
        assert self._folder is not None
        if "/" in run_id or run_id in ("", ".", ".."):
            raise RunnerError(f"run_id {run_id!r}: not a name")
        return self._folder / run_id
