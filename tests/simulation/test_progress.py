"""A long simulation, a long hunt: interrupted, they go on from where they were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.simulation import __main__ as simulation
from tests.simulation.market import Outcome
from tests.simulation.mutants import mutate

SMALL = ("--seeds", "6", "--hours", "0.05", "--jobs", "2", "--providers", "2", "--from", "40")


def simulated(folder: Path, name: str, *options: str) -> tuple[int, dict[str, Any]]:
    file = folder / f"{name}.json"
    ended = simulation.main([*SMALL, "--json", str(file), *options])
    said: dict[str, Any] = json.loads(file.read_text())
    return ended, {key: value for key, value in said.items() if key != "seconds"}


def interrupt_after(markets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes when so many markets are done."""
    really = simulation._outcomes_of

    def some(*arguments: Any) -> Iterator[Outcome]:
        for number, outcome in enumerate(really(*arguments)):
            if number == markets:
                raise KeyboardInterrupt
            yield outcome

    monkeypatch.setattr(simulation, "_outcomes_of", some)


def test_an_interrupted_simulation_comes_to_what_an_undisturbed_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, undisturbed = simulated(tmp_path, "undisturbed")
    assert (ended, undisturbed["markets"]) == (0, 6)
    state = ("--state", str(tmp_path / "state.json"))
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        ended, said = simulated(tmp_path, "interrupted", *state)
        assert (ended, said["markets"]) == (130, 2)
        ended, said = simulated(tmp_path, "interrupted", *state)
        assert (ended, said["markets"]) == (130, 4)
    assert simulated(tmp_path, "interrupted", *state) == (0, undisturbed)
    capsys.readouterr()
    # What is done is done: nothing is simulated once more, and nothing counts twice.
    assert simulated(tmp_path, "interrupted", *state) == (0, undisturbed)
    assert "6 markets were simulated already" in capsys.readouterr().out


def test_a_state_of_other_markets_is_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = str(tmp_path / "state.json")
    assert simulation.main([*SMALL, "--seeds", "1", "--state", state]) == 0
    for changed in (("--hours", "0.06"), ("--from", "41")):
        with pytest.raises(SystemExit):
            simulation.main([*SMALL, *changed, "--state", state])
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

    def hunt(mutant: mutate.Mutant, seeds: int, hours: float) -> tuple[int | None, float, str]:
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
