"""python -m tests.reliability: take in what runs wrote, and write tests/RELIABILITY.md.

`python -m tests.reliability.run` plays all of them, and takes them in itself.

python -m tests.reliability --simulation build/simulation.json --mutants build/mutants.json
                            --chaos build/chaos.json --writes build/writes.json
                            --database build/database.json --bench build/bench.json
                            --odd-process build/odd-process.json --odd-docker build/odd-docker.json
python -m tests.reliability            writes the page from the records that are there
python -m tests.reliability --check    1 where the page is stale
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from tests.reliability.page import Alarm, Bug, page

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "RELIABILITY.md"
KINDS = (
    *("simulation", "mutants", "chaos", "writes", "database", "storms"),
    *("odd-process", "odd-docker", "recovery"),
)


def render() -> str:
    """Return the page as the records have it."""
    records = {
        kind: json.loads(file.read_text())
        for kind in KINDS
        if (file := HERE / "records" / f"{kind}.json").is_file()
    }
    bugs = tomllib.loads((HERE / "bugs.toml").read_text())["bug"]
    alarms = tomllib.loads((HERE / "false_alarms.toml").read_text())["alarm"]
    return page(records, [Bug(**bug) for bug in bugs], [Alarm(**alarm) for alarm in alarms])


def take(kind: str, source: Path, commit: str) -> None:
    """Keep what a run wrote, with the commit that it ran on."""
    said: dict[str, Any] = json.loads(source.read_text())
    if kind == "recovery":
        said = _of_bench(said)
    said["commit"] = commit
    (HERE / "records").mkdir(exist_ok=True)
    file = HERE / "records" / f"{kind}.json"
    if kind == "simulation":
        before = json.loads(file.read_text())["runs"] if file.is_file() else []
        run = _run_of(said)
        # The same run taken again takes its own place.
        same = (run["commit"], run["first_seed"])
        others = [one for one in before if (one["commit"], one["first_seed"]) != same]
        said["runs"] = [*others, run]
    file.write_text(json.dumps(said, indent=2) + "\n")


def _run_of(said: dict[str, Any]) -> dict[str, Any]:
    """What stays of a simulation once there is a newer one: enough to run it again."""
    kept = ("commit", "first_seed", "markets", "simulated_hours", "violations", "seconds")
    return {**{name: said[name] for name in kept}, "faults": sum(said["faults"].values())}


def take_storm(source: Path, commit: str) -> None:
    """Keep what one storm wrote, in the place of what the same command wrote before."""
    storm = {**json.loads(source.read_text()), "commit": commit}
    file = HERE / "records" / "storms.json"
    kept = json.loads(file.read_text()) if file.is_file() else {"storms": []}
    others = [one for one in kept["storms"] if one["command"] != storm["command"]]
    kept["storms"] = sorted([*others, storm], key=lambda one: str(one["command"]))
    file.write_text(json.dumps(kept, indent=2) + "\n")


def _of_bench(said: dict[str, Any]) -> dict[str, Any]:
    measured = {what: said[what] for what in ("recovery", "reclaim") if what in said}
    return {
        "runner": next(iter(measured.values()))["runner"],
        "measured": [
            {
                "what": what,
                "rounds": len(one["rounds"]),
                "p50_s": one["p50_s"],
                "p95_s": one["p95_s"],
                "detection_p50_s": statistics.median(r["detection_s"] for r in one["rounds"]),
                "limit_s": one["limit_s"],
            }
            for what, one in measured.items()
        ],
    }


def commit_here() -> str:
    """Return the newest commit's name, shortened."""
    done = subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--simulation", type=Path)
    parser.add_argument("--mutants", type=Path)
    parser.add_argument("--chaos", type=Path)
    parser.add_argument("--writes", type=Path)
    parser.add_argument("--database", type=Path)
    parser.add_argument("--odd-process", type=Path)
    parser.add_argument("--odd-docker", type=Path)
    parser.add_argument("--bench", type=Path, dest="recovery")
    parser.add_argument("--storm", type=Path, action="append", default=[], help="one storm's run")
    parser.add_argument("--commit", help="that the runs were made on; default: the newest")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        stale = not PAGE.is_file() or PAGE.read_text() != render()
        print("tests/RELIABILITY.md is stale: make reliability" if stale else "up to date")
        return int(stale)
    for kind in KINDS:
        source = getattr(options, kind.replace("-", "_"), None)
        if source is not None:
            take(kind, source, options.commit or commit_here())
    for source in options.storm:
        take_storm(source, options.commit or commit_here())
    PAGE.write_text(render())
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
