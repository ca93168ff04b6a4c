"""What `make test` leaves out for its length is shown there by another test, however small."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import COLLECTED
from tests.house.floors import ROOT

SHOWN_BY = ROOT / "tests" / "house" / "slow.toml"

COLLECT = """
import json, sys
import pytest

class Collected:
    def pytest_collection_finish(self, session):
        for item in session.items:
            slow = item.get_closest_marker("slow") is not None
            found.append((item.nodeid.split("[")[0], slow))

found = []
status = pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "tests"], [Collected()])
print()
print(json.dumps(found))
sys.exit(status)
"""


@pytest.fixture(scope="module")
def marks(request: pytest.FixtureRequest) -> dict[str, set[bool]]:
    """By test: whether some of its cases are slow, and whether some are not."""
    marks: dict[str, set[bool]] = {}
    for name, slow in _collected(request.config):
        marks.setdefault(name, set()).add(slow)
    return marks


def _collected(config: pytest.Config) -> list[tuple[str, bool]]:
    """Return all tests there are: as this run collected them, if it was told of no folder, or as
    another one does."""
    if config.args in ([], ["tests"], [str(ROOT / "tests")]):
        return config.stash[COLLECTED]
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [(name, slow) for name, slow in json.loads(done.stdout.splitlines()[-1])]


def listed() -> dict[str, str]:
    files = tomllib.loads(SHOWN_BY.read_text(encoding="utf-8"))
    return {f"{file}::{name}": by for file, tests in files.items() for name, by in tests.items()}


def test_every_slow_test_has_one_that_is_not_and_shows_the_same(
    marks: dict[str, set[bool]],
) -> None:
    hidden = {name for name, slow in marks.items() if slow == {True}}
    assert hidden - set(listed()) == set(), (
        "say in tests/house/slow.toml what shows it in make test"
    )
    assert set(listed()) - hidden == set(), "these are not slow: take them out of slow.toml"


def test_what_shows_it_runs_in_make_test(marks: dict[str, set[bool]]) -> None:
    shown = {by for by in listed().values() if False in marks.get(by, set())}
    assert set(listed().values()) - shown == set(), "these don't exist, or are slow themselves"
