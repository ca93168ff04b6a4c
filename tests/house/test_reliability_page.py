"""tests/RELIABILITY.md says what the records say."""

from __future__ import annotations

from tests.reliability.__main__ import PAGE, render
from tests.reliability.page import Alarm, clean_runs


def test_the_page_is_made_from_the_records() -> None:
    assert PAGE.read_text() == render(), "stale: python -m tests.reliability"


def test_a_violation_ends_the_row_of_clean_markets_and_a_false_alarm_does_not() -> None:
    alarm = Alarm(7, "a run was given up", "why not")
    clean, mistaken, broken = (
        {"violations": said}
        for said in ([], ["seed 7: a run was given up after 1 ms"], ["seed 7: two holders"])
    )
    assert clean_runs([clean, mistaken, clean], [alarm]) == [clean, mistaken, clean]
    assert clean_runs([clean, broken, clean], [alarm]) == [clean]
    assert clean_runs([clean, mistaken], []) == []
