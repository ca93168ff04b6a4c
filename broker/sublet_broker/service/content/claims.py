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

HASHES_AT_ONCE = 500
"""How many hashes are asked of the database in one question."""


def claim(
    context: Context, work: UnitOfWork, scope: str, sha256: str, size_bytes: int, limit: int
) -> None:
    """Give a scope the right to content whose file is here. Raises Refusal 413 beyond `limit`."""
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
                413,
                "too_much_stored",
                "Too much stored",
                f"{stored} bytes are kept for you here, and at most {limit} are taken "
                f"(a file counts as {COUNTED_BYTES} at the least)",
                fix="send less: fewer or smaller inputs, or a smaller checkpoint; what is not used "
                f"goes by itself after {settings.keep_inputs_ms // 86_400_000} days",
            )
        work.add(claimed)
    else:
        work.put(claimed, before=known)


def release_claim(work: UnitOfWork, blob: BlobFact) -> None:
    """Take a scope's right to content away. Its file goes later, if nobody else has one."""
    work.delete(blob)
