"""The gate knows our code by its files' names; here it says so when one has moved."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from sublet_agent.core import events
from tests.chaos.gate import sitecustomize as gate

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("broker", "provider_agent", "sdk", "contracts")


def test_every_file_that_it_looks_through_is_one_of_ours() -> None:
    ours = [str(path) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    found = {end: sum(path.endswith("/" + end) for path in ours) for end in gate.PLUMBING}
    assert found == dict.fromkeys(gate.PLUMBING, 1)


def test_processes_are_told_apart_by_modules_that_are_there() -> None:
    assert importlib.util.find_spec("sublet_agent.adapters.process.supervisor")
    assert importlib.util.find_spec("sublet_broker.adapters.ray.host")
    assert importlib.util.find_spec("sublet.cli.main")
    for arguments, kind in (
        (["-m", "sublet.cli.main", "broker"], "broker"),
        (["-m", "sublet.cli.main", "provide"], "agent"),
        (["-m", "sublet.cli.main", "offers"], ""),
        (["-m", "sublet_agent.adapters.process.supervisor"], "supervisor"),
        (["-m", "sublet_broker.adapters.ray.host"], "ray"),
        (["-m", "http.server"], ""),
    ):
        code = f"import sys; sys.orig_argv = {['python3', *arguments]!r}; import sitecustomize as s"
        said = subprocess.run(
            [sys.executable, "-c", f"{code}; print(s._kind())"],
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "chaos" / "gate")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout.strip() == kind


def test_the_event_around_a_message_is_known_by_its_name() -> None:
    assert hasattr(events, gate.ENVELOPE)


def test_a_place_is_named_by_folder_file_and_function_and_plumbing_is_left_out() -> None:
    named = {}

    def write_down(where: str) -> None:
        named[where] = gate._place()

    def frame(file: str, function: str, package: str, then: str) -> None:
        """Call `then` from a function of that name in a file of that name."""
        code = compile(f"def {function}(then):\n    then()\n", str(ROOT / file), "exec")
        space = {"__name__": package}
        exec(code, space)
        space[function](lambda: write_down(then))  # type: ignore[operator]

    frame(
        "broker/sublet_broker/adapters/blobs/file_blobs.py", "put", "sublet_broker.adapters", "blob"
    )
    frame("broker/sublet_broker/adapters/sql/store.py", "commit", "sublet_broker.adapters", "store")
    assert named["blob"] == "blobs/file_blobs.put"
    assert named["store"] == ""
