"""Match shards: what each holds, what it is told and replies, and when it is replaced.

Nothing here knows Ray or the database: Ray's workers (tasks.py), the broker that stands in for
them (matcher.py) and the simulator run this code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from hashlib import sha256
from typing import Generic, Literal, TypeVar

from sublet_broker.market.facts import JobFact
from sublet_broker.market.matching import BookEntry
from sublet_broker.market.order_book import OrderBook
from sublet_broker.service.leases.candidates import load_order_book
from sublet_broker.service.ports import Transaction

SHARD_ANSWER_S = 5.0
SILENCES = 2
"""So often a shard may miss its time before it is replaced."""

A = TypeVar("A")


@dataclass(frozen=True)
class Change:
    """Something that a shard has to know. The newest of an offer or a job replaces the others."""

    what: Literal["offer", "offer_gone", "job", "job_gone"]
    id: str
    pool: str = ""
    entry: BookEntry | None = None
    job: JobFact | None = None


@dataclass(frozen=True)
class ShardMatch:
    """A match, with the pool whose book it came from."""

    pool: str
    job: str
    offer: str
    device_ids: tuple[str, ...]


@dataclass(frozen=True)
class ShardReply:
    """A shard's proposals. `incarnation` changes whenever it was built anew."""

    incarnation: str
    pools: tuple[str, ...]
    matches: tuple[ShardMatch, ...]
    due_ms: int | None = None
    """Without any: when time alone may bring one, if no change does before."""


class Silence(Enum):
    """Why there is no reply."""

    LATE = "late"
    DEAD = "dead"


def shard_of(pool: str, shards: int) -> int:
    """Return the shard that holds a pool: the same in every process."""
    return int.from_bytes(sha256(pool.encode()).digest()[:8]) % shards


class Shard:
    """A match shard: the books of the pools that fall to it, in memory.

    Making it is its recovery: it reads the database and is as if it had always been there. It
    proposes and never commits.
    """

    def __init__(self, tx: Transaction, number: int, shards: int, incarnation: str) -> None:
        self.incarnation = incarnation
        self._number = number
        self._shards = shards
        self._books: dict[str, OrderBook] = {}
        self._jobs: dict[str, JobFact] = {}
        # What has expired is judged at each proposal by the caller's clock, and who is set aside
        # by the scheduler, which then tells of it: this process has no clock of the market's.
        entries, jobs = load_order_book(tx, None)
        for job in jobs:
            self._want(job)
        for entry in entries:
            self._put(entry)
        self._list_pools()

    def propose(self, changes: Sequence[Change], now_ms: int) -> ShardReply:
        """Take up what has changed, then match."""
        for change in changes:
            self._apply(change)
        matches = tuple(
            ShardMatch(pool, match.job, match.offer, match.device_ids)
            for pool in self._pools
            for match in self._books[pool].propose(now_ms)
        )
        if matches:
            return ShardReply(self.incarnation, self._pools, matches)
        due_ms = [ms for book in self._books.values() if (ms := book.due_ms(now_ms)) is not None]
        return replace(self._idle, due_ms=min(due_ms)) if due_ms else self._idle

    def _list_pools(self) -> None:
        self._pools = tuple(sorted(self._books))
        self._idle = ShardReply(self.incarnation, self._pools, ())

    def _apply(self, change: Change) -> None:
        if change.entry is not None:
            self._put(change.entry)
        elif change.job is not None:
            self._want(change.job)
        elif change.what == "offer_gone":
            book = self._books.get(change.pool)
            if book is not None:
                book.remove_offer(change.id)
                if not len(book):
                    del self._books[change.pool]
                    self._list_pools()
        else:
            self._jobs.pop(change.id, None)
            for book in self._books.values():
                book.remove_job(change.id)

    def _put(self, entry: BookEntry) -> None:
        pool = entry.offer.pool
        if shard_of(pool, self._shards) != self._number:
            return
        book = self._books.get(pool)
        if book is None:
            book = self._books[pool] = OrderBook(pool)
            for job in self._jobs.values():
                book.add_job(job)
            self._list_pools()
        book.put_offer(entry)

    def _want(self, job: JobFact) -> None:
        self._jobs[job.id] = job
        for book in self._books.values():
            book.add_job(job)


class ShardKeeper(Generic[A]):
    """The actors that are the shards now. One that died, or stays silent, is replaced; what it was
    just told the new one reads from the database, where it was committed before."""

    def __init__(self, count: int, make: Callable[[int], A], end: Callable[[A], None]) -> None:
        self._make = make
        self._end = end
        self._silences = [0] * count
        self.actors = [make(number) for number in range(count)]

    def rebuild(self) -> None:
        """Replace all of them by new ones."""
        for actor in self.actors:
            self._end(actor)
        for number in range(len(self.actors)):
            self._build(number)

    def judge(self, heard: Sequence[ShardReply | Silence]) -> list[ShardReply | None]:
        """Return the replies to one question, None for a shard without one, and replace whom that
        tells to replace."""
        replies: list[ShardReply | None] = []
        for number, answer in enumerate(heard):
            if isinstance(answer, ShardReply):
                self._silences[number] = 0
                replies.append(answer)
                continue
            replies.append(None)
            self._silences[number] += 1
            if answer is Silence.DEAD or self._silences[number] > SILENCES:
                self._end(self.actors[number])
                self._build(number)
        return replies

    def _build(self, number: int) -> None:
        self._silences[number] = 0
        self.actors[number] = self._make(number)
