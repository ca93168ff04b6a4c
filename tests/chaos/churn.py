"""Churn: jobs run while agents, runs, the broker and its Ray are killed with -9, again and again.

Everything is a process of its own, started as an owner or an operator would. Kills come at seeded
random times; what was killed is started again, agents sometimes only after their jobs' patience.
Nothing is waited for by sleeping: it ends when the kills are done and every job has ended.

Of a run that is killed with -9 nobody can tell who did it, so a job and a renter have only so many
of those for nothing (rules.py of contracts). The jobs are many renters', and which run is killed
keeps to that; what becomes of one too many is shown in tests/service/test_evidence.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from sublet.client import Client, Job
from sublet.demo.local import LocalMarket, LocalMarketError
from sublet.errors import BrokerAway
from sublet_agent.adapters.process.tree import descendants
from sublet_contracts.api import JobView
from sublet_contracts.export import verify_export
from sublet_contracts.rules import FREE_KILLS_A_JOB, FREE_KILLS_A_RENTER_AND_WEEK
from tests.chaos.losses import Dark, Loss, dark_for_all, dark_for_one, explained, lit_ms
from tests.e2e.scenario import EVERY, JOB_SCRIPT, STEPS, undisturbed_weights

AGENTS = 6
RENTERS = 40
AT_ONCE = 4
PACE_S = 0.1
FUNDS_CREDITS = 200
TIMES = ("--heartbeat-ms", "500", "--unknown-after-ms", "1500")
PATIENCE = "5s"
CALM_LIMIT_S = 300.0
LEFT_LIMIT_S = 60.0
WEIGHTS = {"run": 50, "agent": 22, "machine": 15, "broker": 3, "worker": 7, "raylet": 3}
"""What is killed, and how often. machine: an agent and all of its runs at once."""
Say = Callable[[str], None]


class ChurnFailed(AssertionError):
    """A promise didn't hold; the message says which, and where the logs are."""


@dataclass
class Result:
    """What a churn run came to."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    finished: int = 0
    identical: int = 0
    steps: int = 0
    lost_steps: int = 0
    losses: int = 0
    long_losses: list[dict[str, Any]] = field(default_factory=list)
    """Those of more than two intervals, and what was away: nothing is made durable meanwhile."""
    unexplained_losses: int = 0
    recoveries_s: list[float] = field(default_factory=list)
    lost_work_charged_ucr: int = 0
    duplicate_charges: int = 0
    discrepancy_ucr: int = 0
    left_running: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return it for the reliability page."""
        times = sorted(self.recoveries_s) or [0.0]

        def percentile(share: float) -> float:
            return round(times[min(len(times) - 1, int(share * len(times)))], 2)

        return {
            "seed": self.seed,
            "kills": dict(self.kills),
            "jobs": self.jobs,
            "finished": self.finished,
            "identical": self.identical,
            "steps": self.steps,
            "lost_steps": self.lost_steps,
            "losses": self.losses,
            "long_losses": self.long_losses,
            "unexplained_losses": self.unexplained_losses,
            "recoveries": len(self.recoveries_s),
            "recovery_s": {
                "p50": round(statistics.median(times), 2),
                "p95": percentile(0.95),
                "p99": percentile(0.99),
            },
            "lost_work_charged_ucr": self.lost_work_charged_ucr,
            "duplicate_charges": self.duplicate_charges,
            "discrepancy_ucr": self.discrepancy_ucr,
            "left_running": self.left_running,
            "seconds": round(self.seconds, 1),
            "problems": self.problems,
        }


class Churn:
    """One churn run."""

    def __init__(self, root: Path, kills: int, seed: int, say: Say) -> None:
        self.root = root
        self.wanted = kills
        self.say = say
        self.random = random.Random(seed)
        self.result = Result(seed)
        self.market = LocalMarket(root / "market", TIMES)
        self.jobs: list[Job] = []
        self.live: list[Job] = []
        self.clients: list[Client] = []
        self.unseen_kills: Counter[str] = Counter()
        """Kills of runs of which nobody can tell who did it: of each job, and of each renter."""
        self.back_at: dict[str, float] = {}
        """When an agent that was killed is to be started again, by time.monotonic()."""
        self.kills_for_all: list[tuple[str, int]] = []
        """broker, worker, raylet, and when (ms, wall clock, as lines of output have it)"""
        self.away: dict[str, list[tuple[int, int]]] = {}
        """For each agent when it was killed, and when it was started again."""
        self.moves: list[tuple[int, int]] = []
        """See losses.dark_for_all."""
        self._gone_ms: dict[str, int] = {}
        self._durable: dict[str, int] = {}
        self._looked_ms = 0

    def play(self) -> Result:
        """Let it happen. Raises ChurnFailed where a promise didn't hold."""
        began = time.monotonic()
        (self.root / "reference").mkdir(parents=True)
        self.reference = hashlib.sha256(undisturbed_weights(self.root / "reference")).hexdigest()
        try:
            self._begin()
            self._kill_away()
            self._calm()
            self._check()
        finally:
            self.market.stop()
            self._look_for_leftovers()
        self.result.seconds = time.monotonic() - began
        if self.result.problems:
            raise ChurnFailed(f"{'; '.join(self.result.problems[:5])}; logs: {self.market.root}")
        return self.result

    def _begin(self) -> None:
        self.market.start_broker()
        # Short of patience: a broker that is down is asked again by this loop, not by the client.
        for number in range(RENTERS):
            config = self.root / "config" / str(number)
            client = Client(broker=self.market.url, config_dir=config, away_limit_s=2.0)
            client.fund(client.party, FUNDS_CREDITS, operator_key=self.market.operator_key)
            self.clients.append(client)
        for number in range(AGENTS):
            self._start_agent(f"box{number}")
        offers = self.clients[0].offers
        self.market.wait_for(lambda: len(offers().offers) == AGENTS, "all offers")

    def _start_agent(self, name: str) -> None:
        trusted = [part for client in self.clients for part in ("--trust", client.party)]
        self.market.start_agent(name, "--runner", "process", *trusted, "--image-policy", "any")

    # -- what is killed ----------------------------------------------------------------------------

    def _kill_away(self) -> None:
        told = time.monotonic()
        while sum(self.result.kills.values()) < self.wanted:
            self._tend()
            # Not a wait for anything: how thick the kills come is the load.
            time.sleep(self.random.uniform(0.2, 1.2))
            self._kill(self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0])
            if time.monotonic() - told > 10:
                told = time.monotonic()
                self.say(self._line())

    def _line(self) -> str:
        kills = self.result.kills
        parts = ", ".join(f"{kills[name]} {name}" for name in WEIGHTS if kills[name])
        ended = len(self.jobs) - len(self.live)
        return f"  {kills.total()} of {self.wanted} kills ({parts}); {ended} jobs ended"

    def _kill(self, what: str) -> None:
        at_ms = _now_ms()
        done = getattr(self, f"_kill_{what}")()
        if done:
            self.result.kills[what] += 1
            if what in ("broker", "worker", "raylet"):
                self.kills_for_all.append((what, at_ms))

    def _kill_run(self) -> bool:
        names = [name for name in self._names() if self.market.run_processes(agent=name)]
        return bool(names) and self._kill_runs_of(self.random.choice(names))

    def _kill_runs_of(self, agent: str) -> bool:
        """Kill its runs, unless one of their jobs or renters has had all that cost nothing."""
        pids = self.market.run_processes(agent=agent)
        hit = [job for job in self.live if self.market.run_processes(job.id, agent)]
        if any(
            self.unseen_kills[job.id] >= FREE_KILLS_A_JOB
            or self.unseen_kills[job.client.party] >= FREE_KILLS_A_RENTER_AND_WEEK
            for job in hit
        ):
            return False
        self.unseen_kills.update(name for job in hit for name in (job.id, job.client.party))
        return self._kill_pids(pids)

    def _kill_agent(self) -> bool:
        running = [name for name in self._names() if self.market.agents[name].running]
        if len(running) < 2:
            return False
        name = self.random.choice(running)
        self.market.agents[name].kill()
        self._gone_ms[name] = _now_ms()
        # Within the patience its runs are adopted; beyond it they go elsewhere.
        self.back_at[name] = time.monotonic() + self.random.choice((0.0, 1.0, 3.0, 9.0))
        return True

    def _kill_machine(self) -> bool:
        if not self._kill_agent():
            return False
        newest = max(self.back_at, key=lambda name: self.back_at[name])
        if self.market.run_processes(agent=newest) and not self._kill_runs_of(newest):
            self.result.kills["agent"] += 1
            return False
        return True

    def _kill_broker(self) -> bool:
        assert self.market.broker is not None
        if not self.market.run_processes():
            return False  # It has not got over the last one.
        self.market.broker.kill()
        self.market.restart_broker()
        return True

    def _kill_worker(self) -> bool:
        return self._kill_ray("ray::")

    def _kill_raylet(self) -> bool:
        return bool(self.market.run_processes()) and self._kill_ray("raylet/raylet")

    def _kill_ray(self, named: str) -> bool:
        assert self.market.broker is not None
        below = sorted(descendants(self.market.broker.pid)) if self.market.broker.running else []
        found = [pid for pid in below if named in _command_of(pid)]
        return self._kill_pids([self.random.choice(found)] if found else [])

    def _kill_pids(self, pids: list[int]) -> bool:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(pids)

    def _names(self) -> list[str]:
        return sorted(self.market.agents)

    # -- what goes on meanwhile --------------------------------------------------------------------

    def _tend(self) -> None:
        """Start what is due, submit, resume what was paused, sign: as people and services do."""
        now = time.monotonic()
        for name in [name for name, at in self.back_at.items() if at <= now]:
            del self.back_at[name]
            self._bring_back(name)
        with contextlib.suppress(BrokerAway):
            still = []
            for job in self.live:
                view = job.view()
                if self._durable.setdefault(job.id, 0) != view.durable_step:
                    self._durable[job.id] = view.durable_step
                    self.moves.append((self._looked_ms, _now_ms()))
                if view.state == "paused":
                    job.resume()
                if view.state in ("succeeded", "failed", "cancelled"):
                    continue
                job.cosign()
                still.append(job)
            self.live = still
            self._looked_ms = _now_ms()
            if len(self.live) < AT_ONCE and sum(self.result.kills.values()) < self.wanted:
                self._submit()

    def _bring_back(self, name: str) -> None:
        self.away.setdefault(name, []).append((self._gone_ms.pop(name), _now_ms()))
        self._start_agent(name)

    def _submit(self) -> None:
        job = self.clients[len(self.jobs) % RENTERS].run(
            image="local/python",
            command=[
                "python3",
                "/job/training_job.py",
                "--steps",
                str(STEPS),
                "--every",
                str(EVERY),
                "--pace-s",
                str(PACE_S),
                "--out",
                "/out",
            ],
            gpus="cpu",
            max_price="1.00",
            budget="5",
            patience=PATIENCE,
            wait_for_offer=True,
            inputs={str(JOB_SCRIPT): "/job/training_job.py"},
            outputs="/out",
            name=f"job-{len(self.jobs)}",
            memory="256MB",
            disk="256MB",
            cpus=0.5,
        )
        self.jobs.append(job)
        self.live.append(job)

    def _calm(self) -> None:
        self.say(f"{self._line()}; calm: every job has to end")
        deadline = time.monotonic() + CALM_LIMIT_S
        while self.live:
            self._tend()
            if time.monotonic() > deadline:
                says = [f"{job.id[:10]}: {job.view().says}" for job in self.live]
                raise ChurnFailed(f"not ended: {says}; logs: {self.market.root}")
            time.sleep(0.25)
        # Agents that come back late still find runs that went elsewhere, and end them.
        for name in self.back_at:
            self._bring_back(name)
        self.back_at.clear()
        with contextlib.suppress(LocalMarketError):
            self.market.wait_for(lambda: not self.market.run_processes(), "the end of all runs")
        if left := self.market.run_processes():
            self.result.problems.append(f"runs that go on: {left}")

    def _look_for_leftovers(self) -> None:
        """All have been ended as their owners would; nothing may be left, of Ray neither."""
        with contextlib.suppress(LocalMarketError):
            self.market.wait_for(
                lambda: not self.market.processes(),
                "the end of all processes",
                limit_s=LEFT_LIMIT_S,
            )
        left = self.market.processes()
        self.result.left_running = len(left)
        if left:
            self.result.problems.append(f"left running: {left}")

    # -- what must be true -------------------------------------------------------------------------

    def _check(self) -> None:
        result = self.result
        charged = 0
        for job in self.jobs:
            view = job.view()
            result.jobs += 1
            result.finished += view.state == "succeeded"
            charged += self._check_bill(job, view)
            self._check_steps(job, view)
            if view.state != "succeeded":
                result.problems.append(f"{job.name}: {view.state}: {view.says}")
                continue
            target = self.root / "out" / job.name
            job.download(target)
            same = hashlib.sha256((target / "weights.json").read_bytes()).hexdigest()
            result.identical += same == self.reference
            if same != self.reference:
                result.problems.append(f"{job.name}: other weights than undisturbed")
        balances = [client.balance() for client in self.clients]
        left = sum(balance.available_ucr + balance.held_ucr for balance in balances)
        result.discrepancy_ucr = RENTERS * FUNDS_CREDITS * 1_000_000 - left - charged
        if result.discrepancy_ucr:
            result.problems.append(f"receipts and ledger differ by {result.discrepancy_ucr} ucr")
        self._check_audit()

    def _check_bill(self, job: Job, view: JobView) -> int:
        statement = job.statement()
        verdict = verify_export(job.export(), broker=self.market.broker_id)
        if not verdict.holds:
            self.result.problems.append(f"{job.name}: {verdict.problems[0]}")
        if verdict.charged_ucr != view.settled_ucr:
            self.result.problems.append(f"{job.name}: the export says another charge")
        leases = [charge.lease for charge in statement.charges]
        self.result.duplicate_charges += len(leases) - len(set(leases))
        if len(leases) != len(set(leases)):
            self.result.problems.append(f"{job.name}: a lease was charged twice")
        self.result.lost_work_charged_ucr += statement.lost_work_charged_ucr
        if statement.lost_work_charged_ucr:
            self.result.problems.append(f"{job.name}: lost work was charged")
        return verdict.charged_ucr

    def _check_steps(self, job: Job, view: JobView) -> None:
        """Count what was lost, and how long each loss lasted, by what the job printed."""
        runs = {run.epoch: run for run in view.runs}
        reached: dict[int, tuple[int, int]] = {}  # epoch: its last step, and when
        first: dict[tuple[int, int], int] = {}  # (epoch, step): when
        for line in job.logs():
            words = line.text.split()
            if line.stream == "stdout" and len(words) > 1 and words[0] == "step":
                step = int(words[1])
                reached[line.epoch] = (step, line.time_ms)
                first.setdefault((line.epoch, step), line.time_ms)
        self.result.steps += STEPS
        for before, after in pairwise(sorted(reached)):
            step, at_ms = reached[before]
            start = runs[after].start_step
            if step > start:
                due_ms = first.get((before, start + EVERY), at_ms)
                name = runs[before].provider_name
                self._count_loss(Loss(job.name, name, before, step - start, due_ms, at_ms))
            again = first.get((after, start + 1))
            if again is not None:
                self.result.recoveries_s.append(max(0, again - at_ms) / 1000)

    def _count_loss(self, loss: Loss) -> None:
        self.result.losses += 1
        self.result.lost_steps += loss.steps
        if loss.steps > 2 * EVERY:
            self._judge_loss(loss)

    def _judge_loss(self, loss: Loss) -> None:
        away = [
            dark
            for dark in self._darks(loss.agent)
            if dark.from_ms < loss.lost_ms and dark.to_ms > loss.due_ms
        ]
        lit = lit_ms(loss, away)
        self.result.long_losses.append(
            {
                "job": loss.job,
                "epoch": loss.epoch,
                "steps": loss.steps,
                "window_ms": loss.lost_ms - loss.due_ms,
                "lit_ms": lit,
                "away": sorted({dark.what for dark in away}),
            }
        )
        if not explained(loss, away, int(EVERY * PACE_S * 1000)):
            self.result.unexplained_losses += 1
            self.result.problems.append(
                f"{loss.job} lost {loss.steps} steps, {lit} ms of which "
                "were computed while nothing was away"
            )

    def _darks(self, agent: str) -> list[Dark]:
        return [
            *dark_for_all(self.kills_for_all, self.moves),
            *dark_for_one(agent, self.away.get(agent, ())),
        ]

    def _check_audit(self) -> None:
        def gauges() -> dict[str, float]:
            text = httpx.get(f"{self.market.url}/metrics", timeout=30).text
            pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            return {name: float(value) for name, value in pairs if "{" not in name}

        seen = gauges()["sublet_ledger_audits_total"]
        self.market.wait_for(
            lambda: gauges()["sublet_ledger_audits_total"] >= seen + 2, "two audits"
        )
        if gauges()["sublet_ledger_breaches"]:
            self.result.problems.append("the broker's own audit found a breach")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
