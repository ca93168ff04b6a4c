"""What all suites share: a part of the slow tests of each, and which suites begin."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from hypothesis import settings

from tests.part import Part

# How long an example takes says nothing on a machine that others use too.
settings.register_profile("sublet", deadline=None)
settings.load_profile("sublet")

TESTS = Path(__file__).parent

LONG_SUITES = ("e2e", "chaos", "ray", "agent", "sdk", "http")
"""They begin, the longest first: the last file that two processes share ought to be a short one."""

COLLECTED: pytest.StashKey[list[tuple[str, bool]]] = pytest.StashKey()
"""each test that was collected, chosen or not, and whether it is slow"""


def _part(text: str) -> Part:
    try:
        return Part.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --part."""
    parser.addoption(
        "--part",
        type=_part,
        metavar="K/N",
        help="of each suite's slow tests only the K-th of N parts, at least one test",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say which part it is: the same one can be run again."""
    part: Part | None = config.getoption("part")
    if part is None:
        return None
    return f"of each suite's slow tests: --part {part.number}/{part.of}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the slow tests that are in other parts, and put long suites first.

    First of all plugins: what is noted here is everything, also what `-m` leaves out.
    """
    config.stash[COLLECTED] = [
        (item.nodeid.split("[")[0], item.get_closest_marker("slow") is not None) for item in items
    ]
    part: Part | None = config.getoption("part")
    if part is not None:
        slow: dict[str, list[pytest.Item]] = {}
        for item in items:
            if item.get_closest_marker("slow") is not None:
                slow.setdefault(suite_of(item), []).append(item)
        kept = {item for tests in slow.values() for item in part.of_all(tests)}
        left_out = [item for tests in slow.values() for item in tests if item not in kept]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    items.sort(key=_turn)


def suite_of(item: pytest.Item) -> str:
    """Return the folder below tests/ that a test is in."""
    parts = item.path.relative_to(TESTS).parts if item.path.is_relative_to(TESTS) else ()
    return parts[0] if parts else ""


def _turn(item: pytest.Item) -> int:
    suite = suite_of(item)
    return LONG_SUITES.index(suite) if suite in LONG_SUITES else len(LONG_SUITES)
