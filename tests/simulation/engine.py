"""The virtual clock, the queue of what happens next, and the one source of chance.

Everything that happens in a market is an action in one heap, ordered by time and then by when it
was planned; every draw comes from one seeded Random. So one seed gives one history, and the digest
of its log says whether two histories are the same.
"""

import hashlib
import heapq
from collections import deque
from collections.abc import Callable
from random import Random

BEGIN_MS = 1_767_225_600_000
"""The true time at which every market begins; ms since 1970."""

Action = Callable[[], None]


class Crashed(BaseException):
    """The process that runs this code dies here. Not an Exception: nobody catches it by chance."""


class Engine:
    """Time, chance and the log of one market. Times are true ms since the market began."""

    def __init__(self, seed: int, *, trace: Callable[[str], None] | None = None) -> None:
        self.random = Random(seed)
        self.now_ms = 0
        self.steps = 0
        self.last: deque[str] = deque(maxlen=50)
        self._trace = trace
        self._heap: list[tuple[int, int, Action]] = []
        self._planned = 0
        self._digest = hashlib.sha256()

    def after(self, delay_ms: int, action: Action) -> None:
        """Plan an action."""
        self._planned += 1
        heapq.heappush(self._heap, (self.now_ms + max(0, delay_ms), self._planned, action))

    def run(self, until_ms: int) -> None:
        """Do what is planned up to then, in its order."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_ms:
            self.now_ms, _, action = pop(heap)
            self.steps += 1
            action()
        self.now_ms = max(self.now_ms, until_ms)

    def draw_ms(self, least_ms: int, most_ms: int) -> int:
        """Return a span between the two."""
        # randint takes five times as long, and needs no draw of its own to be fair to a ms.
        return least_ms + int(self.random.random() * (most_ms - least_ms + 1))

    def happens(self, chance: float) -> bool:
        """Say whether something with this probability happens now."""
        return self.random.random() < chance

    def say(self, text: str) -> None:
        """Put a line into the log."""
        line = f"{self.now_ms / 1000:10.3f} s  {text}"
        self.last.append(line)
        self._digest.update(line.encode())
        self._digest.update(b"\n")
        if self._trace is not None:
            self._trace(line)

    @property
    def digest(self) -> str:
        """SHA-256 over all lines of the log so far."""
        return self._digest.hexdigest()


class Quartz:
    """A machine's clock, which may run fast or slow. Never jumps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._since_ms = 0
        self._ahead_ms = 0.0
        self._ppm = 0

    def ahead_ms(self) -> int:
        """Return by how much it is ahead of true time."""
        if not self._ppm:
            return int(self._ahead_ms)
        passed_ms = self._engine.now_ms - self._since_ms
        return int(self._ahead_ms + passed_ms * self._ppm / 1_000_000)

    def now_ms(self) -> int:
        """Return its ms since the market began."""
        if not self._ppm:
            return self._engine.now_ms + int(self._ahead_ms)
        return self._engine.now_ms + self.ahead_ms()

    def drift(self, ppm: int) -> None:
        """From now on it gains so many microseconds a second."""
        self._ahead_ms = float(self.ahead_ms())
        self._since_ms, self._ppm = self._engine.now_ms, ppm
