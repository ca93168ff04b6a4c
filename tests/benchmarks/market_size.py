"""What a market of 1,000 agents costs beside one of 10: submissions a second, time to the order.

One real broker process with default settings and a fresh folder per market, the agents in one other
process with a websocket each (scripted_agents.py), the renter in a third (submitter.py). Markets of
both sizes take turns, so that a slow spell of the machine hits both; the ratio of the two is what
counts. Jobs, their mix and their rate are the same in both, and both have room for all of them. The
order is there when the agent has read the assignment. In each market:

- flood: a few connections submit as fast as they are answered. Counted: accepted jobs a second.
- paced: jobs come at fixed times, at a rate that leaves the small market idle in between. Counted:
  time from the sending of the job to the order. (While flooded the order waits for whatever else
  the broker was given to do, in a market that takes more jobs a second for longer; it is shown and
  judged all the same.)
"""

import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import create_engine, make_url, text

from sublet.client import Client
from sublet.demo.local import LocalMarket, LocalMarketError
from sublet_contracts.keys import SigningKey
from tests.benchmarks import scripted_agents, submitter
from tests.benchmarks.figures import Spread
from tests.benchmarks.machine import Load, LoadMeter, load_before
from tests.benchmarks.scripted_agents import FleetConfig, FleetReport
from tests.benchmarks.submitter import Phase, PhaseReport, SubmitterConfig

SMALL, LARGE = 10, 1_000
ROUNDS = 2
SUBMISSIONS_RATIO_LEAST = 0.7
P95_RATIO_MOST = 2.0
WARM_UP = Phase(jobs=40, connections=4, limit_s=30)
FLOOD = Phase(jobs=400, connections=4, limit_s=60)
PACED = Phase(jobs=150, connections=16, limit_s=60, jobs_a_second=5)
PHASES = {"flood": FLOOD, "paced": PACED}
FUNDS = 1_000_000
ALL_ORDERED_S = 60.0
ALL_OFFERED_S = 120.0
JOINING_S = 600.0
ANSWER_S = 300.0
FILES_WANTED = 8_192
IDLE_BEATS = 3
"""An agent that runs nothing sends every third heartbeat: so `welcome` asks it to."""
SEED = 10
Say = Callable[[str], None]


@dataclass(frozen=True)
class PhaseFigures:
    """One phase in one market. Times in seconds."""

    agents: int
    phase: str
    sent: int
    accepted: int
    took_s: float
    """From the first job's sending to the last one's answer."""
    answer_s: tuple[float, ...]
    order_s: tuple[float, ...]
    """Per job, from its sending to the agent's reading of the assignment."""
    never_ordered: int
    refused: dict[str, int]
    thrown_out: dict[str, int]
    stopped: int
    busy_devices_most: int
    heartbeats: int
    beat_late_s: float
    broker_cpu_s: float
    ray_cpu_s: float
    agents_cpu_s: float
    submitter_cpu_s: float
    others_cpu_s: float
    """What everybody else on this machine took meanwhile: the noise in the rest."""
    wall_s: float
    """Of the phase with the orders that came after it: what the CPU figures are about."""

    @property
    def jobs_a_second(self) -> float:
        """Accepted submissions a second."""
        return self.accepted / self.took_s if self.took_s else 0.0


@dataclass(frozen=True)
class MarketFigures:
    """One market, from the broker's start on."""

    agents: int
    there: int
    """How many of them stood in the market when the measuring began."""
    joining_s: float
    thrown_out_joining: dict[str, int]
    phases: tuple[PhaseFigures, ...]


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

    def of(self, agents: int, phase: str) -> "Together":
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
            told.update(market.thrown_out_joining)
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


@dataclass(frozen=True)
class Together:
    """The same phase in several markets of one size."""

    parts: Sequence[PhaseFigures]

    def sum(self, figure: Callable[[PhaseFigures], float]) -> float:
        """Add a figure up."""
        return sum(map(figure, self.parts))

    @property
    def jobs_a_second(self) -> float:
        """Accepted submissions a second."""
        return self.sum(lambda p: p.accepted) / self.sum(lambda p: p.took_s)

    @property
    def order(self) -> Spread:
        """Seconds to the order. A job of which no agent heard counts as the longest there is."""
        lost = [ALL_ORDERED_S] * int(self.sum(lambda p: p.never_ordered))
        return Spread.of([s for p in self.parts for s in p.order_s] + lost)

    @property
    def answer(self) -> Spread:
        """Seconds to the broker's answer."""
        return Spread.of([s for p in self.parts for s in p.answer_s])

    def share(self, figure: Callable[[PhaseFigures], float]) -> float:
        """Return a figure per second of wall time: of CPU seconds, the part of one core."""
        return self.sum(figure) / self.sum(lambda p: p.wall_s)


@dataclass
class Peer:
    """Another process of ours, at the other end of a line."""

    what: str
    process: Any
    pipe: Connection

    def next(self, limit_s: float = ANSWER_S) -> Any:
        """Return what it says next. Raises LocalMarketError when it says nothing in time."""
        try:
            if self.pipe.poll(limit_s):
                return self.pipe.recv()
        except EOFError:
            self.process.join(10)
            raise LocalMarketError(f"{self.what} ended ({self.process.exitcode})") from None
        raise LocalMarketError(f"{self.what} said nothing for {limit_s:.0f} s")

    def ask(self, question: Any) -> Any:
        """Send, and return what it says next."""
        self.pipe.send(question)
        return self.next()


@dataclass
class SizedMarket:
    """A broker, a fleet and a renter."""

    agents: int
    local: LocalMarket
    fleet: Peer
    renter: Peer
    phases: list[PhaseFigures] = field(default_factory=list)

    def play(self, name: str, phase: Phase) -> PhaseFigures:
        """Play a phase, wait for its orders, and return its figures."""
        self.fleet.ask("begin")
        broker_s, ray_s = self._cpu_s()
        meter = LoadMeter()
        done: PhaseReport = self.renter.ask(phase)
        reports = [self.fleet.ask("report")]
        deadline_s = time.monotonic() + ALL_ORDERED_S
        jobs = {s.job for s in done.accepted}
        while jobs - reports[-1].ordered_ns.keys() and time.monotonic() < deadline_s:
            time.sleep(0.2)
            reports.append(self.fleet.ask("report"))
        load = meter.load()
        broker_after_s, ray_after_s = self._cpu_s()
        return _figures(
            self.agents,
            name,
            phase,
            done,
            reports,
            broker_cpu_s=broker_after_s - broker_s,
            ray_cpu_s=ray_after_s - ray_s,
            load=load,
        )

    def _cpu_s(self) -> tuple[float, float]:
        """Return the CPU time of the broker's process, and of all that it has started."""
        assert self.local.broker is not None
        broker = self.local.broker.pid
        others = [pid for pid in self.local.processes() if pid != broker]
        return _cpu_s_of(broker), sum(map(_cpu_s_of, others))


def _figures(
    agents: int,
    name: str,
    phase: Phase,
    done: PhaseReport,
    reports: Sequence[FleetReport],
    *,
    broker_cpu_s: float,
    ray_cpu_s: float,
    load: Load,
) -> PhaseFigures:
    ordered_ns = reports[-1].ordered_ns
    thrown_out: Counter[str] = Counter()
    for report in reports:
        thrown_out.update(report.thrown_out)
    accepted = done.accepted
    agents_cpu_s = sum(r.cpu_s for r in reports)
    ours_s = broker_cpu_s + ray_cpu_s + agents_cpu_s + done.cpu_s
    machine_s = load.busy * load.seconds * (os.cpu_count() or 1)
    took_ns = (
        max(s.answered_ns for s in accepted) - min(s.sent_ns for s in accepted) if accepted else 0
    )
    return PhaseFigures(
        agents=agents,
        phase=name,
        sent=done.begun,
        accepted=len(accepted),
        took_s=took_ns / 1e9,
        answer_s=tuple((s.answered_ns - s.sent_ns) / 1e9 for s in accepted),
        order_s=tuple(
            (ordered_ns[s.job] - s.sent_ns) / 1e9 for s in accepted if s.job in ordered_ns
        ),
        never_ordered=sum(s.job not in ordered_ns for s in accepted),
        refused=done.refused,
        thrown_out=dict(thrown_out),
        stopped=sum(r.stopped for r in reports),
        busy_devices_most=max(r.busy_devices_most for r in reports),
        heartbeats=sum(r.heartbeats for r in reports),
        beat_late_s=max(r.beat_late_s for r in reports),
        broker_cpu_s=broker_cpu_s,
        ray_cpu_s=ray_cpu_s,
        agents_cpu_s=agents_cpu_s,
        submitter_cpu_s=done.cpu_s,
        others_cpu_s=max(0.0, machine_s - ours_s),
        wall_s=load.seconds,
    )


def _cpu_s_of(pid: int) -> float:
    """Return the CPU time of a process; 0 where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _peer(what: str, play: Callable[..., None], config: object) -> Iterator[Peer]:
    """Start a process of ours; end it afterwards."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=play, args=(config, theirs), name=what)
    process.start()
    theirs.close()
    try:
        with closing(ours):
            yield Peer(what, process, ours)
        process.join(20)
    finally:
        if process.is_alive():
            process.kill()
        process.join()


@contextmanager
def _database(server: str) -> Iterator[str]:
    """Make a database of our own on that server; drop it afterwards."""
    name = f"sublet_bench_{uuid.uuid4().hex[:12]}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        try:
            url = make_url(server).set(database=name)
            yield url.render_as_string(hide_password=False)
        finally:
            with engine.connect() as connection:
                connection.execute(text(f"DROP DATABASE {name}"))
    finally:
        engine.dispose()


def _market(agents: int, database: str, idle_beats: int, say: Say) -> MarketFigures:
    """Play one market from its broker's start to its end."""
    if database:
        with _database(database) as url:
            return _market_on(agents, ("--database", url), idle_beats, say)
    return _market_on(agents, (), idle_beats, say)


def _market_on(agents: int, arguments: Sequence[str], idle_beats: int, say: Say) -> MarketFigures:
    root = Path(tempfile.mkdtemp(prefix="sublet-bench-"))
    local = LocalMarket(root, broker_arguments=arguments)
    done = False
    try:
        local.start_broker()
        assert local.broker is not None
        key = SigningKey.generate()
        with closing(Client(broker=local.url, config_dir=root / "owner", key=key)) as owner:
            owner.broker  # noqa: B018 - introduces itself
            renter_seed = os.urandom(32)
            renter = SigningKey.from_seed(renter_seed).party
            owner.fund(renter, FUNDS, operator_key=local.operator_key)
        ws_url = local.url.replace("http://", "ws://") + "/v1/agent"
        fleet_config = FleetConfig(ws_url, local.broker_id, agents, idle_beats, SEED)
        renter_config = SubmitterConfig(local.url, local.broker_id, renter_seed)
        with (
            _peer("the agents' process", scripted_agents.play, fleet_config) as fleet,
            _peer("the renter's process", submitter.play, renter_config) as renter_peer,
        ):
            began_s = time.monotonic()
            renter_peer.next()
            joined: FleetReport = fleet.next(JOINING_S)
            market = SizedMarket(agents, local, fleet, renter_peer)
            there = _wait_for_offers(local, agents)
            joining_s = time.monotonic() - began_s
            say(
                f"  {there} of {agents} agents have joined in {joining_s:.1f} s; "
                f"broker pid {local.broker.pid}, data in {root}"
            )
            market.play("warm-up", WARM_UP)
            phases = []
            for name, phase in PHASES.items():
                phases.append(market.play(name, phase))
                say(f"    {_line(phases[-1])}")
            figures = MarketFigures(agents, there, joining_s, joined.thrown_out, tuple(phases))
            local.stop()
        done = True
        return figures
    finally:
        local.stop()
        if done:
            shutil.rmtree(root)
        else:
            say(f"  what the broker wrote is kept in {root}")


def _wait_for_offers(local: LocalMarket, agents: int) -> int:
    """Return how many agents stand in the market with their offers: all of them, unless it throws
    them out as fast as they come."""
    with httpx.Client(base_url=local.url, timeout=60) as http:
        deadline_s = time.monotonic() + ALL_OFFERED_S
        while True:
            text = http.get("/metrics").text
            there = min(
                _value_of(text, "sublet_offers_open"), _value_of(text, "sublet_agents_connected")
            )
            if there == agents or time.monotonic() > deadline_s:
                return there
            time.sleep(1.0)


def _value_of(metrics: str, name: str) -> int:
    return next(
        int(float(line.split()[1])) for line in metrics.splitlines() if line.startswith(name)
    )


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
            markets.append(_market(agents, database, idle_beats, say))
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


def _line(one: PhaseFigures) -> str:
    together = Together([one])
    late = "" if one.accepted == one.sent else f" of {one.sent}"
    return (
        f"{one.phase}: {one.accepted}{late} jobs, {one.jobs_a_second:.1f}/s, "
        f"to the order {together.order}; {sum(one.thrown_out.values())} thrown out; "
        f"broker {together.share(lambda p: p.broker_cpu_s):.0%} of a core, "
        f"others {together.share(lambda p: p.others_cpu_s):.0%}"
    )


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
        room = [agents * scripted_agents.DEVICES_EACH for agents in (result.small, result.large)]
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
