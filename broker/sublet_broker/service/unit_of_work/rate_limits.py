"""Quotas: how much of what grows anyone may cause in an hour.

Whatever a stranger can send leaves a row, a log entry or an event behind. Each is cheap, and none
may be had without end: beyond its quota a request is refused (too_many), a report waits (NotYet),
and a remark is not written. Counts are kept in memory, for a bounded number of parties; a restart
begins anew, which costs nothing.
"""

from collections import OrderedDict

from sublet_broker.service.errors import NotYet, Refusal
from sublet_contracts.problems import ProblemCode

HOUR_MS = 3_600_000
REMEMBERED = 100_000


class RateLimits:
    """Counts of the present hour. Any thread may ask: two at one moment may count as one, which a
    bound against floods can bear."""

    def __init__(self) -> None:
        self._counts: OrderedDict[tuple[str, str], tuple[int, int]] = OrderedDict()

    def take(self, what: str, party: str, limit: int, now_ms: int) -> bool:
        """Count one more; say whether it lies within `limit` an hour. `party` "": all together."""
        hour = now_ms // HOUR_MS
        since, count = self._counts.pop((what, party), (hour, 0))
        count = count + 1 if since == hour else 1
        self._counts[what, party] = (hour, count)
        if len(self._counts) > REMEMBERED:
            self._counts.popitem(last=False)
        return count <= limit

    def demand(self, what: str, party: str, limit: int, now_ms: int) -> None:
        """Count one more. Raises Refusal (too_many) beyond `limit` an hour."""
        if not self.take(what, party, limit, now_ms):
            whom = "from you" if party else "altogether"
            raise Refusal(
                ProblemCode.TOO_MANY,
                f"more than {limit} {what} in an hour {whom}",
                what=what,
                limit=limit,
            )

    def defer(self, what: str, party: str, limit: int, now_ms: int) -> None:
        """Count one more. Raises NotYet beyond `limit` an hour: its sender sends it again."""
        if not self.take(what, party, limit, now_ms):
            raise NotYet(f"more than {limit} {what} in an hour")
