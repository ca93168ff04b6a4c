"""What the edges share: the broker, the threads its synchronous use-cases run in, and wake-ups.

The event loop only moves bytes. Each use-case runs in a thread of a small pool; when more requests
wait for a thread than could be served in time, new ones are turned away (503) instead of piling up.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, TypeVar

from sublet_broker.adapters.http.loops import Loops
from sublet_broker.adapters.http.metrics import Metrics
from sublet_broker.adapters.http.wakeups import Feeds
from sublet_broker.service.broker import Broker
from sublet_broker.service.errors import Refusal
from sublet_contracts.problems import ProblemCode

P = ParamSpec("P")
R = TypeVar("R")

THREADS = 12
MAX_WAITING = 400


@dataclass(frozen=True)
class Probe:
    """One line of /readyz. `check` runs in a thread: what is wrong, or "" when all is well.
    `needed`: the broker isn't ready without it."""

    name: str
    check: Callable[[], str]
    needed: bool = True


@dataclass
class Edge:
    """The broker as its edges see it."""

    broker: Broker
    version: str
    loops: Loops
    metrics: Metrics
    feeds: Feeds
    probes: tuple[Probe, ...] = ()
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(THREADS, thread_name_prefix="use-case")
    )
    _waiting: int = 0

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a use-case in a thread. Raises Refusal (busy) when too many wait."""
        if self._waiting >= MAX_WAITING:
            raise Refusal(
                ProblemCode.BUSY,
                f"{self._waiting} requests wait already",
                waiting=self._waiting,
            )
        return await self.must_call(function, *args, **kwargs)

    async def must_call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Likewise, however many wait: for what has happened already and must be noted."""
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, partial(function, *args, **kwargs))
        finally:
            self._waiting -= 1

    @property
    def waiting(self) -> int:
        """How many use-cases run or wait for a thread."""
        return self._waiting

    def now_ms(self) -> int:
        """Return the broker's time."""
        return self.broker.context.ports.clock.now_ms()

    def wake_market(self) -> None:
        """Something may have changed what can be matched, verified or settled. Event loop only."""
        self.loops.wake(*self.broker.stirred())

    def close(self) -> None:
        """Wait for the use-cases that run, and let the threads go."""
        self._pool.shutdown(wait=True, cancel_futures=True)
