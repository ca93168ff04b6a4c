"""Does the net catch fish? Applies each known bug in a scratch copy; the simulator must find it.

    python -m tests.simulation.mutants.mutate [--seeds N] [--only NAME ...]

A mutant is a .patch in this folder; its first lines, up to `---`, say in words what is wrong. It is
applied to a copy of the working tree; the simulator runs there until it finds a violation, or has
survived N seeds.
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
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PACKAGES = ("contracts", "broker", "provider_agent", "sdk")


def copy_tree(target: Path) -> None:
    """Copy what the simulator needs."""
    for folder in (*PACKAGES, "tests/simulation"):
        shutil.copytree(
            ROOT / folder, target / folder,
            ignore=shutil.ignore_patterns("__pycache__", "*.patch"), dirs_exist_ok=True,
        )  # fmt: skip
    (target / "tests/__init__.py").touch()


def hunt(patch: Path, seeds: int, hours: float) -> tuple[str, int | None, float, str]:
    """Return the mutant's name, the seed that found it (None: it survived), seconds, and how."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sublet-mutant-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        done = subprocess.run(
            ["patch", "-p1", "--quiet", "--input", str(patch)],
            cwd=tree, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            return patch.stem, None, 0.0, f"the patch doesn't apply: {done.stdout.strip()[:200]}"
        paths = [str(tree), *(str(tree / name) for name in PACKAGES)]
        command = [
            sys.executable, "-m", "tests.simulation", "--seeds", str(seeds), "--hours", str(hours),
            "--fault-every-s", "30",
        ]  # fmt: skip
        found = subprocess.run(
            command, cwd=tree, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
    spent = time.monotonic() - began
    for line in found.stdout.splitlines():
        if "VIOLATION at step" in line:
            seed, _, says = line.partition(": ")
            return patch.stem, int(seed.split()[1]), spent, says.split(": ", 1)[1]
    says = found.stderr.strip().splitlines()[-1:] or ["survived"]
    return patch.stem, None, spent, says[0]


def main() -> int:
    """Hunt them all. 0: each was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=80)
    parser.add_argument("--hours", type=float, default=0.5)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what it came to")
    options = parser.parse_args()
    patches = [
        p for p in sorted(HERE.glob("*.patch")) if not options.only or p.stem in options.only
    ]
    survivors = []
    said = []
    for patch in patches:
        name, seed, spent, says = hunt(patch, options.seeds, options.hours)
        mark = f"found by seed {seed}" if seed is not None else "SURVIVED"
        print(f"{name:32s} {mark:20s} {spent:6.1f} s  {says[:110]}", flush=True)
        what = patch.read_text().partition("\n---")[0]
        said.append({"name": name, "what": what, "seed": seed, "says": says[:200]})
        if seed is None:
            survivors.append(name)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"seeds": options.seeds, "mutants": said}, indent=2) + "\n"
        )
    print(f"{len(patches) - len(survivors)} of {len(patches)} found")
    if survivors:
        print(f"survivors: {', '.join(survivors)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
