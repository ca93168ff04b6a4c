"""python -m tests.simulation: simulate markets, stop at the first violation and show it."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing.pool
import queue
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.simulation.faults import FAULTS, UnknownFault, parse_faults
from tests.simulation.market import Outcome, Plan, simulate

MANY = 10**6
MARKETS_OF_A_PROCESS = 16
"""After so many a process is replaced: to end one costs nothing, to collect its garbage a seventh
of the time that it had for its markets. A market leaves some 15 MB behind."""


def main(arguments: list[str] | None = None) -> int:
    """Run it. 0: no violation; 1: one was found; 2: bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many markets")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    parser.add_argument("--seed", type=int, help="just this one")
    parser.add_argument("--trace", action="store_true", help="print everything that happens")
    parser.add_argument("--hours", type=float, default=1.5, help="of faults, simulated")
    parser.add_argument("--days", type=float, help="the same in days")
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--providers", type=int, default=5)
    parser.add_argument("--renters", type=int, default=3)
    parser.add_argument("--fault-every-s", type=float, default=60.0)
    parser.add_argument("--faults", default="all", help=f"all, none, or of: {', '.join(FAULTS)}")
    parser.add_argument("--keep-going", action="store_true", help="don't stop at a violation")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--random", action="store_true", help="begin at a seed drawn at random")
    parser.add_argument("--minutes", type=float, help="stop after so long, however many seeds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what it came to")
    options = parser.parse_args(arguments)
    try:
        faults = parse_faults(options.faults)
    except UnknownFault as error:
        parser.error(str(error))
    plan = Plan(
        faults=faults,
        hours=options.days * 24 if options.days else options.hours,
        jobs=options.jobs,
        providers=options.providers,
        renters=options.renters,
        fault_every_ms=int(options.fault_every_s * 1000),
    )
    if options.seed is not None:
        trace = (lambda line: print(line, flush=False)) if options.trace else None
        outcome = simulate(options.seed, plan, trace)
        _show(outcome, lines=not options.trace)
        return 1 if outcome.violation else 0
    first = random.SystemRandom().randrange(10**6, 10**9) if options.random else options.first
    print(f"seeds from {first} on", flush=True)
    seeds = options.seeds if options.minutes is None else MANY
    return _many(range(first, first + seeds), plan, options)


@dataclass
class Sum:
    """What many markets came to."""

    markets: int = 0
    jobs: int = 0
    steps: int = 0
    simulated_ms: int = 0
    lost_device_ms: int = 0
    charged_ucr: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    points: set[str] = field(default_factory=set)
    crashed: set[str] = field(default_factory=set)
    violations: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one market."""
        self.markets += 1
        self.jobs += outcome.jobs
        self.steps += outcome.steps
        self.simulated_ms += outcome.simulated_ms
        self.lost_device_ms += outcome.lost_device_ms
        self.charged_ucr += outcome.charged_ucr
        self.faults.update(dict(outcome.counts))
        self.points |= outcome.points
        self.crashed |= outcome.crashed
        if outcome.violation:
            self.violations.append(f"seed {outcome.seed}: {outcome.violation}")

    def line(self, of: str, spent_s: float) -> str:
        """Say how far it is."""
        return (
            f"{self.markets} of {of} markets, {self.simulated_ms / 3_600_000:.0f} h simulated, "
            f"{self.faults.total()} faults, died at {len(self.crashed)} of {len(self.points)} "
            f"crash points, {len(self.violations)} violations, "
            f"{self.markets / spent_s:.2f} markets/s"
        )


def _many(seeds: range, plan: Plan, options: argparse.Namespace) -> int:
    began = told = time.monotonic()
    total = Sum()
    of = str(len(seeds)) if options.minutes is None else f"{options.minutes:g} minutes'"
    outcomes = _outcomes(seeds, plan, options.processes)
    done: set[int] = set()
    try:
        for outcome in outcomes:
            total.add(outcome)
            done.add(outcome.seed)
            if outcome.violation:
                _show(outcome, lines=not options.keep_going)
            now = time.monotonic()
            over = options.minutes is not None and now - began > options.minutes * 60
            stop = over or (outcome.violation and not options.keep_going)
            if now - told > 5 or stop or total.markets == len(seeds):
                told = now
                print(total.line(of, now - began), flush=True)
                if options.json:  # as it goes: whoever ends a long run has what it came to
                    _write(options.json, total, seeds.start, now - began, plan)
            if stop:
                break
    except KeyboardInterrupt:
        print(f"\nended: {total.line(of, time.monotonic() - began)}")
        print(f"  to go on: --from {next(seed for seed in seeds if seed not in done)}")
        return 130
    finally:
        outcomes.close()
    for name in sorted(total.faults):
        print(f"  {total.faults[name]:7d}  {name}")
    return 1 if total.violations else 0


def _prepare() -> None:
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us ends us, and says so


def _outcomes(seeds: range, plan: Plan, processes: int) -> Generator[Outcome]:
    """Yield what becomes of each, the first ready first; none waits for one that takes long."""
    fork = multiprocessing.get_context("fork")
    with fork.Pool(processes, _prepare, (), MARKETS_OF_A_PROCESS) as pool:
        yield from _outcomes_of(pool, seeds, plan, processes)


def _outcomes_of(
    pool: multiprocessing.pool.Pool, seeds: range, plan: Plan, processes: int
) -> Iterator[Outcome]:
    done: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
    left = iter(seeds)
    under_way = 0

    def begin() -> int:
        for seed in itertools.islice(left, 1):
            pool.apply_async(simulate, (seed, plan), callback=done.put, error_callback=done.put)
            return 1
        return 0

    for _ in range(2 * processes):
        under_way += begin()
    while under_way:
        outcome = done.get()
        if isinstance(outcome, BaseException):
            raise outcome
        under_way += begin() - 1
        yield outcome


def _write(path: Path, total: Sum, first: int, spent_s: float, plan: Plan) -> None:
    said = {
        "first_seed": first,
        "markets": total.markets,
        "jobs": total.jobs,
        "steps": total.steps,
        "simulated_hours": round(total.simulated_ms / 3_600_000, 1),
        "hours_of_faults_each": plan.hours,
        "providers_each": plan.providers,
        "faults": dict(sorted(total.faults.items())),
        "crash_points": len(total.points),
        "crash_points_died_at": len(total.crashed),
        "crash_points_missed": sorted(total.points - total.crashed),
        "charged_ucr": total.charged_ucr,
        "lost_device_ms": total.lost_device_ms,
        "violations": total.violations,
        "seconds": round(spent_s, 1),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said, indent=2) + "\n")


def _show(outcome: Outcome, *, lines: bool) -> None:
    if outcome.violation:
        if lines:
            print("\n".join(outcome.last))
        print(f"seed {outcome.seed}: VIOLATION at step {outcome.steps}: {outcome.violation}")
        print(f"  again: python -m tests.simulation --seed {outcome.seed} --trace")
    else:
        print(
            f"seed {outcome.seed}: {outcome.steps} steps, {outcome.simulated_ms / 3_600_000:.1f} h "
            f"simulated, {outcome.charged_ucr} ucr charged, digest {outcome.digest[:16]}"
        )


if __name__ == "__main__":
    sys.exit(main())
