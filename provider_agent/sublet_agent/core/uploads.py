"""How fast something gets off this machine, for the heartbeat. Pure. Rules:

1. The speed is that of the last half minute; before that has passed, since it began. Not of less:
   content arrives a pack at a time, several side by side.
2. What was at the broker before counts as there, not as sent: only what is sent makes the speed.
3. Nothing is decided by any of it: no money, no lease, no end of a run.
"""

from collections import deque
from dataclasses import dataclass

from sublet_agent.core.records import UploadKind
from sublet_contracts.encoding import MAX_INTEGER
from sublet_contracts.wire import RunUpload

SPEED_OVER_MS = 30_000
MAX_LOOKS = 64


@dataclass(frozen=True)
class Moved:
    """How far an upload is."""

    total_bytes: int
    there_bytes: int
    """at the broker: sent, or there before"""
    sent_bytes: int


class UploadOfRun:
    """One upload, from look to look."""

    def __init__(self, kind: UploadKind, step: int) -> None:
        self.kind = kind
        self.step = step
        self._looks: deque[tuple[int, Moved]] = deque(maxlen=MAX_LOOKS)

    def moved(self, moved: Moved, now_ms: int) -> None:
        """Take how far it is."""
        looks = self._looks
        if looks and (now_ms < looks[-1][0] or moved.sent_bytes < looks[-1][1].sent_bytes):
            looks.clear()  # the clock was set back, or the upload began anew
        # One that is as old as the speed looks back is kept, to measure from.
        while len(looks) > 1 and now_ms - looks[1][0] >= SPEED_OVER_MS:
            looks.popleft()
        looks.append((now_ms, moved))

    def told(self, now_ms: int) -> RunUpload | None:
        """Return the figures for the heartbeat; None where there was no look yet."""
        if not self._looks:
            return None
        (first_ms, first), (last_ms, last) = self._looks[0], self._looks[-1]
        span_ms = last_ms - first_ms
        sent_bytes = last.sent_bytes - first.sent_bytes
        return RunUpload(
            kind=self.kind,
            step=self.step,
            total_bytes=_bounded(last.total_bytes),
            there_bytes=_bounded(last.there_bytes),
            sent_bytes=_bounded(last.sent_bytes),
            bytes_per_s=_bounded(sent_bytes * 1000 // span_ms) if span_ms else 0,
            age_ms=_bounded(now_ms - last_ms),
        )


def _bounded(value: int) -> int:
    return min(max(0, value), MAX_INTEGER)
