"""Which checkpoints to upload, and which to keep on this machine."""

from sublet_agent.core.records import RunRecord

KEEP_LOCAL = 3


def next_upload(record: RunRecord) -> int | None:
    """Return the step to upload next: the newest one found, past what was uploaded already.

    One at a time; those in between are skipped, because only the newest is worth resuming from.
    """
    if record.uploading is not None:
        return None
    newest = max(record.local_checkpoints, default=-1)
    return newest if newest > record.uploaded_step else None


def to_delete(record: RunRecord) -> tuple[int, ...]:
    """Return the local steps that nobody needs: all but the last few, the newest durable one and
    those on their way to the broker.

    So they don't pile up against the job's disk limit while the broker takes none.
    """
    kept = {*sorted(record.local_checkpoints)[-KEEP_LOCAL:], record.durable_step}
    if record.uploading:
        kept.add(record.uploading.step)
    kept |= {awaiting.step for awaiting in record.awaiting_verdict.values()}
    return tuple(step for step in sorted(record.local_checkpoints) if step not in kept)


def save_is_due(record: RunRecord, now_ms: int) -> bool:
    """Say whether the job should be asked for a checkpoint: none came for one interval."""
    if record.started_ms is None:
        return False
    last = max(record.started_ms, record.interval_began_ms)
    return now_ms - last >= record.job.checkpoint_interval_ms
