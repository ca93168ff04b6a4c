"""Has the machine looked at, as often as the broker wants to hear of us, and whenever something
waits for it. The loop waits for none of it: looks are made in a thread of their own.
"""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from sublet_agent.adapters.machine.facts import LOOKER_NAME, Machine
from sublet_agent.core import events
from sublet_agent.core.supply import Facts

MOST_BETWEEN_S = 3.0


class Listener(Protocol):
    """Who takes what is seen."""

    @property
    def now_ms(self) -> Callable[[], int]: ...

    def say(self, text: str) -> None: ...

    def post(self, event: events.Event) -> None: ...


class Watch:
    """Looks, and looks again."""

    def __init__(
        self, machine: Machine, listener: Listener, first: Facts, between_ms: Callable[[], int]
    ) -> None:
        """`between_ms`: how much time may pass from one look to the next."""
        self._machine = machine
        self._listener = listener
        self._first = first
        self._between_ms = between_ms
        self._wanted = asyncio.Event()
        self._trouble = ""
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=LOOKER_NAME)

    def begin(self) -> None:
        """Tell what was seen at the start, before anything is offered."""
        self._listener.post(events.FactsRead(self._first, self._listener.now_ms()))

    def look_now(self) -> None:
        """Something waits for a look."""
        self._wanted.set()

    def close(self) -> None:
        """Look no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self) -> None:
        """Look until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            between_s = min(self._between_ms() / 1000, MOST_BETWEEN_S)
            with contextlib.suppress(TimeoutError):  # it is time
                await asyncio.wait_for(self._wanted.wait(), between_s)
            self._wanted.clear()
            began_ms = self._listener.now_ms()
            try:
                seen = await loop.run_in_executor(self._threads, self._machine.look)
            except (OSError, ValueError, RuntimeError) as error:
                # Such as a state folder that can't be reached: the next look may see more, and what
                # runs doesn't depend on this one.
                if repr(error) != self._trouble:
                    self._listener.say(f"the machine can't be looked at: {error!r}")
                self._trouble = repr(error)
                continue
            self._trouble = ""
            for fault in seen.faults:
                self._listener.post(events.DeviceFailed(fault.uuid, fault.says))
            self._listener.post(events.FactsRead(seen.facts, began_ms))
