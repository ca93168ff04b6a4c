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
from collections.abc import Container, Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
    parser.add_argument(
        "--state", type=Path, metavar="FILE", help="go on from what is there, and keep it there"
    )
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
    progress = Progress(first, {**asdict(plan), "faults": sorted(plan.faults)})
    if options.state is not None and options.state.is_file():
        before, progress = progress, Progress.load(options.state)
        if progress.plan != before.plan or (not options.random and progress.first != first):
            parser.error(
                f"{options.state} is of other markets: take the same options, or remove it"
            )
        print(f"{progress.total.markets} markets were simulated already", flush=True)
    print(f"seeds from {progress.first} on", flush=True)
    seeds = options.seeds if options.minutes is None else MANY
    return _many(range(progress.first, progress.first + seeds), plan, progress, options)


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
    reasons: Counter[str] = field(default_factory=Counter)
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
        self.reasons.update(dict(outcome.reasons))
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


@dataclass
class Progress:
    """How far a run of many markets is. Kept in a file, it goes on from there."""

    first: int
    plan: dict[str, Any]
    total: Sum = field(default_factory=Sum)
    done: set[int] = field(default_factory=set)
    spent_s: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one market."""
        self.total.add(outcome)
        self.done.add(outcome.seed)

    def save(self, path: Path) -> None:
        """Write it whole, or leave what is there."""
        total = {**vars(self.total)}
        for name in ("points", "crashed"):
            total[name] = sorted(total[name])
        said = {**vars(self), "done": sorted(self.done), "total": total}
        written = path.with_suffix(".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps(said))
        written.replace(path)

    @classmethod
    def load(cls, path: Path) -> Progress:
        """Read what was saved."""
        said = json.loads(path.read_text())
        total = said.pop("total")
        for name in ("points", "crashed"):
            total[name] = set(total[name])
        for name in ("faults", "reasons"):
            total[name] = Counter(total[name])
        return cls(**{**said, "done": set(said["done"]), "total": Sum(**total)})


def _many(seeds: range, plan: Plan, progress: Progress, options: argparse.Namespace) -> int:
    began = told = time.monotonic() - progress.spent_s
    total = progress.total
    of = str(len(seeds)) if options.minutes is None else f"{options.minutes:g} minutes'"

    def is_over() -> bool:
        late = options.minutes is not None and time.monotonic() - began > options.minutes * 60
        return late or len(progress.done) == len(seeds)

    def keep() -> None:
        # As it goes: whoever ends a long run has what it came to.
        progress.spent_s = time.monotonic() - began
        if options.state:
            progress.save(options.state)
        if options.json:
            _write(options.json, total, seeds.start, progress.spent_s, plan)

    outcomes = _outcomes(seeds, progress.done, plan, options.processes)
    try:
        while not is_over():
            outcome = next(outcomes)
            progress.add(outcome)
            if outcome.violation:
                _show(outcome, lines=not options.keep_going)
            stop = outcome.violation and not options.keep_going
            if time.monotonic() - told > 5 or stop or is_over():
                told = time.monotonic()
                print(total.line(of, told - began), flush=True)
                keep()
            if stop:
                break
    except KeyboardInterrupt:
        keep()
        print(f"\nended: {total.line(of, progress.spent_s)}")
        how = (
            "the same again"
            if options.state
            else "--from " + str(next(seed for seed in seeds if seed not in progress.done))
        )
        print(f"  to go on: {how}")
        return 130
    finally:
        outcomes.close()
    keep()
    for title, counts in (("faults", total.faults), ("leases settled as", total.reasons)):
        print(title)
        for name in sorted(counts):
            print(f"  {counts[name]:7d}  {name}")
    return 1 if total.violations else 0


def _prepare() -> None:
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us ends us, and says so


def _outcomes(seeds: range, done: Container[int], plan: Plan, processes: int) -> Generator[Outcome]:
    """Yield what becomes of each that isn't done, the first ready first; none waits for one that
    takes long."""
    left = (seed for seed in seeds if seed not in done)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(processes, _prepare, (), MARKETS_OF_A_PROCESS) as pool:
        yield from _outcomes_of(pool, left, plan, processes)


def _outcomes_of(
    pool: multiprocessing.pool.Pool, left: Iterator[int], plan: Plan, processes: int
) -> Iterator[Outcome]:
    done: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
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
        "settled_as": dict(sorted(total.reasons.items())),
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
