"""The arithmetic of money: exact, monotonic, and never more than what was agreed."""

from fractions import Fraction
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet_contracts.reasons import MEANINGS, Fault, Next, Reason
from sublet_contracts.rules import (
    BPS,
    MS_PER_HOUR,
    PULL_FREE_MS,
    PULL_MOST_PART,
    charge_ucr,
    device_ms_before_start,
    device_ms_within,
    fee_ucr,
    minimum_budget_ucr,
    most_pull_device_ms,
    payable_device_ms,
)

PRICES = st.integers(0, 10**12)
TIMES = st.integers(0, 10**13)
AMOUNTS = st.integers(0, 10**15)


@pytest.mark.parametrize(
    ("price", "device_ms", "charge"),
    [
        (400_000, 3_600_000, 400_000),
        (400_000, 900_000, 100_000),
        (400_000, 8, 0),
        (400_000, 9, 1),
        (1, 3_599_999, 0),
        (1, 3_600_000, 1),
        (0, 10**12, 0),
        (400_000, 0, 0),
    ],
)
def test_charges_of_known_runs(price: int, device_ms: int, charge: int) -> None:
    assert charge_ucr(price, device_ms) == charge


@given(PRICES, st.lists(st.integers(0, 10**9), max_size=40))
def test_a_charge_never_drifts_however_often_it_is_billed(price: int, spans: list[int]) -> None:
    cumulative = billed = 0
    for span in spans:
        cumulative += span
        billed += charge_ucr(price, cumulative) - billed
    assert billed == charge_ucr(price, sum(spans))
    exact = Fraction(price * sum(spans), MS_PER_HOUR)
    assert 0 <= exact - billed < 1


@given(PRICES, st.lists(TIMES, min_size=1, max_size=20), st.randoms())
def test_lost_and_repeated_receipts_heal_themselves(
    price: int, times: list[int], random: Random
) -> None:
    arrived = [*times, *times]
    random.shuffle(arrived)
    billed = 0
    for cumulative in arrived:
        billed = max(billed, charge_ucr(price, cumulative))
    assert billed == charge_ucr(price, max(times))


@given(PRICES, TIMES, TIMES)
def test_more_time_never_costs_less(price: int, one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert charge_ucr(price, low) <= charge_ucr(price, high)


@given(st.integers(1, 10**12), AMOUNTS)
def test_time_within_an_amount_is_the_most_there_is(price: int, amount: int) -> None:
    most = device_ms_within(price, amount)
    assert most is not None
    assert charge_ucr(price, most) <= amount
    assert charge_ucr(price, most + 1) > amount


@given(AMOUNTS)
def test_a_free_device_has_no_bound(amount: int) -> None:
    assert device_ms_within(0, amount) is None


@given(st.integers(0, 10**15), st.integers(0, BPS))
def test_the_fee_is_a_part_of_the_charge(charged: int, bps: int) -> None:
    fee = fee_ucr(charged, bps)
    assert 0 <= fee <= charged
    assert 0 <= Fraction(charged * bps, BPS) - fee < 1


@given(st.integers(0, 10**12), st.integers(1, 64))
def test_the_least_budget_pays_for_a_minute(price: int, devices: int) -> None:
    least = minimum_budget_ucr(price, devices)
    assert charge_ucr(price, 60_000 * devices) <= least
    assert least == 0 or Fraction(price * devices, 60) > least - 1


@given(st.sampled_from(Reason), TIMES, TIMES)
def test_lost_work_is_paid_only_where_the_renter_ended_the_run(
    reason: Reason, used: int, durable: int
) -> None:
    payable = payable_device_ms(reason, used, durable)
    meaning = MEANINGS[reason]
    theirs = meaning.fault is not Fault.RENTER and meaning.next is not Next.FINISH
    assert payable == (min(used, durable) if theirs else used)
    assert payable <= used


def test_every_reason_has_one_meaning() -> None:
    assert set(MEANINGS) == set(Reason)
    assert all(meaning.says and meaning.evidence for meaning in MEANINGS.values())


def test_no_job_ends_for_good_because_of_a_provider() -> None:
    for reason, meaning in MEANINGS.items():
        if meaning.fault in (Fault.PROVIDER, Fault.BROKER):
            assert meaning.next is Next.RETRY, reason
    assert [r for r, m in MEANINGS.items() if m.next is Next.FINISH] == [Reason.SUCCEEDED]


@pytest.mark.parametrize(
    ("prepared_ms", "devices", "device_ms"),
    [
        (0, 1, 0),
        (PULL_FREE_MS, 1, 0),
        (PULL_FREE_MS + 1, 1, 1),
        (15 * 60_000, 1, 5 * 60_000),
        (15 * 60_000, 4, 20 * 60_000),
    ],
)
def test_a_pull_counts_from_its_eleventh_minute_on(
    prepared_ms: int, devices: int, device_ms: int
) -> None:
    assert PULL_FREE_MS == 10 * 60_000
    assert device_ms_before_start(prepared_ms, devices, 400_000, 10**9) == device_ms
    assert device_ms_before_start(prepared_ms, devices, 0, 0) == device_ms


@given(TIMES, st.integers(1, 16), PRICES, AMOUNTS)
def test_a_pull_leaves_three_quarters_of_the_hold_for_work(
    prepared_ms: int, devices: int, price: int, hold: int
) -> None:
    counted = device_ms_before_start(prepared_ms, devices, price, hold)
    assert counted % devices == 0
    most = most_pull_device_ms(price, hold)
    whole = device_ms_within(price, hold)
    if most is None or whole is None:
        assert counted == max(0, prepared_ms - PULL_FREE_MS) * devices
        return
    assert counted <= most
    assert most * PULL_MOST_PART <= whole
    assert charge_ucr(price, counted) * PULL_MOST_PART <= hold
