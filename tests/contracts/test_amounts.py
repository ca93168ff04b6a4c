"""How amounts, sizes and spans are written: once, for broker, agent and SDK."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.units import credits_to_ucr, size_bytes
from sublet_contracts.amounts import (
    format_ago,
    format_bytes,
    format_cores,
    format_credits,
    format_device_memory,
    format_duration,
)
from sublet_contracts.encoding import MAX_INTEGER


@pytest.mark.parametrize(
    ("ucr", "text"),
    [
        (0, "0.00"),
        (1, "0.000001"),
        (379, "0.000379"),
        (400_000, "0.40"),
        (1_500_000, "1.50"),
        (-1_000_000, "-1.00"),
        (12_345_678, "12.345678"),
        (1_234_567_000_000, "1234567.00"),
    ],
)
def test_credits_are_exact(ucr: int, text: str) -> None:
    assert format_credits(ucr) == text


@given(ucr=st.integers(0, MAX_INTEGER))
def test_an_amount_can_be_written_back_as_it_was_read(ucr: int) -> None:
    assert credits_to_ucr(format_credits(ucr), "budget") == ucr


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_500, "1.5 kB"),
        (999_600, "999.6 kB"),
        (24 * 10**9, "24 GB"),
        (24 * 2**30, "25.76 GB"),
        (1_005_000_000, "1.005 GB"),
        (999_999_999, "999.9 MB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(count=st.integers(0, 10**15))
def test_a_size_is_never_said_to_be_more_than_it_is(count: int) -> None:
    said = size_bytes(format_bytes(count), "memory")
    assert count - count // 1000 <= said <= count


def test_other_figures() -> None:
    assert format_device_memory(24 * 2**30) == "24 GiB"
    assert format_device_memory(10**9) == "1 GB"
    assert [format_cores(millis) for millis in (1000, 500, 4000)] == [
        *("1 core", "0.5 cores", "4 cores")
    ]


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (5, "5 ms"),
        (999, "999 ms"),
        (3_000, "3.0 s"),
        (3_499, "3.4 s"),
        (59_999, "59 s"),
        (60_000, "1 m"),
        (200_000, "3 m 20 s"),
        (7_500_000, "2 h 5 m"),
        (90_000_000, "1 d 1 h"),
        (97_200_000, "1 d 3 h"),
    ],
)
def test_durations(ms: int, text: str) -> None:
    assert format_duration(ms) == text


def test_how_long_ago() -> None:
    assert [format_ago(0, seconds * 1000) for seconds in (-9, 0, 40, 200, 7_200, 200_000)] == [
        *("now", "now", "40 s ago", "3 m ago", "2 h ago", "2 d ago")
    ]
