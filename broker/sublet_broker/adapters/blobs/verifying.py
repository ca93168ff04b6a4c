"""Checking a checkpoint's content: every chunk's hash and size, and every file's, by its index.

Nothing here interprets what a stranger sent: bytes are hashed, the index is parsed by the strict
reader of the contracts, and that is all. The task's max_bytes bounds the work, whatever the index
says.
"""

import hashlib

from sublet_broker.service.ports import BlobMissing, BlobStore, VerifyResult, VerifyTask
from sublet_contracts.tree import MAX_INDEX_BYTES, TreeFile, TreeIndex, TreeRefused, parse_index


def check_checkpoint(task: VerifyTask, blobs: BlobStore) -> VerifyResult:
    """Check all of it. What is missing or damaged is final; an OSError is the caller's to retry."""
    try:
        index = _open_index(task, blobs)
        for file in index.files:
            _check_file(file, blobs)
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
        raw = blobs.get(task.index_sha256)
    except BlobMissing as error:
        raise TreeRefused(f"its index: {error}; upload it again") from error
    if len(raw) > MAX_INDEX_BYTES:
        raise TreeRefused(f"its index has {len(raw)} bytes; at most {MAX_INDEX_BYTES} are taken")
    index = parse_index(raw)
    if index.total_bytes > task.max_bytes:
        raise TreeRefused(
            f"it holds {index.total_bytes} bytes; at most {task.max_bytes} are accepted: "
            "write smaller checkpoints, or ask for more disk"
        )
    return index


def _check_file(file: TreeFile, blobs: BlobStore) -> None:
    whole = hashlib.sha256()
    for chunk in file.chunks:
        try:
            data = blobs.get(chunk.sha256)  # which hashes what it reads
        except BlobMissing as error:
            raise TreeRefused(f"{file.path}: {error}") from error
        if len(data) != chunk.size_bytes:
            raise TreeRefused(
                f"{file.path}: a chunk has {len(data)} bytes; its index says {chunk.size_bytes}"
            )
        whole.update(data)
    if whole.hexdigest() != file.sha256:
        raise TreeRefused(f"{file.path}: its chunks don't give the file's SHA-256")
