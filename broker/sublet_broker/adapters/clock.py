"""The broker's clock and its randomness.

The clock starts at the machine's wall time, or at the high-water mark of an earlier run if that is
later, and goes on by the time since boot. So it never goes back, neither when somebody sets the
machine's clock nor over a restart; and no jump of the wall clock makes all agents look silent.

Where it and the wall clock differ it goes faster or slower until they meet, as adjtime(3) does: by
up to a tenth, and by up to a half where they are more than a minute apart. So a broker that began
with a wrong clock agrees with its parties' clocks again by itself. Meanwhile a job's patience is as
much shorter or longer.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Self

from sublet_broker.adapters.sql_store import CLOCK_COUNTER, SqlStore
from sublet_broker.market.facts import CounterFact

SLEW = 0.1
FAST_SLEW = 0.5
FAR_APART_MS = 60_000
"""How much faster or slower than time it goes at most, to meet the wall clock."""


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


def _since_boot_ms() -> int:
    # Unlike CLOCK_MONOTONIC it counts the time a laptop sleeps.
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class SteadyClock:
    """ports.Clock."""

    def __init__(
        self,
        not_before_ms: int = 0,
        *,
        wall_ms: Callable[[], int] = _wall_ms,
        since_boot_ms: Callable[[], int] = _since_boot_ms,
    ) -> None:
        self._wall_ms = wall_ms
        self._since_boot_ms = since_boot_ms
        self._lock = threading.Lock()
        self._read_at_ms = since_boot_ms()
        self._value_ms = float(max(wall_ms(), not_before_ms))

    @classmethod
    def resume(cls, store: SqlStore) -> Self:
        """Go on from the mark in `store`, and leave one there with each commit.

        The mark is in the same commit as the times that were read before it, so no time that
        anybody could have seen is later than it.
        """
        with store.snapshot() as tx:
            mark = tx.get(CounterFact, CLOCK_COUNTER)
        clock = cls(mark.value if mark else 0)
        store.stamp_commits(clock.now_ms)
        return clock

    def now_ms(self) -> int:
        """See ports.Clock."""
        with self._lock:
            boot_ms = self._since_boot_ms()
            elapsed_ms = boot_ms - self._read_at_ms
            if not elapsed_ms:
                return int(self._value_ms)
            wall_ms = self._wall_ms()
            apart_ms = wall_ms - (self._value_ms + elapsed_ms)
            most_ms = elapsed_ms * (FAST_SLEW if abs(apart_ms) > FAR_APART_MS else SLEW)
            self._value_ms += elapsed_ms + min(max(apart_ms, -most_ms), most_ms)
            self._read_at_ms = boot_ms
            return int(self._value_ms)

    def ahead_of_wall_ms(self) -> int:
        """Return by how much this clock is ahead of the machine's (negative: behind)."""
        return self.now_ms() - self._wall_ms()


class SystemEntropy:
    """ports.Entropy from the operating system."""

    def hex(self, count_bytes: int) -> str:
        """See ports.Entropy."""
        return os.urandom(count_bytes).hex()
