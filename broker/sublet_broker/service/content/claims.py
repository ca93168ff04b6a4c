"""Claims: which scope has a right to which content, and how much that comes to.

A scope is a renter's own or a job's. Uploading claims content, and so does being told that it is
here already.
"""

from sublet_broker.market.facts import BlobFact, JobFact
from sublet_broker.service.errors import Refusal
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork

COUNTED_BYTES = 65_536


def claim(
    context: Context, work: UnitOfWork, scope: str, sha256: str, size_bytes: int, limit: int
) -> None:
    """Give a scope the right to content whose file is here. Raises Refusal 413 beyond `limit`."""
    settings = context.settings
    stays_ms = settings.upload_grace_ms
    if work.get(JobFact, scope) is None:
        stays_ms = settings.keep_inputs_ms
    if work.get(BlobFact, scope, sha256) is None:
        counted = counted_bytes(size_bytes)
        total = work.tally(stored_in(scope), counted)
        if total > limit:
            raise Refusal(
                413,
                "too_much_stored",
                "Too much stored",
                f"{total - counted} bytes are kept for you here, and at most {limit} are taken "
                f"(a file counts as {COUNTED_BYTES} at the least)",
                fix="send less: fewer or smaller inputs, or a smaller checkpoint; what is not used "
                f"goes by itself after {settings.keep_inputs_ms // 86_400_000} days",
            )
    work.put(BlobFact(scope, sha256, size_bytes, work.now_ms, work.now_ms + stays_ms))


def release_claim(work: UnitOfWork, blob: BlobFact) -> None:
    """Take a scope's right to content away. Its file goes later, if nobody else has one."""
    work.tx.delete(BlobFact, blob.scope, blob.sha256)
    work.tally(stored_in(blob.scope), -counted_bytes(blob.size_bytes))


def stored_in(scope: str) -> str:
    """Return the tally of the bytes that a scope's content counts for."""
    return f"stored:{scope}"


def counted_bytes(size_bytes: int) -> int:
    """Return what content of this size counts for."""
    return max(size_bytes, COUNTED_BYTES)
