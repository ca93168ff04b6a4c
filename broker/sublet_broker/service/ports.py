"""The ports: what the use-cases need of the world, as Protocols. Everything here is synchronous.

Adapters implement them (SQLModel, Ray, files); the simulator implements them in memory.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sublet_broker.market.facts import ContentFact, Fact, JobFact
from sublet_broker.market.matching import BookEntry
from sublet_broker.market.settling import SettlementCase, SettlementDecision

__all__ = [
    "Addresses",
    "AlreadyThere",
    "BlobMissing",
    "BlobStore",
    "BlobsAway",
    "BookEntry",
    "Clock",
    "Entropy",
    "Matcher",
    "MatcherAway",
    "PackVerdict",
    "PackWork",
    "Proposal",
    "RuleBroken",
    "SettlementCase",
    "SettlementDecision",
    "Settler",
    "StorageFailing",
    "StorageFull",
    "Store",
    "StoreAway",
    "Transaction",
    "Verifier",
    "VerifyResult",
    "VerifyTask",
]  # fmt: skip

F = TypeVar("F", bound=Fact)


class Clock(Protocol):
    """The broker's clock: ms since 1970 that never go back, whatever the machine's clock does."""

    def now_ms(self) -> int:
        """Return the time."""
        ...

    def stopwatch_ms(self) -> int:
        """Return ms that go by as time does, while the clock goes faster or slower to be right.

        For lengths, never for dates. It began where the clock did, and never goes back either.
        """
        ...


class Entropy(Protocol):
    """Randomness for nonces."""

    def hex(self, count_bytes: int) -> str:
        """Return `count_bytes` random bytes as hex digits."""
        ...


class Transaction(Protocol):
    """One atomic change. What is put is seen by later gets and finds of the same transaction."""

    def get(self, kind: type[F], *key: str | int) -> F | None:
        """Return the fact with that key (the values of KEY, in order)."""
        ...

    def find(
        self,
        kind: type[F],
        where: Mapping[str, Any] | None = None,
        *,
        after: tuple[str, int] | None = None,
        before: tuple[str, int] | None = None,
        order_by: str | None = None,
        descending: bool = False,
        limit: int | None = None,
    ) -> list[F]:
        """Return facts whose fields equal `where` (a tuple or set value: any of them).

        `after` / `before`: (field, value), strictly beyond. Ordered by `order_by`, ties and the
        default by key, so that the same data gives the same list in every store.
        """
        ...

    def count(self, kind: type[Fact], where: Mapping[str, Any] | None = None) -> int:
        """Return how many facts `find` would return."""
        ...

    def put(self, fact: Fact) -> None:
        """Insert the fact, or replace the one with its key."""
        ...

    def put_all(self, facts: Sequence[Fact]) -> None:
        """Put facts, all of one kind, in one statement."""
        ...

    def add(self, fact: Fact) -> None:
        """Insert the fact. Raises AlreadyThere if its key is taken."""
        ...

    def delete(self, kind: type[Fact], *key: str | int) -> None:
        """Remove the fact with that key, if there is one."""
        ...

    def delete_all(self, facts: Sequence[Fact]) -> None:
        """Remove facts, all of one kind, in one statement."""
        ...

    def next(self, counter: str) -> int:
        """Return the counter's next number (1, 2, ...), kept by this transaction."""
        ...

    def after_commit(self, action: Callable[[], None]) -> None:
        """Run `action` once the transaction is durable; never if it is rolled back. Where the
        commit itself fails it is run as well, for nobody knows: it must look for itself, or do no
        harm for nothing."""
        ...


class AlreadyThere(Exception):
    """A fact with that key exists."""


class RuleBroken(Exception):
    """The database refused a change that breaks one of its own rules; the transaction is lost."""


class Store(Protocol):
    """The database. Transactions are serialisable; an exception rolls back."""

    def transaction(self) -> AbstractContextManager[Transaction]:
        """Begin a transaction; it commits (durably) when the block ends without an exception."""
        ...

    def snapshot(self) -> AbstractContextManager[Transaction]:
        """Begin a read-only transaction on one consistent state; writers aren't held up."""
        ...


class BlobMissing(Exception):
    """No blob of that name."""

    def __init__(self, message: str, digest: str = "") -> None:
        super().__init__(message)
        self.digest = digest
        """Which one, where many were asked for."""


class BlobsAway(OSError):
    """The blob store doesn't answer, or refuses to: nothing is known of what lies there. What was
    asked for may have been done, and is asked for again."""


class BlobStore(Protocol):
    """Content-addressed bytes, each a file of its own; and packs, which hold many pieces each.

    A pack has an id that nobody else has used or will use, and is written once. What lies where in
    it the database knows: here nothing of a pack is checked.

    Where it is reached over a network, each of these may raise BlobsAway.
    """

    def put(self, digest: str, data: bytes) -> None:
        """Keep `data` durably (fsynced, then renamed). Raises ValueError if the hash differs and
        StorageFull when the disk is full; then nothing is kept."""
        ...

    def get(self, digest: str) -> bytes:
        """Return the bytes. Raises BlobMissing (also if what lies there has been damaged)."""
        ...

    def has(self, digest: str) -> bool:
        """Say whether a blob of that name lies there (its content isn't read)."""
        ...

    def delete(self, digest: str) -> None:
        """Remove the blob, if it is there."""
        ...

    def names(self) -> Iterable[str]:
        """Return the digests of all blobs."""
        ...

    def put_pack(self, pack: str, parts: Iterable[bytes]) -> None:
        """Keep a new pack durably, the parts one after another. Raises StorageFull when the disk is
        full; then nothing is kept."""
        ...

    def read_pack(self, pack: str, offset_bytes: int, size_bytes: int) -> bytes:
        """Return these bytes of a pack, for the caller to check: they may be damaged, or fewer.
        Raises BlobMissing: there is no such pack."""
        ...

    def has_pack(self, pack: str) -> bool:
        """Say whether a pack of that id lies there."""
        ...

    def delete_pack(self, pack: str) -> None:
        """Remove the pack, if it is there."""
        ...

    def set_pack_aside(self, pack: str) -> None:
        """Remove a damaged pack, if it is there, and keep it for a person to look at."""
        ...

    def packs(self) -> Iterable[str]:
        """Return the ids of all packs."""
        ...


class Addresses(Protocol):
    """Addresses in a blob store that is a service, by which content moves past the broker. Nobody
    is asked for one: it is signed. Raises BlobsAway where the key to the store can't be read."""

    def upload(
        self, pack: str, size_bytes: int, sha256: str, now_ms: int
    ) -> tuple[str, dict[str, str]]:
        """Return where a new pack's content is to be put, and the headers with which. It takes
        nothing but this content (SHA-256 as hex), and only while nothing lies there."""
        ...

    def read_pack(self, pack: str, offset_bytes: int, size_bytes: int, now_ms: int) -> str:
        """Return where these bytes of a pack are read, and no others: they may be somebody else's.
        Whoever reads asks for exactly them (contracts' `range_of`)."""
        ...

    def read_blob(self, digest: str, size_bytes: int, now_ms: int) -> str:
        """Return where a blob of this size is read, in the same way."""
        ...


class StorageFull(Exception):
    """The disk is full: the request failed, nothing else did."""


class StorageFailing(StorageFull):
    """The disk can't be written, full or not. What was asked for may have been kept, or not."""


class StoreAway(Exception):
    """The database doesn't answer. Where it went while it committed, it may have done so: what was
    asked for is asked for again, and nothing is done twice."""


@dataclass(frozen=True)
class Proposal:
    """A shard's suggestion: this job on that offer. The scheduler commits it or not."""

    job: str
    offer: str
    device_ids: tuple[str, ...]
    pool: str
    shard_epoch: int


class Matcher(Protocol):
    """The match engine (Ray's shards, or in-process). Proposes, never commits; may be away."""

    def offer_changed(self, entry: BookEntry) -> None:
        """An offer is new, or has other free devices (none: it stays in the book, full)."""
        ...

    def offer_gone(self, offer: str, pool: str) -> None:
        """An offer is closed or its agent disconnected."""
        ...

    def job_queued(self, job: JobFact) -> None:
        """A job wants a machine (idempotent)."""
        ...

    def job_gone(self, job: str) -> None:
        """The job no longer wants one."""
        ...

    def propose(self, now_ms: int) -> list[Proposal]:
        """Return the shards' proposals. Raises MatcherAway when the engine doesn't answer."""
        ...

    def rebuild(self) -> None:
        """Drop all state; shards rebuild from the database."""
        ...


class MatcherAway(Exception):
    """The match engine doesn't answer: jobs stay queued, everything else goes on."""


@dataclass(frozen=True)
class VerifyTask:
    """A checkpoint whose chunks are to be checked."""

    checkpoint: str
    job: str
    index_digest: str
    max_bytes: int


@dataclass(frozen=True)
class VerifyResult:
    """What the verifier found. `permanent`: the content is wrong, trying again won't help."""

    checkpoint: str
    ok: bool
    detail: str
    total_bytes: int = 0
    chunk_sizes: Mapping[str, int] | None = None
    permanent: bool = True


class Verifier(Protocol):
    """Checks checkpoints' content (Ray tasks, or in-process)."""

    def submit(self, task: VerifyTask) -> None:
        """Start checking; the same checkpoint twice is checked once."""
        ...

    def collect(self) -> list[VerifyResult]:
        """Return what has been finished since the last call."""
        ...


@dataclass(frozen=True)
class PackVerdict:
    """What was found of a pack that its uploader has put into the store."""

    there: bool
    wrong: str = ""
    """What is wrong with it, in a sentence."""
    chunk: str = ""
    """Which chunk is wrong, if it is one."""


class PackWork(Protocol):
    """Reads packs where they lie (Ray tasks, or in-process). Raises OSError: the store can't be
    read, and nothing is known."""

    def check(self, pack: str, name: str, table: bytes, size_bytes: int) -> PackVerdict:
        """Hash a pack whose content nobody has seen, against its table."""
        ...

    def whole(self, contents: Sequence[ContentFact]) -> list[bool]:
        """Say of each whether it lies where it should, as it should."""
        ...

    def move(self, contents: Sequence[ContentFact], to: str) -> list[bool]:
        """Write those that are whole, in this order, into a new pack; say which those are."""
        ...


class Settler(Protocol):
    """Decides batches of settlements (a Ray task); settling.decide for each case."""

    def decide(self, cases: list[SettlementCase]) -> list[SettlementDecision]:
        """Return the decisions in the cases' order. Raises MatcherAway when it doesn't answer."""
        ...
