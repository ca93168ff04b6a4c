"""Wake-ups for those who wait for news of a job. A follower reads the database only when woken."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from sublet_broker.service.errors import Refusal
from sublet_contracts.problems import ProblemCode

MAX_FOLLOWERS = 2_000
MAX_FOLLOWERS_PER_PARTY = 64


class Feeds:
    """Who waits for which job. Belongs to one event loop; `post` may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: dict[str, set[asyncio.Event]] = {}
        self._per_party: Counter[str] = Counter()

    def post(self, job: str) -> None:
        """Wake the followers of `job` (service hook: called after a commit)."""
        if job in self._events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, job)

    def wake_all(self) -> None:
        """Wake everybody: the broker stops."""
        for job in list(self._events):
            self._wake(job)

    @property
    def followers(self) -> int:
        """How many streams are open."""
        return sum(self._per_party.values())

    @contextmanager
    def following(self, party: str, job: str) -> Iterator[asyncio.Event]:
        """Give an event that is set whenever the job has news. Raises Refusal
        (too_many_streams)."""
        mine = self._per_party[party]
        if mine >= MAX_FOLLOWERS_PER_PARTY or self.followers >= MAX_FOLLOWERS:
            raise Refusal(
                ProblemCode.TOO_MANY_STREAMS,
                f"{mine} log streams of yours are open, {self.followers} in all",
                open_streams=mine,
            )
        event = asyncio.Event()
        self._per_party[party] += 1
        self._events.setdefault(job, set()).add(event)
        try:
            yield event
        finally:
            self._per_party[party] -= 1
            if not self._per_party[party]:
                del self._per_party[party]
            self._events[job].discard(event)
            if not self._events[job]:
                del self._events[job]

    def _wake(self, job: str) -> None:
        for event in self._events.get(job, ()):
            event.set()
