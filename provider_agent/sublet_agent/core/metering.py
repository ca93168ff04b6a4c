"""Device time and what it costs. Cumulative, never back, never above the hold.

It begins when the run starts, or when its pull has had its free minutes (contracts' rules.py),
whichever is first; where no run starts, there is none. How long it took to get ready is counted
from tick to tick: what nobody looked at, as while no agent was there, counts for nothing, and
neither does a clock that jumps.
"""

from sublet_agent.core.records import RunRecord
from sublet_contracts import rules

MOST_BETWEEN_TICKS_MS = 10_000


def prepared_ms(record: RunRecord, last_tick_ms: int | None, now_ms: int) -> int:
    """Return for how long a run has been made ready by this tick."""
    if last_tick_ms is None or not 0 <= now_ms - last_tick_ms <= MOST_BETWEEN_TICKS_MS:
        return record.prepared_ms
    return record.prepared_ms + now_ms - last_tick_ms


def prepared_until_start_ms(
    record: RunRecord, last_tick_ms: int | None, ran_ms: int, now_ms: int
) -> int:
    """Return for how long a run was made ready, now that it is seen to have run for `ran_ms`: what
    of that was counted as making it ready, because nobody had seen it yet, counts once."""
    since_tick_ms = 0 if last_tick_ms is None else max(0, now_ms - last_tick_ms)
    return max(0, record.prepared_ms - max(0, ran_ms - since_tick_ms))


def pull_device_ms(record: RunRecord) -> int:
    """Return the device time that a run begins with, by how long it took to get it ready."""
    price, hold = record.lease.price_ucr_per_device_hour, record.lease.hold_ucr
    return rules.device_ms_before_start(record.prepared_ms, record.devices, price, hold)


def metered(record: RunRecord, ran_ms: int) -> int:
    """Return the lease's device time in ms when its run has run for `ran_ms` of wall time."""
    return max(record.cum_device_ms, record.pull_device_ms + max(0, ran_ms) * record.devices)


def ran_ms(record: RunRecord) -> int:
    """Return for how long its command has run, as it was last seen: the run's own time."""
    return (record.cum_device_ms - record.pull_device_ms) // record.devices


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
