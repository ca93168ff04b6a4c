"""Leases that wait until this machine knows which image their job's tag means. Pure. Rules:

1. A lease is signed only for an image that is known by its content. Where the job names a tag, and
   the lease doesn't say what it meant when the job ran before, it is looked up first.
2. That takes MOST_MS at the most, and no longer than leaves MARGIN_MS of the lease's time to
   answer: then the lease is refused as by a pull that failed, and somebody else is asked.
3. The lease is judged anew when the answer has come: the machine may be another one by then.
"""

from dataclasses import dataclass, field

from sublet_contracts.documents import Job, Lease
from sublet_contracts.image_references import has_tag
from sublet_contracts.wire import Assign

MOST_MS = 6_000
MARGIN_MS = 1_500
NO_IMAGES = "process"
"""the runner that uses none"""


def must_look_up(job: Job, lease: Lease, runner: str) -> bool:
    """Say whether it has to be found out what the job's tag means."""
    return runner != NO_IMAGES and not lease.image and has_tag(job.image)


@dataclass(frozen=True)
class LookUp:
    """One lease that waits. Times in ms of the agent's clock."""

    assign: Assign
    image: str
    """as the job names it"""
    since_ms: int
    until_ms: int

    def is_over(self, now_ms: int) -> bool:
        """Say whether it has taken too long; also where the clock went back."""
        return not self.since_ms <= now_ms < self.until_ms


@dataclass
class LookUps:
    """Those that wait, by lease id."""

    _waiting: dict[str, LookUp] = field(default_factory=dict)

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._waiting

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def begin(self, assign: Assign, image: str, left_ms: int, now_ms: int) -> None:
        """Let a lease wait. `left_ms`: how long it may still be answered."""
        span_ms = max(0, min(MOST_MS, left_ms - MARGIN_MS))
        self._waiting[assign.lease.id] = LookUp(assign, image, now_ms, now_ms + span_ms)

    def end(self, lease_id: str) -> LookUp | None:
        """Return a lease that waited, which it doesn't any more; None: it didn't."""
        return self._waiting.pop(lease_id, None)

    def over(self, now_ms: int) -> list[LookUp]:
        """Return those that have waited for too long."""
        return [one for one in self._waiting.values() if one.is_over(now_ms)]
