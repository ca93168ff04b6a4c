"""Blobs: content goes in and out, only for whom it concerns.

Content is named by its digest but belongs to scopes: a renter's own, or a job's. A renter has his
own scope and his jobs'. A provider has a job's scope while he holds its epoch; to read, also while
he prepares to take it over. Whoever has no right to a blob learns nothing about it.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from sublet_broker.market.facts import (
    ContentFact,
    JobFact,
    LeaseFact,
    PartyFact,
    RunFact,
)
from sublet_broker.service.content.claims import HASHES_AT_ONCE, claim_all, claimed, lies
from sublet_broker.service.content.packs import Packs
from sublet_broker.service.errors import Refusal, not_found
from sublet_broker.service.leases.candidates import LIVE_LEASE
from sublet_broker.service.ports import BlobMissing, StorageFull
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.job_lookup import own_job
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.amounts import format_bytes, format_duration
from sublet_contracts.api import MissingView
from sublet_contracts.digests import shortened
from sublet_contracts.packs import Pack
from sublet_contracts.problems import ProblemCode


class Blobs:
    """Content, scope by scope."""

    def __init__(self, context: Context, packs: Packs) -> None:
        self._context = context
        self._packs = packs

    def put(self, caller: str, scope: str, epoch: int | None, digest: str, data: bytes) -> None:
        """Keep content in a scope: the caller's party id, or a job (id, prefix, name)."""
        limit_bytes = self._context.settings.max_blob_bytes
        if len(data) > limit_bytes:
            raise Refusal(
                ProblemCode.TOO_LARGE,
                f"it has {format_bytes(len(data))}; at most {format_bytes(limit_bytes)} are taken",
                limit_bytes=limit_bytes,
            )
        with self._context.read() as snapshot:
            self.may_write(snapshot, caller, scope, epoch)
        with self._context.pins.hold((digest,)):
            self._put_file(digest, data)
            with self._context.work() as work:
                key = self.may_write(work, caller, scope, epoch)
                before = work.get(ContentFact, digest)
                work.put(ContentFact(digest, len(data)))
                claim_all(self._context, work, key, {digest: len(data)}, self.room(caller, key))
        if before is not None and before.pack:
            self._packs.let_go((before,))

    def may_put(self, caller: str, scope: str, epoch: int | None) -> None:
        """Raise Refusal where the caller may not write into the scope: asked before megabytes are
        received, and again when they have come."""
        with self._context.read() as snapshot:
            self.may_write(snapshot, caller, scope, epoch)

    def put_pack(self, caller: str, scope: str, epoch: int | None, pack: Pack) -> None:
        """Keep a pack's chunks in a scope: one file and one transaction. They are written whether
        they are here or not, so that nobody learns what others have sent."""
        self.may_put(caller, scope, epoch)
        sizes = dict(pack.table.chunks)
        id = self._packs.new_id()
        offsets = pack.table.offsets()
        contents = [ContentFact(name, size, id, offsets[name]) for name, size in sizes.items()]
        with self._context.pins.hold((id,)):
            with _refused_if_full():
                self._context.ports.blobs.put_pack(id, pack.parts)
            try:
                with self._context.work() as work:
                    key = self.may_write(work, caller, scope, epoch)
                    before = lies(work, sizes)
                    self._packs.note(work, id, pack.table.chunk_bytes, contents)
                    claim_all(self._context, work, key, sizes, self.room(caller, key))
            except Refusal:
                self._context.ports.blobs.delete_pack(id)
                raise
        self._packs.let_go(before.values())

    def room(self, caller: str, key: str) -> int:
        """Return how many bytes a scope may have."""
        settings = self._context.settings
        return settings.max_renter_bytes if key == caller else settings.max_job_bytes

    def _put_file(self, digest: str, data: bytes) -> None:
        try:
            with _refused_if_full():
                self._context.ports.blobs.put(digest, data)
        except ValueError as error:
            raise Refusal(
                ProblemCode.HASH_MISMATCH, str(error), field="digest", digest=digest
            ) from error

    def get(self, caller: str, scope: str, epoch: int | None, digest: str) -> bytes:
        """Return content of a scope that the caller may read."""
        (data,) = self.get_many(caller, scope, epoch, (digest,))
        return data

    def get_many(
        self, caller: str, scope: str, epoch: int | None, hashes: Sequence[str]
    ) -> list[bytes]:
        """Return contents of a scope that the caller may read, in this order."""
        places = self.places(caller, scope, epoch, hashes)
        limit_bytes = self._context.settings.max_blob_bytes
        size_bytes = sum(content.size_bytes for content in places)
        if len(hashes) > 1 and size_bytes > limit_bytes:
            raise Refusal(
                ProblemCode.TOO_LARGE,
                f"they have {format_bytes(size_bytes)}; at most {format_bytes(limit_bytes)} are "
                "read at once",
                limit_bytes=limit_bytes,
            )
        try:
            return self._packs.read_many(places)
        except BlobMissing as error:
            raise _damaged(error.digest or hashes[0]) from error

    def places(
        self, caller: str, scope: str, epoch: int | None, hashes: Sequence[str]
    ) -> list[ContentFact]:
        """Return where contents of a scope lie that the caller may read, in this order."""
        with self._context.read() as snapshot:
            key = self._may_read(snapshot, caller, scope, epoch)
            known = claimed(snapshot, key, hashes)
            unknown = next((digest for digest in hashes if digest not in known), None)
            job = snapshot.get(JobFact, key) if unknown else None
            places = lies(snapshot, known)
        if unknown and job is not None and job.ended_ms is not None:
            kept_ms = self._context.settings.keep_ended_ms
            raise Refusal(
                ProblemCode.NO_LONGER_KEPT,
                "a job's outputs and checkpoints are kept for "
                f"{format_duration(kept_ms)} after its end",
                kept_ms=kept_ms,
            )
        if unknown:
            raise not_found("blob", unknown)
        damaged = next((digest for digest in hashes if digest not in places), "")
        if damaged:
            raise _damaged(damaged)
        return [places[digest] for digest in hashes]

    def missing(
        self, caller: str, scope: str, epoch: int | None, hashes: Iterable[str]
    ) -> MissingView:
        """Return which of `hashes` must be uploaded into the scope."""
        asked = list(dict.fromkeys(hashes))
        have: set[str] = set()
        # Once where nothing is asked, too: whose scope it is is checked whatever comes.
        for start in range(0, max(1, len(asked)), HASHES_AT_ONCE):
            some = tuple(asked[start : start + HASHES_AT_ONCE])
            with self._context.read() as snapshot:
                key = self.may_write(snapshot, caller, scope, epoch)
                found = lies(snapshot, claimed(snapshot, key, some))
            with self._context.pins.hold(found):
                here = self._packs.present(found.values())
                have |= self._claim_again(caller, scope, epoch, here)
        return MissingView(
            missing=tuple(digest for digest in asked if digest not in have),
            by_address=self._context.ports.addresses is not None,
        )

    def _claim_again(
        self, caller: str, scope: str, epoch: int | None, here: Collection[str]
    ) -> set[str]:
        """Whoever is told that something is here counts on it. Returns what still is."""
        if not here:
            return set()
        with self._context.work() as work:
            key = self.may_write(work, caller, scope, epoch)
            sizes = {row.digest: row.size_bytes for row in lies(work, here).values()}
            sizes = {name: sizes[name] for name in claimed(work, key, sizes)}
            claim_all(self._context, work, key, sizes, limit=0)
        return set(sizes)

    def may_write(self, work: UnitOfWork, caller: str, scope: str, epoch: int | None) -> str:
        """Return the scope's key. Raises Refusal."""
        if scope == caller:
            if work.get(PartyFact, caller) is None:
                raise Refusal(ProblemCode.UNKNOWN_PARTY, "this key has not been introduced")
            return caller
        if epoch is None:
            return own_job(work, caller, scope).id
        return self._held_by(work, caller, scope, epoch)

    def _may_read(self, work: UnitOfWork, caller: str, scope: str, epoch: int | None) -> str:
        if work.find(RunFact, {"job": scope, "successor": caller}, limit=1):
            return scope
        return self.may_write(work, caller, scope, epoch)

    def _held_by(self, work: UnitOfWork, caller: str, scope: str, epoch: int) -> str:
        job = work.get(JobFact, scope)
        mine = work.find(LeaseFact, {"job": scope, "provider": caller, "epoch": epoch})
        if job is None or not mine:
            raise not_found("job", scope)
        if mine[0].state not in LIVE_LEASE or epoch != job.epoch:
            raise Refusal(
                ProblemCode.STALE_EPOCH,
                f"epoch {epoch} no longer holds the job; it is at {job.epoch}",
                field="Sublet-Epoch",
                epoch=epoch,
                current_epoch=job.epoch,
            )
        return job.id


def _damaged(digest: str) -> Refusal:
    says = f"{shortened(digest)} is no longer readable here"
    return Refusal(ProblemCode.DAMAGED, says, digest=digest)


@contextmanager
def _refused_if_full() -> Iterator[None]:
    try:
        yield
    except StorageFull as error:
        raise Refusal(
            ProblemCode.STORAGE_FULL,
            "nothing was stored, and nothing that was stored before is lost",
        ) from error
