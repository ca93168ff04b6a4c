"""The agent's clock: the machine's, but it never jumps while the agent works.

It is read from the machine once, and again when the broker finds it wrong: after the owner has set
it, or after the machine has slept (the monotonic clock does not count that).
"""

import time


class SteadyClock:
    """Milliseconds since 1970. Any thread may ask."""

    def __init__(self) -> None:
        self._anchor = (0, 0)
        self.set()

    def set(self) -> None:
        """Read the machine's clock anew."""
        self._anchor = (time.time_ns(), time.monotonic_ns())

    def now_ms(self) -> int:
        """Return the time."""
        wall_ns, at_ns = self._anchor
        return (wall_ns + time.monotonic_ns() - at_ns) // 1_000_000
