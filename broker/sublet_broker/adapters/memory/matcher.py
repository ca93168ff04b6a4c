"""The match engine and the verifier without Ray: the same decisions, in this process.

For tests, the simulator, and a look at the market without a cluster. The pure Book does the
matching, one per pool, as in Ray's shards.
"""

import hashlib
import threading

from sublet_broker.adapters.blobs.verifying import check_checkpoint
from sublet_broker.market.facts import JobFact
from sublet_broker.market.matching import Book, BookEntry
from sublet_broker.service.leases.candidates import load_book
from sublet_broker.service.ports import (
    BlobMissing,
    BlobStore,
    Clock,
    Proposal,
    Store,
    VerifyResult,
    VerifyTask,
)


class InProcessMatcher:
    """Books in memory, one per pool (ports.Matcher)."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._books: dict[str, Book] = {}
        self._jobs: dict[str, JobFact] = {}

    def offer_changed(self, entry: BookEntry) -> None:
        """Take up an offer or what is free of it."""
        with self._lock:
            self._put(entry)

    def _put(self, entry: BookEntry) -> None:
        pool = entry.offer.pool
        book = self._books.get(pool)
        if book is None:
            book = self._books[pool] = Book(pool)
            for job in self._jobs.values():
                book.want(job)
        book.put(entry)

    def offer_gone(self, offer: str, pool: str) -> None:
        """Forget an offer."""
        with self._lock:
            if pool in self._books:
                self._books[pool].drop(offer)
                if not len(self._books[pool]):
                    del self._books[pool]

    def job_queued(self, job: JobFact) -> None:
        """Put a job in every line that could serve it."""
        with self._lock:
            self._jobs[job.id] = job
            for book in self._books.values():
                book.want(job)

    def job_gone(self, job: str) -> None:
        """Take a job out of all lines."""
        with self._lock:
            self._jobs.pop(job, None)
            for book in self._books.values():
                book.forget(job)

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
            entries, jobs = load_book(tx, self._clock.now_ms())
        with self._lock:
            self._books.clear()
            self._jobs = {job.id: job for job in jobs}
            for entry in entries:
                self._put(entry)


class InProcessVerifier:
    """Checks content when it is asked for results (ports.Verifier)."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._tasks: dict[str, VerifyTask] = {}

    def submit(self, task: VerifyTask) -> None:
        """Keep the task until results are collected."""
        self._tasks[task.checkpoint] = task

    def collect(self) -> list[VerifyResult]:
        """Check what was submitted."""
        results: list[VerifyResult] = []
        while self._tasks:
            _, task = next(iter(self._tasks.items()))
            del self._tasks[task.checkpoint]
            try:
                results.append(check_checkpoint(task, self._blobs))
            except OSError as error:
                detail = f"it could not be read: {error}"
                results.append(VerifyResult(task.checkpoint, False, detail, permanent=False))
        return results


class MemoryBlobs:
    """Content in memory (ports.BlobStore)."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

    def put(self, sha256: str, data: bytes) -> None:
        """Keep data. Raises ValueError if it hasn't that hash."""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"the content is not that of {sha256[:10]}")
        self._blobs[sha256] = data

    def get(self, sha256: str) -> bytes:
        """Return the content. Raises BlobMissing, also for damaged content: that is dropped, as
        FileBlobs does it, so that it counts as missing and is sent again."""
        data = self._blobs.get(sha256)
        if data is None:
            raise BlobMissing(f"no content {sha256[:10]} here")
        if hashlib.sha256(data).hexdigest() != sha256:
            self.delete(sha256)
            raise BlobMissing(f"content {sha256[:10]} was damaged")
        return data

    def has(self, sha256: str) -> bool:
        """Say whether content of that name is there."""
        return sha256 in self._blobs

    def delete(self, sha256: str) -> None:
        """Forget the content."""
        self._blobs.pop(sha256, None)

    def names(self) -> list[str]:
        """Return the hashes of all content."""
        return sorted(self._blobs)

    def damage(self, sha256: str) -> None:
        """Flip a bit, as a bad disk would: for tests and the simulator."""
        data = self._blobs[sha256]
        self._blobs[sha256] = bytes([data[0] ^ 1]) + data[1:] if data else b"\0"
