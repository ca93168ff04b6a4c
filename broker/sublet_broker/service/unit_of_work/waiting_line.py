"""Who waits for a machine, in the order in which they are served, and how many are before whom.

- Jobs are served as matching.py says: those that have lost their machine first, then by age.
- There is a line for each kind of device. A job that takes any kind stands in all of them.
- A place says how many are before a job that want the same kind of device, at most: one of them
  that no free machine fits is stepped over.

Kept in memory, by what the scheduler is told of; to find a place takes a halving of each line.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from threading import Lock
from typing import NamedTuple

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import JobFact
from sublet_broker.market.order_book import Place, place_of
from sublet_contracts.documents import Job

ANY = "any"


class Standing(NamedTuple):
    """Where a job stands."""

    number: int
    """from 1"""
    device_kind: str
    """what it wants: gpu, cpu or any"""


class WaitingLine:
    """The queued jobs. Any thread may ask."""

    def __init__(self) -> None:
        self._lines: dict[str, list[Place]] = {}
        self._known: dict[str, tuple[str, Place]] = {}
        self._lock = Lock()

    def put(self, job: JobFact) -> None:
        """A job waits (or what is known of it has changed)."""
        kind, place = accepted(job.envelope, Job).resources.device_kind, place_of(job)
        with self._lock:
            self._remove(job.id)
            insort(self._lines.setdefault(kind, []), place)
            self._known[job.id] = (kind, place)

    def remove(self, job: str) -> None:
        """It waits no longer."""
        with self._lock:
            self._remove(job)

    def standing(self, job: str) -> Standing | None:
        """Return where a job stands; None: it doesn't wait, as far as is known."""
        with self._lock:
            known = self._known.get(job)
            if known is None:
                return None
            kind, place = known
            before = sum(bisect_left(line, place) for line in self._beside(kind))
            return Standing(before + 1, kind)

    def length(self, kind: str) -> int:
        """Return how many a job that came now would find before it."""
        with self._lock:
            return sum(map(len, self._beside(kind)))

    def _beside(self, kind: str) -> Iterable[list[Place]]:
        """Return the lines of all who may want the same."""
        return [
            line for other, line in self._lines.items() if ANY in (kind, other) or kind == other
        ]

    def _remove(self, job: str) -> None:
        known = self._known.pop(job, None)
        if known is not None:
            line = self._lines[known[0]]
            del line[bisect_left(line, known[1])]
