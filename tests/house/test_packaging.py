"""One distribution, four packages: complete in a wheel, and light for a researcher."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "contracts/sublet_contracts",
    "broker/sublet_broker",
    "provider_agent/sublet_agent",
    "sdk/sublet",
)


@pytest.fixture(scope="session")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_tracked_file_of_the_packages_is_in_the_wheel(wheel_names: set[str]) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--", *PACKAGES],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    present = [name for name in tracked if name and (ROOT / name).is_file()]
    expected = {name.split("/", 1)[1] for name in present}
    assert len(expected) > len(PACKAGES)
    assert expected - wheel_names == set()


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel_names: set[str]) -> None:
    top = {name.split("/", 1)[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        path.split("/")[1] for path in PACKAGES
    }
    for path in PACKAGES:
        assert f"{path.split('/')[1]}/py.typed" in wheel_names


def test_importing_the_sdk_brings_neither_ray_nor_docker_nor_a_database() -> None:
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sublet.cli.main, sys; print(*{name.split('.')[0] for name in sys.modules})",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    heavy = {
        "alembic",
        "docker",
        "fastapi",
        "numpy",
        "ray",
        "sqlalchemy",
        "sqlmodel",
        "sublet_agent",
        "sublet_broker",
        "torch",
        "transformers",
        "uvicorn",
    }
    assert heavy.intersection(loaded) == set()


def test_constraints_pin_every_dependency_and_name_no_place() -> None:
    lines = (ROOT / "deploy" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if pin.count("==") != 1 or "@" in pin or "/" in pin] == []
    assert [pin for pin in pins if "+" in pin] == []
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        asked += extra
    names = {_name(requirement) for requirement in asked} - {"sublet"}
    assert names - pinned == set()


def _name(requirement: str) -> str:
    """Return the normalised distribution name at the head of a requirement."""
    end = next((i for i, c in enumerate(requirement) if c in "[<>=!~ ;"), len(requirement))
    return requirement[:end].lower().replace("_", "-")


def test_every_top_level_folder_has_a_readme() -> None:
    for name in ("contracts", "broker", "provider_agent", "sdk", "tests", "deploy"):
        assert (ROOT / name / "README.md").is_file(), f"{name}/README.md is missing"
