"""Checking a checkpoint's content by its index. What it names was hashed when it came, so that only
the index is read: whether the chunks are here, with these sizes, the database says.

Nothing here interprets what a stranger sent: the index is parsed by the strict reader of the
contracts, and that is all.
"""

from sublet_broker.service.ports import BlobMissing, BlobStore, VerifyResult, VerifyTask
from sublet_contracts.tree import MAX_INDEX_BYTES, TreeIndex, TreeRefused, parse_index


def check_checkpoint(task: VerifyTask, blobs: BlobStore) -> VerifyResult:
    """Read the index. What is missing or damaged is final; an OSError is the caller's to retry."""
    try:
        index = _open_index(task, blobs)
    except (BlobMissing, TreeRefused) as error:
        return VerifyResult(checkpoint=task.checkpoint, ok=False, detail=str(error))
    return VerifyResult(
        checkpoint=task.checkpoint,
        ok=True,
        detail="",
        total_bytes=index.total_bytes,
        chunk_sizes=index.chunks(),
    )


def _open_index(task: VerifyTask, blobs: BlobStore) -> TreeIndex:
    try:
        raw = blobs.get(task.index_digest)
    except BlobMissing as error:
        raise TreeRefused(f"its index: {error}; upload it again") from error
    if len(raw) > MAX_INDEX_BYTES:
        raise TreeRefused(f"its index has {len(raw)} bytes; at most {MAX_INDEX_BYTES} are taken")
    index = parse_index(raw)
    if index.links:
        raise TreeRefused(f"{index.links[0].path} is a link; a job's links are not carried")
    if index.total_bytes > task.max_bytes:
        raise TreeRefused(
            f"it holds {index.total_bytes} bytes; at most {task.max_bytes} are accepted: "
            "write smaller checkpoints, or ask for more disk"
        )
    return index
