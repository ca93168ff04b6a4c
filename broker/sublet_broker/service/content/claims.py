"""Claims: which scope has a right to which content, and how much that comes to.

A scope is a renter's own or a job's. Uploading claims content, and so does being told that it is
here already.
"""

from sublet_broker.market.facts import BlobFact, JobFact
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


def claim(
    context: Context, work: UnitOfWork, scope: str, sha256: str, size_bytes: int, limit: int
) -> None:
    """Give a scope the right to content whose file is here. Raises Refusal (too_much_stored)
    beyond `limit` bytes."""
    settings = context.settings
    stays_ms = settings.upload_grace_ms
    if work.get(JobFact, scope) is None:
        stays_ms = settings.keep_inputs_ms
    claimed = BlobFact(scope, sha256, size_bytes, work.now_ms, work.now_ms + stays_ms)
    known = work.get(BlobFact, scope, sha256)
    if known is None:
        stored = work.tally(STORED_BYTES, scope)
        if stored + counted_bytes(size_bytes) > limit:
            raise Refusal(
                ProblemCode.TOO_MUCH_STORED,
                f"{format_bytes(stored)} are kept for you here, and at most {format_bytes(limit)} "
                f"are taken (a file counts as {format_bytes(COUNTED_BYTES)} at the least)",
                stored_bytes=stored,
                limit_bytes=limit,
                unused_kept_ms=settings.keep_inputs_ms,
            )
        work.add(claimed)
    else:
        work.put(claimed, before=known)


def release_claim(work: UnitOfWork, blob: BlobFact) -> None:
    """Take a scope's right to content away. Its file goes later, if nobody else has one."""
    work.delete(blob)
