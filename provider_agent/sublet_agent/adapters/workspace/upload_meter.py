"""Counts what of an upload has reached the broker, while several threads send it."""

import threading

from sublet_agent.core.uploads import Moved


class UploadMeter:
    """Of one upload. What content has twice is counted once, as it is sent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = False
        self._total_bytes = self._there_bytes = self._sent_bytes = 0

    def begins(self, total_bytes: int) -> None:
        """It is known how much there is, at first about, then exactly."""
        with self._lock:
            self._begun, self._total_bytes = True, total_bytes

    def found(self, size_bytes: int) -> None:
        """So much of it was at the broker before."""
        with self._lock:
            self._there_bytes += size_bytes

    def sent(self, size_bytes: int) -> None:
        """So much of it has arrived there now."""
        with self._lock:
            self._there_bytes += size_bytes
            self._sent_bytes += size_bytes

    @property
    def sent_bytes(self) -> int:
        """What was sent."""
        with self._lock:
            return self._sent_bytes

    @property
    def moved(self) -> Moved | None:
        """How far it is; None: it isn't known yet how much there is."""
        with self._lock:
            if not self._begun:
                return None
            there_bytes = min(self._there_bytes, self._total_bytes)
            return Moved(self._total_bytes, there_bytes, self._sent_bytes)
