"""The arithmetic of money that every party computes alike. Integers only.

- charge = floor(price x cumulative device-ms / 3 600 000): always from the cumulative figure, so
  that rounding can't drift and a lost receipt heals itself.
- durable progress: where it was not the renter who ended the run, only device time up to the
  newest durable checkpoint is payable (`pays` in the table of reasons).
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


def charge_ucr(price_ucr_per_device_hour: int, cum_device_ms: int) -> int:
    """Return what `cum_device_ms` of device time costs in all, rounded down."""
    return price_ucr_per_device_hour * cum_device_ms // MS_PER_HOUR


def device_ms_within(price_ucr_per_device_hour: int, amount_ucr: int) -> int | None:
    """Return the most device time whose charge is at most `amount_ucr`; None if it has no bound."""
    if price_ucr_per_device_hour == 0:
        return None
    return ((amount_ucr + 1) * MS_PER_HOUR - 1) // price_ucr_per_device_hour


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
