"""The deadlines of runs on disk: the agent renews them, the watchdog reads them.

`STATE/deadlines/RUN` says when a run is to be gone, by the clock that counts sleep too and starts
at boot; `RUN.passed` is the watchdog's note that it was ended for it. No job of the Docker runner
can reach them. They are not made durable: after a crash of the machine no run is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from sublet_agent.core.deadlines import Over

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BYTES = 512
"""Each file has this size, so that one that is there can be renewed on a full disk too."""
_NOTE = ".passed"
_NEW = ".new"


@dataclass(frozen=True)
class RunDeadline:
    """When the run is to be gone: ms of `boot_clock_ms`, in this boot of the machine."""

    run_id: str
    boot: str
    at_ms: int
    over: Over


def boot_id() -> str:
    """Return what names this start of the machine. Raises OSError."""
    return _BOOT_ID.read_text().strip()


def boot_clock_ms() -> int:
    """Return the ms since this machine was started, sleep included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class DeadlineFiles:
    """One agent's deadlines."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "deadlines"
        self._boot = boot_id()

    def renew(self, run_id: str, in_ms: int, over: Over) -> None:
        """Let a run live so much longer. Raises OSError."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        deadline = RunDeadline(run_id, self._boot, boot_clock_ms() + in_ms, over)
        content = json.dumps(asdict(deadline)).encode().ljust(_BYTES)
        path, new = self._folder / run_id, self._folder / (run_id + _NEW)
        try:
            new.write_bytes(content)
            os.replace(new, path)
        except OSError:
            # A full disk must not end runs by itself: the place that the file has is enough.
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            with path.open("r+b") as file:
                file.write(content)

    def all(self) -> list[RunDeadline]:
        """Return the deadlines of this boot; others are removed, for their runs are gone."""
        found = []
        for name in self._names():
            if name.endswith((_NOTE, _NEW)):
                continue
            deadline = self.read(name)
            if deadline is not None and deadline.boot == self._boot:
                found.append(deadline)
            elif deadline is not None:
                self.remove(name)
        return found

    def read(self, run_id: str) -> RunDeadline | None:
        """Return a run's deadline; None where there is none, or while it is being written."""
        try:
            value = json.loads((self._folder / run_id).read_bytes())
            deadline = RunDeadline(**value)
        except (OSError, ValueError, TypeError):
            return None
        known = deadline.run_id == run_id and deadline.over in get_args(Over)
        return deadline if known and isinstance(deadline.at_ms, int) else None

    def remove(self, run_id: str) -> None:
        """The run has ended: its deadline means nothing any more. A note stays."""
        (self._folder / run_id).unlink(missing_ok=True)

    def forget(self, run_id: str) -> None:
        """The run was removed."""
        self.remove(run_id)
        (self._folder / (run_id + _NOTE)).unlink(missing_ok=True)

    def note(self, deadline: RunDeadline) -> None:
        """Note that the run is being ended because its deadline has passed. Raises OSError."""
        (self._folder / (deadline.run_id + _NOTE)).write_text(deadline.over)

    def passed(self, run_id: str) -> Over | None:
        """Return what was over when the watchdog ended the run; None: it did not."""
        try:
            said = (self._folder / (run_id + _NOTE)).read_text()
        except OSError:
            return None
        return "budget" if said == "budget" else "silence"

    def forget_notes(self, but: set[str]) -> None:
        """Forget what was noted of runs that are not among these."""
        for name in self._names():
            if name.endswith(_NOTE) and name.removesuffix(_NOTE) not in but:
                (self._folder / name).unlink(missing_ok=True)

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return []
