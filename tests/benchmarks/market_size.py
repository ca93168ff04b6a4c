"""What a market of 1,000 agents costs beside one of 10: submissions a second, time to the order.

One real broker process with default settings and a fresh folder per market, the agents in one other
process with a websocket each (scripted_agents.py), the renter in a third (submitter.py). Markets of
both sizes take turns, so that a slow spell of the machine hits both; the ratio of the two is what
counts. Jobs, their mix and their rate are the same in both, and both have room for all of them. The
order is there when the agent has read the assignment. In each market:

- flood: a few connections submit as fast as they are answered. Counted: accepted jobs a second.
- paced: jobs come at random times (the same in both), at a rate that leaves the small market idle
  most of the time, and not before the flood's runs have ended and settled. Counted: time from the
  sending of the job to the order. (While flooded the order waits for whatever else the broker was
  given to do, in a market that takes more jobs a second for longer; it is shown and judged all the
  same.)
"""

import os
import resource
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.machine import Load, LoadMeter, load_before
from tests.benchmarks.scripted_agents import DEVICES_EACH
from tests.benchmarks.sized_market import MarketFigures, Say, Together, play_market
from tests.benchmarks.submitter import Phase

SMALL, LARGE = 10, 1_000
ROUNDS = 2
SUBMISSIONS_RATIO_LEAST = 0.7
P95_RATIO_MOST = 2.0
FLOOD = Phase(jobs=400, connections=4, limit_s=60)
PACED = Phase(jobs=150, connections=16, limit_s=60, jobs_a_second=5)
PHASES = {"flood": FLOOD, "paced": PACED}
FILES_WANTED = 8_192
IDLE_BEATS = 3
"""An agent that runs nothing sends every third heartbeat: so `welcome` asks it to."""


@dataclass(frozen=True)
class Sizes:
    """All markets."""

    markets: tuple[MarketFigures, ...]
    small: int
    large: int
    database: str
    idle_beats: int
    before: Load
    during: Load
    load_average: tuple[float, float]
    """Of the last minute, at the beginning and at the end."""

    def of(self, agents: int, phase: str) -> Together:
        """Return a phase of all markets of a size, taken together."""
        return Together(
            [p for m in self.markets for p in m.phases if (p.agents, p.phase) == (agents, phase)]
        )

    @property
    def submissions_ratio(self) -> float:
        """The large market's submissions a second as a part of the small one's."""
        return (
            self.of(self.large, "flood").jobs_a_second / self.of(self.small, "flood").jobs_a_second
        )

    def p95_ratio(self, phase: str) -> float:
        """The large market's p95 to the order, in times of the small one's."""
        return self.of(self.large, phase).order.p95 / self.of(self.small, phase).order.p95

    @property
    def thrown_out(self) -> Counter[str]:
        """Connections that ended though nobody had asked for it, joining included."""
        told: Counter[str] = Counter()
        for market in self.markets:
            told.update(market.thrown_out_before)
            for phase in market.phases:
                told.update(phase.thrown_out)
        return told

    @property
    def missing(self) -> int:
        """Agents that were not in their market when its measuring began."""
        return sum(m.agents - m.there for m in self.markets)

    @property
    def unserved(self) -> int:
        """Jobs that were refused for good, or of which no agent heard."""
        phases = [p for m in self.markets for p in m.phases]
        return sum(p.never_ordered + p.sent - p.accepted for p in phases)

    @property
    def verdicts(self) -> list[tuple[str, bool]]:
        """What is asked of a market of this size, and whether it holds."""
        return [
            (
                f"submissions a second: {self.submissions_ratio:.2f} of the small market's "
                f"(at least {SUBMISSIONS_RATIO_LEAST})",
                self.submissions_ratio >= SUBMISSIONS_RATIO_LEAST,
            ),
            *(
                (
                    f"p95 to the order, {phase}: {self.p95_ratio(phase):.2f} times the small "
                    f"market's (at most {P95_RATIO_MOST})",
                    self.p95_ratio(phase) <= P95_RATIO_MOST,
                )
                for phase in PHASES
            ),
            (f"agents thrown out: {sum(self.thrown_out.values())}", not self.thrown_out),
            (f"agents that could not get in: {self.missing}", not self.missing),
            (f"jobs that no agent heard of: {self.unserved}", not self.unserved),
        ]

    @property
    def holds(self) -> bool:
        """Whether all of it holds."""
        return all(held for _, held in self.verdicts)


def measure(
    say: Say,
    rounds: int = ROUNDS,
    *,
    small: int = SMALL,
    large: int = LARGE,
    database: str = "",
    idle_beats: int = IDLE_BEATS,
) -> Sizes:
    """Play `rounds` markets of each size, in turns. Raises LocalMarketError, OSError."""
    _raise_file_limit()
    before, average = load_before(), os.getloadavg()[0]
    meter = LoadMeter()
    markets = []
    for number in range(rounds):
        # The order changes, so that neither size always has the warmer machine.
        for agents in (small, large) if number % 2 == 0 else (large, small):
            say(f"  round {number + 1}/{rounds}, {agents} agents")
            markets.append(play_market(agents, PHASES, database, idle_beats, say))
    return Sizes(
        markets=tuple(markets),
        small=small,
        large=large,
        database="postgresql" if database else "sqlite",
        idle_beats=idle_beats,
        before=before,
        during=meter.load(),
        load_average=(average, os.getloadavg()[0]),
    )


def _raise_file_limit() -> None:
    """Each agent is a file descriptor, in a process that inherits this limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, FILES_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def report(result: Sizes) -> list[str]:
    """Return the lines to print."""
    head = (
        "agents", "phase", "jobs", "jobs/s", "order p50", "p95", "max", "answer p95",
        "thrown out", "broker cpu ms/job", "broker", "ray", "agents", "renter", "others",
    )  # fmt: skip
    rows: list[Sequence[str]] = [head]
    for agents in (result.small, result.large):
        for phase in PHASES:
            rows.append(_row(agents, phase, result.of(agents, phase)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  " + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.append(
        "  times in seconds; the last five columns: parts of one core, while measuring; heartbeats "
        f"{'every 3 s' if result.idle_beats == 1 else f'at every {result.idle_beats}. turn'} "
        f"of agents that run nothing; {result.database}"
    )
    for phase in PHASES:
        large = result.of(result.large, phase)
        small = result.of(result.small, phase)
        beats = large.share(lambda p: p.heartbeats)
        late_s = max(p.beat_late_s for p in large.parts)
        busy = [max(p.busy_devices_most for p in size.parts) for size in (small, large)]
        room = [agents * DEVICES_EACH for agents in (result.small, result.large)]
        lines.append(
            f"  {phase}: {beats:.0f} heartbeats a second of {result.large} agents, the latest "
            f"{late_s:.2f} s late; at most {busy[0]} of {room[0]} devices busy with "
            f"{result.small} agents, {busy[1]} of {room[1]} with {result.large}"
        )
    for how, count in result.thrown_out.most_common(5):
        lines.append(f"  thrown out {count}x: {how}")
    refusals = Counter[str]()
    for market in result.markets:
        for part in market.phases:
            refusals.update(part.refused)
    for how, count in refusals.most_common(5):
        lines.append(f"  submissions not taken at once, {count}x: {how}")
    lines += [f"  {what}: {'holds' if held else 'DOES NOT HOLD'}" for what, held in result.verdicts]
    lines.append(
        f"  before: {result.before}; during: {result.during}; load average "
        f"{result.load_average[0]:.1f} before, {result.load_average[1]:.1f} at the end"
    )
    return lines


def _row(agents: int, phase: str, whole: Together) -> Sequence[str]:
    order, accepted = whole.order, whole.sum(lambda p: p.accepted)
    return (
        str(agents),
        phase,
        f"{accepted:.0f}",
        f"{whole.jobs_a_second:.1f}",
        f"{order.p50:.3f}",
        f"{order.p95:.3f}",
        f"{order.max:.3f}",
        f"{whole.answer.p95:.3f}",
        f"{whole.sum(lambda p: sum(p.thrown_out.values())):.0f}",
        f"{1000 * whole.sum(lambda p: p.broker_cpu_s) / max(1, accepted):.0f}",
        f"{whole.share(lambda p: p.broker_cpu_s):.0%}",
        f"{whole.share(lambda p: p.ray_cpu_s):.0%}",
        f"{whole.share(lambda p: p.agents_cpu_s):.0%}",
        f"{whole.share(lambda p: p.submitter_cpu_s):.0%}",
        f"{whole.share(lambda p: p.others_cpu_s):.0%}",
    )
