"""The broker's clock and its randomness.

The clock starts at the machine's wall time, or at the high-water mark of an earlier run if that is
later, and goes on by the time since boot. So it never goes back, neither when somebody sets the
machine's clock nor over a restart; and no jump of the wall clock makes all agents look silent.

Where it and the wall clock differ it goes faster or slower until they meet, as adjtime(3) does: by
up to a tenth, and by up to a half where they are more than a minute apart. So a broker that began
with a wrong clock agrees with its parties' clocks again by itself. Meanwhile a job's patience is as
much shorter or longer.

Beside it goes a stopwatch, by the time since boot alone: what agents computed while the clock was
held back must not look like too much (market/metering.py).
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sublet_broker.adapters.sql.store import CLOCK_COUNTER, SqlStore
from sublet_broker.market.facts import CounterFact
from sublet_contracts.session import MAX_SLEW

SLEW = 0.1
FAR_APART_MS = 60_000
"""Up to here by SLEW at most, beyond by MAX_SLEW."""
STOPWATCH_COUNTER = "stopwatch"


@dataclass(frozen=True)
class Mark:
    """What a clock leaves behind for the one after it."""

    now_ms: int
    stopwatch_ms: int
    since_boot_ms: int | None
    """When that was, if the machine has not been started since."""


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


def _since_boot_ms() -> int:
    # Unlike CLOCK_MONOTONIC it counts the time a laptop sleeps.
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class SteadyClock:
    """ports.Clock. `after`: the mark of the clock before it."""

    def __init__(
        self,
        after: Mark | None = None,
        *,
        wall_ms: Callable[[], int] = _wall_ms,
        since_boot_ms: Callable[[], int] = _since_boot_ms,
    ) -> None:
        self._wall_ms = wall_ms
        self._since_boot_ms = since_boot_ms
        self._lock = threading.Lock()
        boot_ms = since_boot_ms()
        self._read_at_ms = boot_ms
        self._value_ms = float(max(wall_ms(), after.now_ms if after else 0))
        stopwatch_ms = int(self._value_ms)
        if after is not None:
            # How long no broker ran: nobody but the machine itself can tell, if it can.
            away_ms = stopwatch_ms - after.now_ms
            if after.since_boot_ms is not None:
                away_ms = boot_ms - after.since_boot_ms
            stopwatch_ms = after.stopwatch_ms + max(0, away_ms)
        self._stopwatch_ahead_of_boot_ms = stopwatch_ms - boot_ms

    @classmethod
    def resume(cls, store: SqlStore) -> Self:
        """Go on from the mark in `store`, and leave one there with each commit.

        The mark is in the same commit as the times that were read before it, so no time that
        anybody could have seen is later than it.
        """
        # Counters only rise, and the time since boot does so until the next boot.
        boot = f"{CLOCK_COUNTER}:{_boot()}"
        with store.snapshot() as tx:
            now, stopwatch, since_boot = (
                tx.get(CounterFact, id) for id in (CLOCK_COUNTER, STOPWATCH_COUNTER, boot)
            )
        mark = None
        if now is not None:
            mark = Mark(
                now.value,
                stopwatch.value if stopwatch else now.value,
                since_boot.value if since_boot else None,
            )
        clock = cls(mark)

        def stamps() -> dict[str, int]:
            mark = clock.mark()
            assert mark.since_boot_ms is not None
            return {
                CLOCK_COUNTER: mark.now_ms,
                STOPWATCH_COUNTER: mark.stopwatch_ms,
                boot: mark.since_boot_ms,
            }

        store.stamp_commits(stamps)
        return clock

    def now_ms(self) -> int:
        """See ports.Clock."""
        with self._lock:
            boot_ms = self._since_boot_ms()
            return int(self._value_ms) if boot_ms == self._read_at_ms else self._go_on(boot_ms)

    def stopwatch_ms(self) -> int:
        """See ports.Clock."""
        return self._stopwatch_ahead_of_boot_ms + self._since_boot_ms()

    def mark(self) -> Mark:
        """Return what the next clock needs to go on from here."""
        with self._lock:
            boot_ms = self._since_boot_ms()
            return Mark(self._go_on(boot_ms), self._stopwatch_ahead_of_boot_ms + boot_ms, boot_ms)

    def ahead_of_wall_ms(self) -> int:
        """Return by how much this clock is ahead of the machine's (negative: behind)."""
        return self.now_ms() - self._wall_ms()

    def _go_on(self, boot_ms: int) -> int:
        elapsed_ms = boot_ms - self._read_at_ms
        if elapsed_ms:
            apart_ms = self._wall_ms() - (self._value_ms + elapsed_ms)
            most_ms = elapsed_ms * (MAX_SLEW if abs(apart_ms) > FAR_APART_MS else SLEW)
            self._value_ms += elapsed_ms + min(max(apart_ms, -most_ms), most_ms)
            self._read_at_ms = boot_ms
        return int(self._value_ms)


class SystemEntropy:
    """ports.Entropy from the operating system."""

    def hex(self, count_bytes: int) -> str:
        """See ports.Entropy."""
        return os.urandom(count_bytes).hex()
