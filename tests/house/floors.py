"""Writes down the least version of each direct dependency, as pip constraints.

    python -m tests.house.floors [PYPROJECT]

`make floors` installs exactly these into an environment of its own and runs the tests there: a
lower bound in pyproject.toml is a version that works, not a guess. What is pinned there (torch)
stays pinned; what the dependencies themselves need is whatever pip finds for them.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?\s*(?P<bounds>[^;]*?)\s*(;(?P<marker>.*))?"
)
_LEAST = re.compile(r"(?:>=|==|~=)\s*(?P<version>[0-9][^,\s]*)")


class NoFloor(ValueError):
    """A requirement without a lower bound, or one that has two."""


def floors(project: Mapping[str, Any]) -> dict[str, str]:
    """Return the least version of each direct dependency by its name, of pyproject's [project].

    Our own extras that an extra names are left out. Raises NoFloor where a requirement has no lower
    bound, or two requirements of one name have different ones.
    """
    least: dict[str, str] = {}
    for requirement in _requirements(project):
        found = _REQUIREMENT.fullmatch(requirement.strip())
        if found is None:
            raise NoFloor(f"{requirement!r} is not understood")
        name = re.sub(r"[-_.]+", "-", found["name"]).lower()
        if name == project["name"]:
            continue
        bound = _LEAST.search(found["bounds"])
        if bound is None:
            raise NoFloor(f"{requirement!r} has no lower bound")
        if least.setdefault(name, bound["version"]) != bound["version"]:
            raise NoFloor(f"{name} has two lower bounds: {least[name]} and {bound['version']}")
    return least


def _requirements(project: Mapping[str, Any]) -> Iterable[str]:
    yield from project["dependencies"]
    for extra in project["optional-dependencies"].values():
        yield from extra


def main(arguments: list[str]) -> int:
    """Print them. 0: done; 1: a requirement has no floor, or two."""
    path = Path(arguments[0]) if arguments else ROOT / "pyproject.toml"
    try:
        least = floors(tomllib.loads(path.read_text(encoding="utf-8"))["project"])
    except NoFloor as error:
        print(f"{path.name}: {error}", file=sys.stderr)
        return 1
    for name, version in sorted(least.items()):
        print(f"{name}=={version}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
