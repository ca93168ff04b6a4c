"""Claims: which scope has a right to which content, and how much that comes to.

A scope is a renter's own or a job's. Uploading claims content, and so does being told that it is
here already. Content that nobody has a claim to is here no longer: where it lies is forgotten in
the transaction that lets the last claim go, and only what is here can be claimed. So no claim ever
stands without its content.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import islice

from sublet_broker.market.facts import BlobFact, ContentFact, JobFact
from sublet_broker.service.errors import Refusal
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.tallies import (
    COUNTED_BYTES,
    STORED_BYTES,
    counted_bytes,
)
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.amounts import format_bytes
from sublet_contracts.problems import ProblemCode

HASHES_AT_ONCE = 500
"""How many hashes are asked of the database in one question."""


def lies(work: UnitOfWork, hashes: Collection[str]) -> dict[str, ContentFact]:
    """Return where these lie, of those that are here."""
    found: dict[str, ContentFact] = {}
    rest = iter(hashes)
    while some := tuple(islice(rest, HASHES_AT_ONCE)):
        found.update((row.digest, row) for row in work.find(ContentFact, {"digest": some}))
    return found


def claimed(work: UnitOfWork, scope: str, hashes: Collection[str]) -> dict[str, BlobFact]:
    """Return the scope's claims to these."""
    found: dict[str, BlobFact] = {}
    rest = iter(hashes)
    while some := tuple(islice(rest, HASHES_AT_ONCE)):
        rows = work.find(BlobFact, {"scope": scope, "digest": some})
        found.update((row.digest, row) for row in rows)
    return found


def claim_all(
    context: Context, work: UnitOfWork, scope: str, sizes: Mapping[str, int], limit: int
) -> None:
    """Give a scope the right to content that is here (`lies`). Raises Refusal (too_much_stored)
    beyond `limit` bytes; what the scope has already is never refused."""
    settings = context.settings
    stays_ms = settings.upload_grace_ms
    if work.get(JobFact, scope) is None:
        stays_ms = settings.keep_inputs_ms
    look_ms = work.now_ms + stays_ms
    known = claimed(work, scope, sizes)
    new_bytes = sum(counted_bytes(size) for name, size in sizes.items() if name not in known)
    refuse_beyond(context, work, scope, new_bytes, limit)
    claims = [BlobFact(scope, name, size, work.now_ms, look_ms) for name, size in sizes.items()]
    work.put_all(claims, before=tuple(known.values()))


def refuse_beyond(
    context: Context, work: UnitOfWork, scope: str, new_bytes: int, limit: int
) -> None:
    """Raise Refusal (too_much_stored) where a scope would have more than `limit` bytes then."""
    stored = work.tally(STORED_BYTES, scope) if new_bytes else 0
    if new_bytes and stored + new_bytes > limit:
        raise Refusal(
            ProblemCode.TOO_MUCH_STORED,
            f"{format_bytes(stored)} are kept for you here, and at most {format_bytes(limit)} "
            f"are taken (a file counts as {format_bytes(COUNTED_BYTES)} at the least)",
            stored_bytes=stored,
            limit_bytes=limit,
            unused_kept_ms=context.settings.keep_inputs_ms,
        )


def release_all(work: UnitOfWork, claims: Sequence[BlobFact]) -> list[ContentFact]:
    """Take rights to content away. What nobody has a right to any more is forgotten: returns where
    it lay, for Packs.let_go once this is committed."""
    work.delete_all(claims)
    names = dict.fromkeys(claim.digest for claim in claims)
    rest = iter(tuple(names))
    while some := tuple(islice(rest, HASHES_AT_ONCE)):
        for other in work.find(BlobFact, {"digest": some}):
            names.pop(other.digest, None)
    gone = list(lies(work, names).values())
    work.delete_all(gone)
    return gone
