"""Device time and what it costs. Cumulative, never back, never above the hold."""

from sublet_agent.core.records import RunRecord
from sublet_contracts import rules


def metered(record: RunRecord, ran_ms: int) -> int:
    """Return the lease's device time in ms when its run has run for `ran_ms` of wall time."""
    return max(record.cum_device_ms, max(0, ran_ms) * record.devices)


def charge_ucr(record: RunRecord, cum_device_ms: int) -> int:
    """Return what the lease costs so far: by the rule, at most its hold."""
    price = record.lease.price_ucr_per_device_hour
    return min(rules.charge_ucr(price, cum_device_ms), record.lease.hold_ucr)


def must_stop_in_ms(record: RunRecord) -> int | None:
    """Return how long the hold still pays for, where a run has to begin to stop by itself now; None
    where it may go on. However long a job takes to stop, half of its lease is for its work."""
    left_ms = wall_ms_left(record)
    if left_ms is None:
        return None
    half_ms = (left_ms + record.cum_device_ms // record.devices) // 2
    return left_ms if left_ms < min(record.job.stop_grace_ms // 2, half_ms) else None


def wall_ms_left(record: RunRecord) -> int | None:
    """Return how long the hold still pays for; None: without bound."""
    total = rules.device_ms_within(record.lease.price_ucr_per_device_hour, record.lease.hold_ucr)
    if total is None:
        return None
    return max(0, total - record.cum_device_ms) // record.devices
