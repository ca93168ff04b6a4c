"""The arithmetic of money that every party computes alike. Integers only.

- charge = floor(price x cumulative device-ms / 3 600 000): always from the cumulative figure, so
  that rounding can't drift and a lost receipt heals itself.
- durable progress: where it was not the renter who ended the run, only device time up to the
  newest durable checkpoint is payable (`pays` in the table of reasons).
- device time begins when a run starts, or PULL_FREE_MS after its pull began, whichever is first;
  where no run starts there is none. So a job of many gigabytes on a slow line doesn't occupy
  devices for nothing, and a pull that fails costs nothing.
- the fee comes out of the charge and is rounded down, in the provider's favour.
"""

from sublet_contracts.reasons import MEANINGS, Pays, Reason

MS_PER_HOUR = 3_600_000
UCR_PER_CREDIT = 1_000_000
BPS = 10_000
FREE_KILLS_A_JOB = 2
"""Ends by a signal that nobody owns to which cost nothing: so many of each job,"""
FREE_KILLS_A_RENTER_AND_WEEK = 10
"""and of each renter within WEEK_MS, by the times of the settlements."""
WEEK_MS = 7 * 86_400_000
PULL_FREE_MS = 600_000
"""What comes before a run's start (its image, its files) is free for so long;"""
PULL_MOST_PART = 4
"""and is charged at most this part of what the lease's hold pays for: the rest is for work."""


def charge_ucr(price_ucr_per_device_hour: int, cum_device_ms: int) -> int:
    """Return what `cum_device_ms` of device time costs in all, rounded down."""
    return price_ucr_per_device_hour * cum_device_ms // MS_PER_HOUR


def device_ms_within(price_ucr_per_device_hour: int, amount_ucr: int) -> int | None:
    """Return the most device time whose charge is at most `amount_ucr`; None if it has no bound."""
    if price_ucr_per_device_hour == 0:
        return None
    return ((amount_ucr + 1) * MS_PER_HOUR - 1) // price_ucr_per_device_hour


def most_pull_device_ms(price_ucr_per_device_hour: int, hold_ucr: int) -> int | None:
    """Return the most device time before its run's start that a lease may charge; None if it has
    no bound."""
    most_ms = device_ms_within(price_ucr_per_device_hour, hold_ucr)
    return None if most_ms is None else most_ms // PULL_MOST_PART


def device_ms_before_start(
    prepared_ms: int, devices: int, price_ucr_per_device_hour: int, hold_ucr: int
) -> int:
    """Return the device time that a run begins with, of which it took `prepared_ms` of wall time to
    get ready."""
    beyond_ms = max(0, prepared_ms - PULL_FREE_MS) * devices
    most_ms = most_pull_device_ms(price_ucr_per_device_hour, hold_ucr)
    # In whole ms of wall time, so that the devices go on together.
    return beyond_ms if most_ms is None else min(beyond_ms, most_ms // devices * devices)


def payable_device_ms(reason: Reason, cum_device_ms: int, durable_device_ms: int) -> int:
    """Return the device time that `reason` makes payable: the durable-progress rule."""
    if MEANINGS[reason].pays is Pays.DURABLE:
        return min(durable_device_ms, cum_device_ms)
    return cum_device_ms


def fee_ucr(charged_ucr: int, fee_bps: int) -> int:
    """Return the broker's share of a charge."""
    return charged_ucr * fee_bps // BPS


def minimum_budget_ucr(max_price_ucr_per_device_hour: int, devices: int) -> int:
    """Return the least budget a job may have: one minute of its devices at its highest price."""
    return -(-max_price_ucr_per_device_hour * devices // 60)
