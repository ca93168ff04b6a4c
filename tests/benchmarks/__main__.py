"""`python -m tests.benchmarks [imports] [checkpoints] [recovery] [reclaim] [market_size]`: measure.

Exits with 1 when a limit doesn't hold, with 2 when a measurement could not be made. What was
measured is written to build/bench.json, round by round.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sublet.demo.local import LocalMarketError
from tests.benchmarks import checkpoints, imports, market_size, recovery
from tests.benchmarks.lane import Round, RoundFailed

WHAT = ("imports", "checkpoints", "recovery", "reclaim", "market_size")


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"{', '.join(WHAT)}; default: all")
    parser.add_argument("--rounds", type=int, help="of each; default: 15, 3, 20, 10 and 2")
    parser.add_argument("--lanes", type=int, default=recovery.LANES, help="jobs at once")
    parser.add_argument("--runner", choices=("auto", "docker", "process"), default="auto")
    parser.add_argument(
        "--agents", type=int, default=market_size.LARGE, help="in market_size's large market"
    )
    parser.add_argument(
        "--idle-beats",
        type=int,
        default=market_size.IDLE_BEATS,
        metavar="N",
        help="market_size: who runs nothing reports at every Nth heartbeat, as real agents do; "
        "1 is harder on the broker",
    )
    parser.add_argument(
        "--database",
        default="",
        metavar="URL",
        help="market_size: a PostgreSQL server where databases can be made; default: SQLite",
    )
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), metavar="FILE")
    options = parser.parse_args(arguments)
    if unknown := set(options.what) - set(WHAT):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))} (there are {WHAT})")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    chosen = options.what or WHAT
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}",
        "began_unix_s": int(time.time()),
    }
    held = True
    failed = False
    for what in WHAT:
        if what not in chosen:
            continue
        try:
            good, results[what] = _MEASURES[what](options)
            held = held and good
        except (RoundFailed, LocalMarketError, subprocess.CalledProcessError, OSError) as error:
            _say(f"{what} could not be measured: {error}")
            results[what] = {"error": str(error)}
            failed = True
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    _say(f"written to {options.json}")
    if failed:
        return 2
    return 0 if held else 1


def _imports(options: argparse.Namespace) -> tuple[bool, Any]:
    rounds = options.rounds or imports.ROUNDS
    _say(f"imports: {rounds} turns of each")
    comparisons = imports.measure(rounds)
    for line in imports.report(comparisons):
        _say(line)
    shown = [
        dataclasses.asdict(c) | {"ratio": round(c.ratio, 4), "holds": c.holds} for c in comparisons
    ]
    return all(c.holds for c in comparisons), shown


def _checkpoints(options: argparse.Namespace) -> tuple[bool, Any]:
    rounds = options.rounds or checkpoints.ROUNDS
    _say(f"checkpoints: {rounds} rounds of 1 GiB, first and with 5 % changed")
    result = checkpoints.measure(_say, rounds)
    for line in checkpoints.report(result):
        _say(line)
    return result.holds, dataclasses.asdict(result) | {"holds": result.holds}


def _recovery(options: argparse.Namespace) -> tuple[bool, Any]:
    rounds = options.rounds or recovery.RECOVERY_ROUNDS
    return _shown(recovery.measure_recovery(_say, rounds, options.runner, options.lanes))


def _reclaim(options: argparse.Namespace) -> tuple[bool, Any]:
    rounds = options.rounds or recovery.RECLAIM_ROUNDS
    return _shown(recovery.measure_reclaim(_say, rounds, options.runner, options.lanes))


def _market_size(options: argparse.Namespace) -> tuple[bool, Any]:
    rounds = options.rounds or market_size.ROUNDS
    _say(f"market size: {rounds} markets each of {market_size.SMALL} and {options.agents} agents")
    result = market_size.measure(
        _say,
        rounds,
        large=options.agents,
        database=options.database,
        idle_beats=options.idle_beats,
    )
    for line in market_size.report(result):
        _say(line)
    return result.holds, dataclasses.asdict(result) | {
        "holds": result.holds,
        "submissions_ratio": round(result.submissions_ratio, 3),
        "p95_ratio": {p: round(result.p95_ratio(p), 3) for p in market_size.PHASES},
        "thrown_out": dict(result.thrown_out),
    }


def _shown(result: recovery.Recoveries) -> tuple[bool, Any]:
    for line in recovery.report(result):
        _say(line)
    return result.holds, {
        "holds": result.holds,
        "limit_s": result.limit_s,
        "p50_s": round(result.spread.p50, 3),
        "p95_s": round(result.spread.p95, 3),
        "max_s": round(result.spread.max, 3),
        "runner": result.runner,
        "busy_before": round(result.before.busy, 3),
        "busy_during": round(result.during.busy, 3),
        "ready_s": round(result.ready_s, 2),
        "rounds": [_round(r) for r in result.rounds],
    }


def _round(one: Round) -> dict[str, Any]:
    return dataclasses.asdict(one) | {
        "total_s": one.total_s,
        "detection_s": one.detection_s,
        "rest_s": one.rest_s,
    }


def _say(line: str) -> None:
    print(line, flush=True)


_MEASURES: dict[str, Callable[[argparse.Namespace], tuple[bool, Any]]] = {
    "imports": _imports,
    "checkpoints": _checkpoints,
    "recovery": _recovery,
    "reclaim": _reclaim,
    "market_size": _market_size,
}

if __name__ == "__main__":
    sys.exit(main())
