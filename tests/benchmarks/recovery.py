"""How long a job stands still when its machine dies, and when its owner takes it back.

Real processes throughout: one broker with default settings (a heartbeat every 3 s, patience 20 s),
agents through the command line, runs in Docker where an engine answers. Several lanes run at once,
to be done in minutes. What counts is the time that the runner stamped on the first output line of a
step that the job hadn't made durable before, minus the time of the kill: one clock, one machine.
"""

import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sublet.client import Client
from sublet.demo.local import LocalMarket
from tests.benchmarks.figures import Spread
from tests.benchmarks.lane import Lane, Round
from tests.benchmarks.machine import Load, LoadMeter, load_before
from tests.services import missing

RECOVERY_ROUNDS = 20
RECOVERY_LIMIT_S = 25.0
RECLAIM_ROUNDS = 10
RECLAIM_LIMIT_S = 5.0
LANES = 4
HEARTBEAT_S = 3.0
FUNDS = 50
SEED = 20
Say = Callable[[str], None]


@dataclass(frozen=True)
class Recoveries:
    """All rounds of one kind, and the machine's load meanwhile."""

    what: str
    runner: str
    rounds: tuple[Round, ...]
    counted_s: tuple[float, ...]
    """The seconds that the limit is about, per round."""
    limit_s: float
    before: Load
    during: Load
    ready_s: float
    """From the broker's start until all lanes' jobs ran: start-up of broker, Ray and agents."""

    @property
    def spread(self) -> Spread:
        """Of what the limit is about."""
        return Spread.of(self.counted_s)

    @property
    def holds(self) -> bool:
        """Whether the limit holds."""
        return self.spread.p95 <= self.limit_s


def measure_recovery(
    say: Say, rounds: int = RECOVERY_ROUNDS, runner: str = "auto", lanes: int = LANES
) -> Recoveries:
    """kill -9 the agent and its run, `rounds` times. Raises RoundFailed, LocalMarketError."""

    def kill(lane: Lane) -> Callable[[str], None]:
        def disturb(holder: str) -> None:
            lane.market.agents[holder].kill()
            lane.market.kill_run(lane.running_job.id, holder, lane.runner)

        return disturb

    return _measure(
        "recovery",
        say,
        rounds,
        runner,
        lanes,
        kill,
        counted=lambda round: round.total_s,
        limit_s=RECOVERY_LIMIT_S,
        notice=False,
    )


def measure_reclaim(
    say: Say, rounds: int = RECLAIM_ROUNDS, runner: str = "auto", lanes: int = LANES
) -> Recoveries:
    """Reclaim the machine with a minute's grace. Raises RoundFailed, LocalMarketError."""

    def reclaim(lane: Lane) -> Callable[[str], None]:
        def disturb(holder: str) -> None:
            state = str(lane.market.root / holder)
            lane.market.command("provider", "reclaim", "--grace", "60s", "--state", state)

        return disturb

    return _measure(
        "reclaim",
        say,
        rounds,
        runner,
        lanes,
        reclaim,
        counted=lambda round: round.rest_s,
        limit_s=RECLAIM_LIMIT_S,
        notice=True,
    )


def _measure(
    what: str,
    say: Say,
    rounds: int,
    runner: str,
    lanes: int,
    disturbance: Callable[[Lane], Callable[[str], None]],
    *,
    counted: Callable[[Round], float],
    limit_s: float,
    notice: bool,
) -> Recoveries:
    runner, image = _runner(runner)
    lanes = min(lanes, rounds)
    before = load_before()
    say(f"{what}: {rounds} rounds on {lanes} lanes, runner {runner}; before: {before}")
    began = time.monotonic()
    with _lanes(runner, image, lanes, say) as made:
        ready_s = time.monotonic() - began
        say(f"  all jobs run, {ready_s:.1f} s after the broker's start")
        meter = LoadMeter()
        finished = 0
        counting = threading.Lock()

        def play(number: int) -> list[Round]:
            nonlocal finished
            lane, mine = made[number], []
            chance = random.Random(SEED + number)
            for _ in range(number, rounds, lanes):
                round = lane.play(
                    chance.uniform(0.0, HEARTBEAT_S), disturbance(lane), notice=notice
                )
                mine.append(round)
                with counting:
                    finished += 1
                    say(f"  {finished:2d}/{rounds} {_line(round)}")
            return mine

        with ThreadPoolExecutor(lanes) as pool:
            played = [r for mine in pool.map(play, range(lanes)) for r in mine]
        during = meter.load()
    return Recoveries(
        what, runner, tuple(played), tuple(map(counted, played)), limit_s, before, during, ready_s
    )


def _runner(asked: str) -> tuple[str, str]:
    """Return the runner to use and its image, made or cached before anything is measured."""
    if asked == "docker" or (asked == "auto" and missing("docker") is None):
        from tests.images import base_image

        return "docker", base_image()
    return "process", "local/python"


@contextmanager
def _lanes(runner: str, image: str, count: int, say: Say) -> Iterator[list[Lane]]:
    """Start a broker and `count` lanes whose jobs run; stop everything afterwards.

    What they wrote is deleted, except when something went wrong: then its logs are kept.
    """
    root = Path(tempfile.mkdtemp(prefix="sublet-bench-"))
    market = LocalMarket(root)
    clients: list[Client] = []
    done = False
    try:
        market.start_broker()
        say("  the broker is ready")
        clients = [Client(broker=market.url, config_dir=root / "renter") for _ in range(count + 1)]
        owner = clients.pop()
        owner.fund(owner.party, FUNDS, operator_key=market.operator_key)
        owner.close()
        lanes = [
            Lane(f"lane{i}", market, client, runner, image, say) for i, client in enumerate(clients)
        ]
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(Lane.begin, lanes))
            list(pool.map(Lane.until_durable, lanes))
        yield lanes
        done = True
    finally:
        for client in clients:
            client.close()
        market.stop()
        if done:
            shutil.rmtree(root)
        else:
            say(f"  what broker and agents wrote is kept in {root}")


def _line(round: Round) -> str:
    return (
        f"{round.lane}: {round.total_s:5.2f} s to the first new step = "
        f"{round.detection_s:5.2f} until it was known + {round.rest_s:4.2f} "
        f"(match {round.match_s:4.2f}, restore and start {round.start_s:4.2f}, "
        f"first step {round.step_s:4.2f}); {round.steps_lost} steps lost"
        f"{'' if round.prepared else '; successor not prepared'}"
    )


def report(result: Recoveries) -> list[str]:
    """Return the lines to print."""
    rounds = result.rounds
    rows: Sequence[tuple[str, Callable[[Round], float]]] = (
        ("from the disturbance to the first new step", lambda r: r.total_s),
        ("  detection: until the broker knew", lambda r: r.detection_s),
        ("  the rest", lambda r: r.rest_s),
        ("    match", lambda r: r.match_s),
        ("    sign, restore, start", lambda r: r.start_s),
        ("    first step", lambda r: r.step_s),
    )
    width = max(len(name) for name, _ in rows)
    lines = [
        f"  {name.ljust(width)}   {Spread.of([figure(r) for r in rounds])}" for name, figure in rows
    ]
    verdict = "holds" if result.holds else "DOES NOT HOLD"
    subject = (
        "kill -9 to first new step"
        if result.what == "recovery"
        else ("end of the drain to first new step")
    )
    lines.append(
        f"  {subject}: p95 of {len(rounds)} is {result.spread.p95:.2f} s "
        f"(at most {result.limit_s:.0f} s: {verdict}); runner {result.runner}, {result.during}"
    )
    return lines
