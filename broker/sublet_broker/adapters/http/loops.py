"""The broker's own work: scheduling, supervision, verdicts, settling, tidying, scrubbing.

Each loop runs in its own thread, so that a hanging match engine holds up nothing but matching. It
runs at least once a period, and at once when it is woken. A loop that fails logs it and goes on.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from sublet_broker.service.ports import MatcherAway

log = logging.getLogger("sublet.loops")

OVERDUE_S = 30.0
"""A loop that hasn't come round for so long (and its period) is reported as stuck."""
PAUSE_S = 0.01
"""Between two rounds, so that a burst of wake-ups is one round."""


@dataclass
class Loop:
    """One piece of recurring work. `work` returns how much it did; `then` are woken if it did."""

    name: str
    work: Callable[[], int | None]
    period_s: float
    then: tuple[str, ...] = ()
    rounds: int = 0
    failures: int = 0
    error: str = ""
    last_s: float = field(default_factory=time.monotonic)
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def trouble(self) -> str:
        """Say what is wrong with it, or ''."""
        if self.error:
            return self.error
        silent_s = time.monotonic() - self.last_s
        if silent_s > self.period_s + OVERDUE_S:
            return f"stuck for {silent_s:.0f} s"
        return ""


class Loops:
    """All of them."""

    def __init__(self, loops: list[Loop]) -> None:
        self.all = {loop.name: loop for loop in loops}
        self._pool = ThreadPoolExecutor(max(1, len(loops)), thread_name_prefix="loop")
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    def start(self) -> None:
        """Start them on the running event loop."""
        for loop in self.all.values():
            loop.last_s = time.monotonic()
            self._tasks.append(asyncio.create_task(self._run(loop), name=loop.name))

    def wake(self, *names: str) -> None:
        """Let these come round now. Event loop only."""
        for name in names:
            if name in self.all:
                self.all[name].wake.set()

    async def stop(self) -> None:
        """Let each finish its round, then end."""
        self._stopping = True
        for loop in self.all.values():
            loop.wake.set()
        await asyncio.gather(*self._tasks)
        self._pool.shutdown(wait=True)

    async def _run(self, loop: Loop) -> None:
        running = asyncio.get_running_loop()
        while not self._stopping:
            loop.wake.clear()
            done: int | None = 0
            try:
                done = await running.run_in_executor(self._pool, loop.work)
                if loop.error:
                    log.info("%s works again", loop.name)
                loop.error = ""
            except MatcherAway as error:
                if not loop.error:
                    log.warning("matching waits: %s", error)
                loop.error = f"matching waits: {error}"
            except Exception as error:
                loop.failures += 1
                loop.error = f"{type(error).__name__} in its last round; see the broker's log"
                log.exception("%s failed and goes on", loop.name)
            loop.rounds += 1
            loop.last_s = time.monotonic()
            if done:
                self.wake(*loop.then)
            await asyncio.sleep(PAUSE_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(loop.wake.wait(), loop.period_s)
