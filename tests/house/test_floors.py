"""Each direct dependency has one lower bound, and `make floors` tests exactly those."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.house.floors import ROOT, NoFloor, floors, main


def project(*base: str, **extras: list[str]) -> dict[str, Any]:
    return {"name": "sublet", "dependencies": list(base), "optional-dependencies": extras}


def test_the_floor_is_the_lower_bound_whatever_stands_around_it() -> None:
    asked = project(
        "alpha>=1.2",
        "Beta_b >= 3",
        gamma=["psycopg[binary]>=3.2,<4", "torch==2.13.0", "sublet[other]"],
        other=["alpha>=1.2", "delta>=0.1; sys_platform == 'linux'", "eps~=2.1"],
    )
    assert floors(asked) == {
        "alpha": "1.2",
        "beta-b": "3",
        "psycopg": "3.2",
        "torch": "2.13.0",
        "delta": "0.1",
        "eps": "2.1",
    }


@pytest.mark.parametrize(
    "requirements",
    [["alpha"], ["alpha<2"], ["alpha; python_version >= '3.11'"], ["alpha>=1", "alpha>=2"]],
)
def test_a_requirement_without_one_floor_is_an_error(requirements: list[str]) -> None:
    with pytest.raises(NoFloor, match="alpha"):
        floors(project(*requirements))


def test_ours_all_have_one_that_the_pins_satisfy() -> None:
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = floors(ours)
    pins = dict(
        line.split("==")
        for line in (ROOT / "deploy" / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    pinned = {name.lower().replace("_", "-"): Version(version) for name, version in pins.items()}
    asked = {
        Requirement(text).name.lower()
        for group in (ours["dependencies"], *ours["optional-dependencies"].values())
        for text in group
    }
    assert set(least) == asked - {"sublet"}
    assert {name: v for name, v in least.items() if pinned[name] < Version(v)} == {}


def test_it_prints_constraints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text(
        '[project]\nname = "sublet"\ndependencies = ["b>=2", "a>=1"]\n'
        "[project.optional-dependencies]\n"
    )
    assert main([str(file)]) == 0
    assert capsys.readouterr().out == "a==1\nb==2\n"
    file.write_text(file.read_text().replace("a>=1", "a"))
    assert main([str(file)]) == 1
    assert "'a' has no lower bound" in capsys.readouterr().err
