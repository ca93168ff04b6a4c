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


def worth_device_ms(record: RunRecord, age_ms: int) -> int:
    """Return up to which device time a checkpoint that was complete `age_ms` ago holds what the run
    has done: that is what it is paid for. Never less than one before it."""
    before = max(record.local_checkpoints.values(), default=record.durable_device_ms)
    held = record.cum_device_ms - max(0, age_ms) * record.devices
    return min(record.cum_device_ms, max(held, before, 0))


def to_delete(record: RunRecord) -> tuple[int, ...]:
    """Return the local steps that nobody needs: all but the last few, the newest durable one and
    those on their way to the broker. Of folders that the job named, which are copies of ours that
    take its disk, all but the newest.

    So they don't pile up against the job's disk limit while the broker takes none.
    """
    if record.job.checkpoints:
        kept = {*sorted(record.local_checkpoints)[-1:]}
    else:
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
