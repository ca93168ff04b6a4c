"""Does the net catch fish? Applies each known bug in a scratch copy; the simulator must find it.

    python -m tests.simulation.mutants.mutate [--seeds N] [--from N] [--only NAME ...] [--part K/N]
                                              [--processes N] [--json FILE [--resume]]

A mutant is a .toml in this folder: `what` says in words what is wrong, and each `[[edit]]` names a
file, the text that stands there once, and what stands in its place. It is applied to a copy of the
working tree; the simulator runs there until it finds a violation, or has survived N seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.part import Part

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PACKAGES = ("contracts", "broker", "provider_agent", "sdk")


@dataclass(frozen=True)
class Edit:
    """One exact text in one file, and what it becomes."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A bug that the simulator must find."""

    name: str
    what: str
    edits: tuple[Edit, ...]

    def apply(self, tree: Path) -> str:
        """Edit the files under `tree`. Return why that can't be done, or nothing: an edit counts
        only where its old text stands exactly once."""
        for edit in self.edits:
            path = tree / edit.file
            text = path.read_text() if path.is_file() else ""
            if (times := text.count(edit.old)) != 1:
                return f"{self.name}.toml: its old text stands {times} times in {edit.file}"
            path.write_text(text.replace(edit.old, edit.new))
        return ""


def load_mutants() -> list[Mutant]:
    """Return all planted bugs, by name."""
    mutants = []
    for path in sorted(HERE.glob("*.toml")):
        found = tomllib.loads(path.read_text())
        edits = tuple(Edit(**edit) for edit in found["edit"])
        mutants.append(Mutant(path.stem, " ".join(found["what"].split()), edits))
    return mutants


def copy_tree(target: Path) -> None:
    """Copy what the simulator needs."""
    for folder in (*PACKAGES, "tests/simulation"):
        shutil.copytree(
            ROOT / folder,
            target / folder,
            ignore=shutil.ignore_patterns("__pycache__", "*.toml"),
            dirs_exist_ok=True,
        )
    (target / "tests/__init__.py").touch()
    shutil.copy(ROOT / "tests/walls.py", target / "tests/walls.py")


def hunt(mutant: Mutant, seeds: int, hours: float, first: int = 0) -> tuple[int | None, float, str]:
    """Return the seed that found it (None: it survived), seconds, and how."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sublet-mutant-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        if why_not := mutant.apply(tree):
            return None, 0.0, why_not
        paths = [str(tree), *(str(tree / name) for name in PACKAGES)]
        command = [
            sys.executable,
            "-m",
            "tests.simulation",
            "--seeds",
            str(seeds),
            "--from",
            str(first),
            "--hours",
            str(hours),
            "--fault-every-s",
            "30",
        ]
        found = subprocess.run(
            command,
            cwd=tree,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    spent = time.monotonic() - began
    for line in found.stdout.splitlines():
        if "VIOLATION at step" in line:
            seed, _, says = line.partition(": ")
            return int(seed.split()[1]), spent, says.split(": ", 1)[1]
    says = found.stderr.strip().splitlines()[-1:] or ["survived"]
    return None, spent, says[0]


def _write(path: Path, seeds: int, said: dict[str, dict[str, Any]]) -> None:
    written = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    mutants = [said[name] for name in sorted(said)]
    written.write_text(json.dumps({"seeds": seeds, "mutants": mutants}, indent=2) + "\n")
    written.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Hunt them all. 0: each was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=80)
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    parser.add_argument("--hours", type=float, default=0.5)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N parts of them")
    parser.add_argument("--processes", type=int, default=1, help="so many at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what it came to")
    parser.add_argument("--resume", action="store_true", help="leave out those found in that file")
    options = parser.parse_args(arguments)
    if options.resume and not options.json:
        parser.error("--resume goes on from what --json names")
    try:
        part = Part.parse(options.part)
    except ValueError as error:
        parser.error(str(error))
    mutants = [m for m in load_mutants() if not options.only or m.name in options.only]
    mutants = part.of_all(mutants)
    said: dict[str, dict[str, Any]] = {}
    if options.resume and options.json.is_file():
        before = json.loads(options.json.read_text())
        if before["seeds"] == options.seeds:
            said = {one["name"]: one for one in before["mutants"] if one["seed"] is not None}
    with ThreadPoolExecutor(options.processes) as pool:
        hunts = {
            pool.submit(hunt, mutant, options.seeds, options.hours, options.first): mutant
            for mutant in mutants
            if mutant.name not in said
        }
        try:
            for done in as_completed(hunts):
                mutant, (seed, spent, says) = hunts[done], done.result()
                mark = f"found by seed {seed}" if seed is not None else "SURVIVED"
                print(f"{mutant.name:32s} {mark:20s} {spent:6.1f} s  {says[:110]}", flush=True)
                one = {"name": mutant.name, "what": mutant.what, "seed": seed, "says": says[:200]}
                said[mutant.name] = one
                if options.json:
                    _write(options.json, options.seeds, said)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            print("ended before its time")
            return 130
    survivors = [mutant.name for mutant in mutants if said[mutant.name]["seed"] is None]
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} found")
    if survivors:
        print(f"survivors: {', '.join(survivors)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
