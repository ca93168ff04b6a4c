"""tests/RELIABILITY.md says what the records say."""

from __future__ import annotations

from tests.reliability.__main__ import PAGE, render


def test_the_page_is_made_from_the_records() -> None:
    assert PAGE.read_text() == render(), "stale: python -m tests.reliability"
