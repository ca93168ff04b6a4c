"""Which inputs a machine keeps, and which go first."""

from __future__ import annotations

import pytest

from sublet_agent.core.kept_inputs import (
    MAX_KEPT,
    UNUSED_MS,
    KeptInput,
    inputs_to_evict,
    is_worth_keeping,
)

KEPT = [KeptInput("b", 30, 2), KeptInput("a", 40, 1), KeptInput("c", 20, 3)]


@pytest.mark.parametrize(
    ("cap", "for_bytes", "short", "gone"),
    [
        (90, 0, 0, ""),
        (89, 0, 0, "a"),
        (90, 1, 0, "a"),
        (90, 40, 0, "a"),
        (90, 41, 0, "ab"),
        (0, 0, 0, "abc"),
        (90, 0, 1, "a"),
        (90, 0, 41, "ab"),
        (90, 0, 1_000, "abc"),
    ],
)
def test_the_least_recently_used_goes_first_and_no_more_than_needed(
    cap: int, for_bytes: int, short: int, gone: str
) -> None:
    found = inputs_to_evict(KEPT, cap, 4, for_bytes=for_bytes, short_bytes=short)
    assert "".join(one.name for one in found) == gone


def test_there_are_never_more_than_can_be_listed() -> None:
    many = [KeptInput(f"{n:04}", 1, n) for n in range(MAX_KEPT)]
    assert inputs_to_evict(many, 10**9, 0) == []
    assert [one.name for one in inputs_to_evict(many, 10**9, 0, for_bytes=1)] == ["0000"]


def test_what_nobody_has_used_for_a_week_goes() -> None:
    assert inputs_to_evict(KEPT, 1_000, UNUSED_MS) == []
    assert [one.name for one in inputs_to_evict(KEPT, 1_000, UNUSED_MS + 2)] == ["a", "b"]


@pytest.mark.parametrize(("size", "worth"), [(0, False), (1, True), (50, True), (51, False)])
def test_one_tree_does_not_push_out_all_others(size: int, worth: bool) -> None:
    assert is_worth_keeping(size, 100) is worth
    assert not is_worth_keeping(size, 0)
