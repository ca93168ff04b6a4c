"""A long simulation, a long hunt: interrupted, they go on from where they were."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.simulation.__main__ import Progress, main
from tests.simulation.faults import parse_faults
from tests.simulation.market import Plan
from tests.simulation.mutants import mutate

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--seeds", "6", "--hours", "0.05", "--jobs", "2", "--providers", "2", "--from", "40")

# Ctrl-C comes when so many markets are done. In a process of its own: the simulation forks, which
# this one, with its servers' threads, had better not.
SIMULATE = """
import sys
from tests.simulation import __main__ as simulation

really, markets = simulation._outcomes_of, int(sys.argv[1])

def some(*arguments):
    for number, outcome in enumerate(really(*arguments)):
        if number == markets:
            raise KeyboardInterrupt
        yield outcome

simulation._outcomes_of = some
sys.exit(simulation.main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Ended:
    """How a simulation ended: its exit status, what it printed and what it wrote."""

    status: int
    printed: str
    wrote: dict[str, Any]


def simulate(file: Path, *options: str, interrupted_after: int = 99) -> Ended:
    done = subprocess.run(
        [
            *(sys.executable, "-c", SIMULATE, str(interrupted_after)),
            *(*SMALL, "--json", str(file), *options),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    wrote = json.loads(file.read_text()) if file.exists() else {}
    wrote.pop("seconds", None)
    return Ended(done.returncode, done.stdout + done.stderr, wrote)


def test_an_interrupted_simulation_comes_to_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    undisturbed = simulate(tmp_path / "undisturbed.json")
    assert (undisturbed.status, undisturbed.wrote["markets"]) == (0, 6), undisturbed.printed
    file, state = tmp_path / "interrupted.json", ("--state", str(tmp_path / "state.json"))
    some = simulate(file, *state, interrupted_after=2)
    assert (some.status, some.wrote["markets"]) == (130, 2), some.printed
    rest = simulate(file, *state)
    assert (rest.status, rest.wrote) == (0, undisturbed.wrote), rest.printed
    # What is done is done: nothing is simulated once more, and nothing counts twice.
    again = simulate(file, *state)
    assert (again.status, again.wrote) == (0, undisturbed.wrote)
    assert "6 markets were simulated already" in again.printed


def test_a_state_of_other_markets_is_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(parse_faults("all"), hours=0.05, jobs=2, providers=2)
    state = tmp_path / "state.json"
    Progress(40, {**asdict(plan), "faults": sorted(plan.faults)}).save(state)
    for changed in (("--hours", "0.06"), ("--from", "41")):
        with pytest.raises(SystemExit):
            main([*SMALL, *changed, "--state", str(state)])
        assert "is of other markets" in capsys.readouterr().err


def test_an_interrupted_hunt_goes_on_with_what_was_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"bug_{number}" for number in range(5)]
    monkeypatch.setattr(
        mutate, "load_mutants", lambda: [mutate.Mutant(name, "what", ()) for name in names]
    )
    hunted: list[str] = []
    found: dict[str, int | None] = dict.fromkeys(names, 7) | {"bug_1": None}

    def hunt(
        mutant: mutate.Mutant, seeds: int, hours: float, first: int
    ) -> tuple[int | None, float, str]:
        hunted.append(mutant.name)
        if mutant.name == "bug_3" and len(hunted) < 5:
            raise KeyboardInterrupt
        return found[mutant.name], 0.1, "says"

    monkeypatch.setattr(mutate, "hunt", hunt)
    file = tmp_path / "mutants.json"
    options = ["--json", str(file), "--resume"]
    assert mutate.main(options) == 130
    before = {one["name"] for one in json.loads(file.read_text())["mutants"]}
    assert before <= {"bug_0", "bug_1", "bug_2", "bug_4"}
    # Whatever was found isn't hunted again; what survived is.
    hunted[:] = ["as if"] * 5
    assert mutate.main(options) == 1
    assert {"bug_1", "bug_3"} <= set(hunted[5:])
    assert not (before - {"bug_1"}) & set(hunted[5:])
    assert "4 of 5 found" in capsys.readouterr().out
    assert {one["name"] for one in json.loads(file.read_text())["mutants"]} == set(names)
    found["bug_1"] = 3
    del hunted[:]
    hunted += ["as if"] * 5
    assert mutate.main(options) == 0
    assert hunted[5:] == ["bug_1"]
    hunted[5:] = []
    assert mutate.main([*options, "--seeds", "99", "--part", "2/3"]) == 0
    assert hunted[5:] == ["bug_1", "bug_4"]
