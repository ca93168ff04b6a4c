"""One market of a given size, in real processes: a broker, its agents, and a renter who submits."""

import multiprocessing
import os
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from tests.benchmarks.machine import Load, LoadMeter
from tests.benchmarks.scripted_agents import FleetConfig, FleetReport
from tests.benchmarks.submitter import Phase, PhaseReport, SubmitterConfig

WARM_UP = Phase(jobs=40, connections=4, limit_s=30)
FUNDS = 1_000_000
ALL_ORDERED_S = 60.0
AT_REST_S = 60.0
ALL_OFFERED_S = 120.0
JOINING_S = 600.0
ANSWER_S = 300.0
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
    thrown_out_before: dict[str, int]
    """While they joined, and in the warm-up."""
    phases: tuple[PhaseFigures, ...]


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
    before: Counter[str] = field(default_factory=Counter)
    """Connections that ended outside of the phases that are measured."""

    def play(self, name: str, phase: Phase) -> PhaseFigures:
        """Play a phase in a market at rest, wait for its orders, and return its figures."""
        self._wait_for_rest()
        self.before.update(self.fleet.ask("begin").thrown_out)
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

    def _wait_for_rest(self) -> None:
        """What an earlier phase left to do is none of the next one's times."""
        deadline_s = time.monotonic() + AT_REST_S
        while (report := self.fleet.ask("report")).busy:
            self.before.update(report.thrown_out)
            if time.monotonic() > deadline_s:
                raise LocalMarketError(f"{report.busy} runs or messages still open, idle or not")
            time.sleep(0.2)
        self.before.update(report.thrown_out)

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


def play_market(
    agents: int, phases: Mapping[str, Phase], database: str, idle_beats: int, say: Say
) -> MarketFigures:
    """Play one market from its broker's start to its end."""
    if database:
        with _database(database) as url:
            return _market_on(agents, phases, ("--database", url), idle_beats, say)
    return _market_on(agents, phases, (), idle_beats, say)


def _market_on(
    agents: int, phases: Mapping[str, Phase], arguments: Sequence[str], idle_beats: int, say: Say
) -> MarketFigures:
    root = Path(tempfile.mkdtemp(prefix="sublet-bench-"))
    local = LocalMarket(root, broker_arguments=arguments)
    done = False
    try:
        local.start_broker()
        assert local.broker is not None
        key = SigningKey.generate()
        with closing(Client(broker=local.url, config_dir=root / "owner", key=key)) as owner:
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
            market.before.update(joined.thrown_out)
            market.before.update(market.play("warm-up", WARM_UP).thrown_out)
            played = []
            for name, phase in phases.items():
                played.append(market.play(name, phase))
                say(f"    {line_of(played[-1])}")
            figures = MarketFigures(agents, there, joining_s, dict(market.before), tuple(played))
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


def line_of(one: PhaseFigures) -> str:
    together = Together([one])
    late = "" if one.accepted == one.sent else f" of {one.sent}"
    return (
        f"{one.phase}: {one.accepted}{late} jobs, {one.jobs_a_second:.1f}/s, "
        f"to the order {together.order}; {sum(one.thrown_out.values())} thrown out; "
        f"broker {together.share(lambda p: p.broker_cpu_s):.0%} of a core, "
        f"others {together.share(lambda p: p.others_cpu_s):.0%}"
    )
