"""The match engine and the verifier without Ray: the same decisions, in this process.

For tests, the simulator, and a look at the market without a cluster. The pure Book does the
matching, one per pool, as in Ray's shards.
"""

import threading

from sublet_broker.market.facts import JobFact
from sublet_broker.market.matching import BookEntry
from sublet_broker.market.order_book import OrderBook
from sublet_broker.service.leases.candidates import load_order_book
from sublet_broker.service.ports import (
    Clock,
    Proposal,
    Store,
)


class InProcessMatcher:
    """Books in memory, one per pool (ports.Matcher)."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._books: dict[str, OrderBook] = {}
        self._jobs: dict[str, JobFact] = {}

    def offer_changed(self, entry: BookEntry) -> None:
        """Take up an offer or what is free of it."""
        with self._lock:
            self._put(entry)

    def _put(self, entry: BookEntry) -> None:
        pool = entry.offer.pool
        book = self._books.get(pool)
        if book is None:
            book = self._books[pool] = OrderBook(pool)
            for job in self._jobs.values():
                book.add_job(job)
        book.put_offer(entry)

    def offer_gone(self, offer: str, pool: str) -> None:
        """Forget an offer."""
        with self._lock:
            if pool in self._books:
                self._books[pool].remove_offer(offer)
                if not len(self._books[pool]):
                    del self._books[pool]

    def job_queued(self, job: JobFact) -> None:
        """Put a job in every line that could serve it."""
        with self._lock:
            self._jobs[job.id] = job
            for book in self._books.values():
                book.add_job(job)

    def job_gone(self, job: str) -> None:
        """Take a job out of all lines."""
        with self._lock:
            self._jobs.pop(job, None)
            for book in self._books.values():
                book.remove_job(job)

    def propose(self, now_ms: int) -> list[Proposal]:
        """Return what the books propose."""
        with self._lock:
            return [
                Proposal(match.job, match.offer, match.device_ids, pool, 0)
                for pool in sorted(self._books)
                for match in self._books[pool].propose(now_ms)
            ]

    def rebuild(self) -> None:
        """Drop everything and read it again from the database."""
        with self._store.snapshot() as tx:
            entries, jobs = load_order_book(tx, self._clock.now_ms())
        with self._lock:
            self._books.clear()
            self._jobs = {job.id: job for job in jobs}
            for entry in entries:
                self._put(entry)
