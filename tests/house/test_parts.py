"""A sample of the slow tests: every suite is in it, and all parts together are all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.floors import ROOT
from tests.part import Part


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "1/0", "-1/3", "a/b", "1/3/5", "1/99999"])
def test_a_part_is_one_of_so_many(text: str) -> None:
    with pytest.raises(ValueError, match="K/N"):
        Part.parse(text)


@pytest.mark.parametrize("count", range(12))
@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_all_parts_together_are_everything_and_none_is_empty(count: int, of: int) -> None:
    things = list(range(count))
    parts = [Part.parse(f"{number}/{of}").of_all(things) for number in range(1, of + 1)]
    assert {thing for part in parts for thing in part} == set(things)
    assert all(parts) or not things
    if count >= of:
        assert sorted(thing for part in parts for thing in part) == things


SUITES = {
    "one/test_a.py": """
import pytest
def test_quick(): pass
@pytest.mark.slow
@pytest.mark.parametrize("n", range(5))
def test_slow(n): pass
""",
    "two/test_b.py": """
import pytest
pytestmark = pytest.mark.slow
def test_only(): pass
""",
    "e2e/test_c.py": "def test_long(): pass",
}


def run(folder: Path, *options: str) -> list[str]:
    """The tests that a pytest with our conftest runs there, in their order."""
    tests = folder / "tests"
    for name, text in SUITES.items():
        (tests / name).parent.mkdir(parents=True, exist_ok=True)
        (tests / name).write_text(text)
    (tests / "__init__.py").touch()
    for name in ("conftest.py", "part.py"):
        (tests / name).write_text((ROOT / "tests" / name).read_text())
    (folder / "pytest.ini").write_text("[pytest]\npythonpath = .\nmarkers =\n    slow: as ours\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", *options, "tests"],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line]


def test_of_each_suites_slow_tests_a_part_runs_and_every_quick_one(tmp_path: Path) -> None:
    quick = ["e2e/test_c.py::test_long", "one/test_a.py::test_quick"]
    slow = [f"one/test_a.py::test_slow[{n}]" for n in range(5)]
    only = "two/test_b.py::test_only"
    assert run(tmp_path) == [*quick, *slow, only]
    assert run(tmp_path, "--part", "1/3") == [*quick, slow[0], slow[3], only]
    assert run(tmp_path, "--part", "3/3") == [*quick, slow[2], only]
    assert run(tmp_path, "-m", "slow", "--part", "2/3") == [slow[1], slow[4], only]
    assert run(tmp_path, "-m", "not slow") == quick
