"""What runs in Ray's workers: a match shard's actor, and the tasks. Nothing here knows Ray.

A worker is handed ids, facts and paths, never a stranger's bytes; what strangers sent lies in blob
files, which are hashed and not interpreted.
"""

import json
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from sublet_broker.adapters.files import FileBlobs
from sublet_broker.adapters.sql_store import CLOCK_COUNTER, SqlStore
from sublet_broker.adapters.verifying import check_checkpoint
from sublet_broker.market.facts import CounterFact, JobFact
from sublet_broker.market.matching import Book, BookEntry
from sublet_broker.market.settling import SettlementCase, SettlementDecision, decide
from sublet_broker.service.book import load_book
from sublet_broker.service.ports import VerifyResult, VerifyTask

log = logging.getLogger("sublet.ray.work")


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


def shard_of(pool: str, shards: int) -> int:
    """Return the shard that holds a pool: the same in every process."""
    return int.from_bytes(sha256(pool.encode()).digest()[:8]) % shards


class Shard:
    """A match shard: the books of the pools that fall to it, in memory.

    Making it is its recovery: it reads the database, read-only, and is as if it had always been
    there. It proposes and never commits.
    """

    def __init__(self, database_url: str, number: int, shards: int) -> None:
        self._number = number
        self._shards = shards
        self._incarnation = secrets.token_hex(8)
        self._books: dict[str, Book] = {}
        self._jobs: dict[str, JobFact] = {}
        store = SqlStore(database_url, read_only=True)
        try:
            with store.snapshot() as tx:
                # Whose offers have expired is judged again at each proposal, by the caller's clock.
                mark = tx.get(CounterFact, CLOCK_COUNTER)
                entries, jobs = load_book(tx, mark.value if mark else 0)
        finally:
            store.close()
        for job in jobs:
            self._want(job)
        for entry in entries:
            self._put(entry)
        built = {"shard": number, "pid": os.getpid(), "pools": len(self._books), "jobs": len(jobs)}
        log.info("shard built %s", json.dumps(built))

    def propose(self, changes: Sequence[Change], now_ms: int) -> ShardReply:
        """Take up what has changed, then match."""
        for change in changes:
            self._apply(change)
        matches = tuple(
            ShardMatch(pool, match.job, match.offer, match.device_ids)
            for pool, book in sorted(self._books.items())
            for match in book.propose(now_ms)
        )
        return ShardReply(self._incarnation, tuple(sorted(self._books)), matches)

    def pid(self) -> int:
        """Return the process's id."""
        return os.getpid()

    def _apply(self, change: Change) -> None:
        if change.entry is not None:
            self._put(change.entry)
        elif change.job is not None:
            self._want(change.job)
        elif change.what == "offer_gone":
            book = self._books.get(change.pool)
            if book is not None:
                book.drop(change.id)
                if not len(book):
                    del self._books[change.pool]
        else:
            self._jobs.pop(change.id, None)
            for book in self._books.values():
                book.forget(change.id)

    def _put(self, entry: BookEntry) -> None:
        pool = entry.offer.pool
        if shard_of(pool, self._shards) != self._number:
            return
        book = self._books.get(pool)
        if book is None:
            book = self._books[pool] = Book(pool)
            for job in self._jobs.values():
                book.want(job)
        book.put(entry)

    def _want(self, job: JobFact) -> None:
        self._jobs[job.id] = job
        for book in self._books.values():
            book.want(job)


def verify(task: VerifyTask, blobs_root: str) -> VerifyResult:
    """Check a checkpoint's content in the folder of the blobs."""
    return check_checkpoint(task, FileBlobs(Path(blobs_root)))


def settle_batch(cases: Sequence[SettlementCase]) -> list[SettlementDecision]:
    """Decide a batch of settlements; the broker checks and commits them."""
    return [decide(case) for case in cases]
