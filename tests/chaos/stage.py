"""The stage of a storm: a market of real processes, jobs on it, and what must be true at the end.

The jobs train a model and print each step, so that a result that differs by one step, and a line
of output that is missing or comes twice, are seen.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from sublet.client import Job
from sublet_contracts.api import JobView
from sublet_contracts.ckpt_helper_install import write_helper
from tests.chaos.churn import ChurnFailed, Say
from tests.e2e.bad_market import ENDED, FUNDS_CREDITS, BadMarket
from tests.e2e.scenario import JOB_SCRIPT

EVERY = 5
TIMES = ("--heartbeat-ms", "500", "--unknown-after-ms", "1500")
END_LIMIT_S = 300.0


class StormFailed(ChurnFailed):
    """A promise didn't hold; the message says which."""


@dataclass
class Facts:
    """What a storm came to."""

    seed: int
    injected: Counter[str] = field(default_factory=Counter)
    """What was done to the market, and how often."""
    jobs: int = 0
    finished: int = 0
    identical: int = 0
    recoveries: int = 0
    lines: int = 0
    """Of the jobs' output, each there once and in order."""
    lost_work_charged_ucr: int = 0
    duplicate_charges: int = 0
    discrepancy_ucr: int = 0
    left_running: int = 0
    notes: dict[str, float | str] = field(default_factory=dict)
    """What only this storm counts."""
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """Return it for the reliability page."""
        return {**vars(self), "injected": dict(self.injected), "seconds": round(self.seconds, 1)}


@dataclass(frozen=True)
class Work:
    """What each job computes."""

    steps: int = 60
    pace_s: float = 0.1
    hold_at: int = 0
    """The step at which a first run waits until it's asked to stop, or lost; 0: none."""

    def command(self, out: str = "/out", script: str = "/job/training_job.py") -> list[str]:
        """Return the job's arguments."""
        return [
            script,
            "--steps",
            str(self.steps),
            "--every",
            str(EVERY),
            "--pace-s",
            str(self.pace_s),
            "--hold-at",
            str(self.hold_at),
            "--out",
            out,
        ]

    def undisturbed(self, folder: Path) -> str:
        """Return the SHA-256 of the weights that it has without any market."""
        write_helper(folder / "helper")
        (folder / "checkpoint").mkdir()
        hurried = Work(self.steps, 0.0).command(str(folder / "out"), str(JOB_SCRIPT))
        environment = {
            **os.environ,
            "PYTHONPATH": str(folder / "helper"),
            "SUBLET_CHECKPOINT_DIR": str(folder / "checkpoint"),
        }
        subprocess.run(
            [sys.executable, *hurried], check=True, env=environment, stdout=subprocess.DEVNULL
        )
        return hashlib.sha256((folder / "out" / "weights.json").read_bytes()).hexdigest()


class Stage(BadMarket):
    """A broker, agents, a renter, jobs."""

    def __init__(
        self,
        root: Path,
        seed: int,
        say: Say,
        *,
        agents: int = 3,
        patience: str = "60s",
        work: Work = Work(),
        broker_arguments: Sequence[str] = TIMES,
    ) -> None:
        super().__init__(root, broker_arguments)
        self.say = say
        self.names = [f"box{number}" for number in range(agents)]
        self.patience = patience
        self.work = work
        self.facts = Facts(seed)
        self.funds_ucr = FUNDS_CREDITS * 1_000_000
        self._works: dict[str, Work] = {}
        self._references: dict[Work, str] = {}
        self._began_s = time.monotonic()

    def open(self) -> None:
        """Start everything."""
        self.start()
        for name in self.names:
            self.start_agent(name)
        self.offered(*self.names)

    def start_agent(self, name: str) -> None:
        """Start an agent, or start it again with the same state."""
        self.agent(name, "--image-policy", "any", region="here")

    def train(self, name: str, work: Work | None = None, **changes: object) -> Job:
        """Submit a job that trains."""
        work = work or self.work
        command = ["python3", "-u", *work.command()]
        options: dict[str, object] = {
            "name": name, "inputs": {str(JOB_SCRIPT): "/job/training_job.py"}, "outputs": "/out",
            "patience": self.patience, "wait_for_offer": True, **changes,
        }  # fmt: skip
        job = self.submit("here", command, **options)
        self._works[job.id] = work
        return job

    def reference(self, job: Job) -> str:
        """Return the SHA-256 of the weights that an undisturbed run of the job has."""
        work = self._works[job.id]
        if work not in self._references:
            folder = self.root / f"reference-{len(self._references)}"
            folder.mkdir(parents=True)
            self._references[work] = work.undisturbed(folder)
        return self._references[work]

    def until_durable(self, jobs: Sequence[Job] = (), step: int = EVERY) -> None:
        """Wait until each of `jobs` (all) has a durable checkpoint at `step` or later."""
        for job in jobs or self.jobs:
            self.until(job, lambda view: view.durable_step >= step, f"a durable step {step}")

    def start(self) -> None:
        """See BadMarket."""
        super().start()
        self.listens = self.market.url.rsplit("/", 1)[-1]

    def restart_broker(self) -> None:
        """Start the broker again at its port, whatever port others use to reach it."""
        url = self.market.url
        self.market.start_broker(self.listens)
        self.market.url = url

    def gauges(self) -> Mapping[str, float]:
        """See BadMarket; asks the broker directly."""
        text = httpx.get(f"http://{self.listens}/metrics", timeout=60).text
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs if "{" not in name}

    def connected(self, count: int) -> None:
        """Wait until so many agents are connected."""
        self.soon(
            lambda: self.gauges()["sublet_agents_connected"] == count,
            f"{count} connected agents",
            120,
        )

    def goes_on(self, jobs: Sequence[Job] = ()) -> None:
        """Wait until each running job has got on since now, or has ended."""
        for job in jobs or self.jobs:
            now = job.view()
            if now.state == "running":
                # What is under way arrives in any case: one more than the next has to come.
                self.until_newer(job, now.durable_step + EVERY)

    def until_newer(self, job: Job, step: int) -> None:
        """Wait until a job has a durable checkpoint beyond `step`, or has succeeded."""
        self.until(
            job,
            lambda view: view.durable_step > step or view.state == "succeeded",
            f"a durable step beyond {step}",
            END_LIMIT_S,
        )

    # -- the end -----------------------------------------------------------------------------------

    def all_ended(self, limit_s: float = END_LIMIT_S) -> None:
        """Wait until all jobs have ended, signing receipts meanwhile as their renter's service
        would."""
        deadline = time.monotonic() + limit_s
        waiting = list(self.jobs)
        while waiting:
            waiting = [job for job in waiting if job.view().state not in ENDED]
            for job in waiting:
                job.cosign()
            if time.monotonic() > deadline:
                raise StormFailed(f"not ended: {[job.view().says for job in waiting]}")
            time.sleep(0.25)

    def judge(self) -> Facts:
        """Check every promise, once all jobs have ended. Raises AssertionError."""
        facts = self.facts
        charged_ucr = 0
        for job in self.jobs:
            view = self.ended(job)
            facts.jobs += 1
            assert view.state == "succeeded", f"{view.name}: {view.state}: {view.says}"
            facts.finished += 1
            self._judge_result(job)
            facts.lines += self._judge_log(job, view)
            facts.recoveries += view.recoveries
            statement = job.statement()
            leases = [charge.lease for charge in statement.charges]
            facts.duplicate_charges += len(leases) - len(set(leases))
            facts.lost_work_charged_ucr += statement.lost_work_charged_ucr
            charged_ucr += statement.charged_ucr
        balance = self.client.balance()
        left_ucr = balance.available_ucr + balance.held_ucr
        facts.discrepancy_ucr = self.funds_ucr - left_ucr - charged_ucr
        assert facts.discrepancy_ucr == 0, "statements and balance differ"
        assert facts.duplicate_charges == 0, "a lease was charged twice"
        self._judge_audit()
        self.soon(lambda: not self.market.run_processes(), "the end of all runs")
        facts.seconds = time.monotonic() - self._began_s
        return facts

    def _judge_result(self, job: Job) -> None:
        target = self.root / "out" / job.id
        job.download(target)
        same = hashlib.sha256((target / "weights.json").read_bytes()).hexdigest()
        assert same == self.reference(job), f"{job.name}: other weights than undisturbed"
        self.facts.identical += 1

    def _judge_log(self, job: Job, view: JobView) -> int:
        """Each run's output is there from its first line, no line twice, none left out: whole for
        the last run, and up to where it was cut off for one that was lost."""
        wanted: dict[int, list[str]] = {}
        for run in view.runs:
            steps = range(run.start_step + 1, self._works[job.id].steps + 1)
            wanted[run.epoch] = [
                f"starting at step {run.start_step}",
                *(f"step {n}" for n in steps),
            ]
        last = view.runs[-1].epoch
        wanted[last].append("done")
        cursor = -1
        printed: dict[int, list[str]] = {epoch: [] for epoch in wanted}
        losses: dict[str, str] = {}
        for line in job.logs():
            assert line.cursor > cursor, f"{job.name}: a line came twice"
            cursor = line.cursor
            if line.stream != "stdout":
                continue
            head, _, loss = line.text.partition(" loss ")
            printed[line.epoch].append(head)
            # Whoever computes a step comes to the same.
            assert losses.setdefault(head, loss) == loss, f"{job.name}: {head} came out otherwise"
        for epoch, lines in printed.items():
            whole = wanted[epoch]
            assert lines == whole[: len(lines)], f"{job.name}, epoch {epoch}: {lines}"
        assert printed[last] == wanted[last], f"{job.name}: its last lines are missing"
        return sum(len(lines) for lines in printed.values())

    def _judge_audit(self) -> None:
        audits = self.gauges()["sublet_ledger_audits_total"]
        # One that had begun before may have read older books.
        self.soon(
            lambda: self.gauges()["sublet_ledger_audits_total"] >= audits + 2, "two audits", 120
        )
        gauges = self.gauges()
        assert gauges["sublet_ledger_breaches"] == 0
        assert gauges["sublet_ledger_discrepancy_microcredits"] == 0

    # -- storms ------------------------------------------------------------------------------------

    def play(self) -> Facts:
        """Let it happen. Raises AssertionError, of which StormFailed is one, LocalMarketError."""
        try:
            self.open()
            self.storm()
            self.all_ended()
            return self.judge()
        finally:
            self.stop()

    def storm(self) -> None:
        """Submit jobs and do what is to be survived."""
        raise NotImplementedError

    def hit(self, what: str, times: int = 1) -> None:
        """Count what was injected."""
        self.facts.injected[what] += times

    def need(self, condition: object, what: str) -> None:
        """Raise StormFailed unless `condition` holds."""
        if not condition:
            raise StormFailed(what)
