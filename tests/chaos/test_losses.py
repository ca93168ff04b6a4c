"""Which losses an outage explains."""

from __future__ import annotations

from tests.chaos.losses import (
    BACK_MS,
    PICTURE_MS,
    Dark,
    Loss,
    dark_for_all,
    dark_for_one,
    explained,
    lit_ms,
)

INTERVAL_MS = 500
LOSS = Loss("job", "box0", 1, 90, 10_000, 19_000)


def test_a_loss_that_nothing_explains() -> None:
    assert lit_ms(LOSS, []) == 9_000
    assert not explained(LOSS, [], INTERVAL_MS)
    assert not explained(LOSS, [Dark("agent", "box1", 10_000, 19_000)], INTERVAL_MS)


def test_a_short_loss_needs_no_reason() -> None:
    short = Loss("job", "box0", 1, 6, 10_000, 10_000 + INTERVAL_MS + PICTURE_MS)
    assert explained(short, [], INTERVAL_MS)


def test_dark_times_overlap_and_reach_over_the_ends() -> None:
    darks = [
        Dark("agent", "box0", 8_000, 12_000),
        Dark("broker", "", 11_000, 15_000),
        Dark("raylet", "", 18_000, 30_000),
        Dark("agent", "box1", 0, 99_000),
    ]
    assert lit_ms(LOSS, darks) == 3_000
    assert explained(LOSS, darks, INTERVAL_MS)


def test_what_all_need_is_back_once_both_looks_came_after_the_kill() -> None:
    moves = [(900, 1_100), (1_100, 1_300), (4_000, 4_500)]
    assert dark_for_all([("worker", 1_000), ("broker", 1_200)], moves) == [
        Dark("worker", "", 1_000, 1_300),
        Dark("broker", "", 1_200, 4_500),
    ]


def test_an_agent_needs_a_moment_to_be_back() -> None:
    assert dark_for_one("box0", [(5, 9)]) == [Dark("agent", "box0", 5, 9 + BACK_MS)]
