"""Which checkpoints to upload, which to keep on this machine, and for how long saving has held the
loop.

What a job saves by the protocol nobody fsyncs: it counts once it is off this machine. So it is
never used once the machine was started anew; a power cut may have torn it, sizes and all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sublet_agent.core import cadence, metering
from sublet_agent.core.records import RunRecord

KEEP_LOCAL = 3
MAX_COUNT = 2**53 - 1


@dataclass(frozen=True)
class Stall:
    """For how long saving has held the job's loop, by its own word in DONE."""

    saves: int
    """of its process so far"""
    all_stall_ms: int
    """of all of them"""
    stall_ms: int
    """of the newest"""
    write_ms: int
    """how long that was written, beside the loop or not"""


def read_stall(done: Mapping[str, object]) -> Stall | None:
    """Read it as a stranger's: what doesn't fit is not there."""
    names = ("saves", "all_stall_ms", "stall_ms", "write_ms")
    saves, all_stall_ms, stall_ms, write_ms = (_count(done.get(name)) for name in names)
    if saves is None or all_stall_ms is None or stall_ms is None or write_ms is None or not saves:
        return None
    return Stall(saves, all_stall_ms, stall_ms, write_ms)


def within(stall: Stall, ran_ms: int) -> Stall:
    """Return it as it can be: a run was not held for longer than it has run."""
    ran_ms = max(0, ran_ms)
    all_stall_ms = min(stall.all_stall_ms, ran_ms)
    return replace(
        stall,
        all_stall_ms=all_stall_ms,
        stall_ms=min(stall.stall_ms, all_stall_ms),
        write_ms=min(stall.write_ms, ran_ms),
    )


def _count(value: object) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT
    return value if whole and isinstance(value, int) else None


def next_upload(record: RunRecord) -> int | None:
    """Return the step to upload next: the newest one found, past what was uploaded already.

    One at a time; those in between are skipped, because only the newest is worth resuming from.
    """
    if record.uploading is not None:
        return None
    newest = max(record.local_checkpoints, default=-1)
    return newest if newest > record.uploaded_step else None


def torn_by_restart(record: RunRecord) -> tuple[int, ...]:
    """Return the local steps that can't be used since the machine was started anew."""
    return tuple(step for step in record.unsynced_steps if step in record.local_checkpoints)


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


def save_is_due(record: RunRecord) -> bool:
    """Say whether the job should be asked for a checkpoint: none came for one interval."""
    if record.started_ms is None:
        return False
    return metering.ran_ms(record) - record.interval_began_ms >= cadence.interval(record).ms
