"""python -m tests.simulation: simulate markets, stop at the first violation and show it."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.faults import FAULTS, UnknownFault, parse_faults
from tests.simulation.market import Outcome, Plan, simulate

CHUNK = 4


def main(arguments: list[str] | None = None) -> int:
    """Run it. 0: no violation; 1: one was found; 2: bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many markets")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    parser.add_argument("--seed", type=int, help="just this one")
    parser.add_argument("--trace", action="store_true", help="print everything that happens")
    parser.add_argument("--hours", type=float, default=2.0, help="of faults, simulated")
    parser.add_argument("--days", type=float, help="the same in days")
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--providers", type=int, default=5)
    parser.add_argument("--renters", type=int, default=3)
    parser.add_argument("--fault-every-s", type=float, default=60.0)
    parser.add_argument("--faults", default="all", help=f"all, none, or of: {', '.join(FAULTS)}")
    parser.add_argument("--keep-going", action="store_true", help="don't stop at a violation")
    parser.add_argument("--processes", type=int, default=1)
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
    return _many(range(options.first, options.first + options.seeds), plan, options)


def _many(seeds: range, plan: Plan, options: argparse.Namespace) -> int:
    began = told = time.monotonic()
    done = simulated_ms = 0
    counts: Counter[str] = Counter()
    bad: list[Outcome] = []
    with ProcessPoolExecutor(options.processes) as pool:
        if options.processes > 1:
            outcomes = pool.map(simulate, seeds, [plan] * len(seeds), chunksize=CHUNK)
        else:
            outcomes = (simulate(seed, plan) for seed in seeds)
        for outcome in outcomes:
            done += 1
            simulated_ms += outcome.simulated_ms
            counts.update(dict(outcome.counts))
            if outcome.violation:
                bad.append(outcome)
                _show(outcome, lines=not options.keep_going)
                if not options.keep_going:
                    pool.shutdown(cancel_futures=True)
                    break
            if time.monotonic() - told > 5 or done == len(seeds):
                told = time.monotonic()
                spent = told - began
                print(
                    f"{done} of {len(seeds)} markets, {simulated_ms / 3_600_000:.0f} h simulated, "
                    f"{sum(counts[n] for n in FAULTS)} faults, {len(bad)} violations, "
                    f"{done / spent:.2f} markets/s",
                    flush=True,
                )
    for name in sorted(counts):
        print(f"  {counts[name]:7d}  {name}")
    return 1 if bad else 0


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
