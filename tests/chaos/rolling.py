"""A rolling restart under load: SIGTERM and start again, N times in a row.

All the while jobs run and are submitted, their logs are followed, outputs are downloaded, money is
deposited, each by a program of its own that never looks whether the broker is there. No run is
preempted, and nothing that was answered is forgotten.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from sublet.client import Client, Job
from sublet_contracts.api import JobLogLine
from tests.chaos.churn import Say
from tests.chaos.stage import Stage, Work

SHORT = Work(10, 0.02)
AWAY_LIMIT_S = 300.0
STOP_LIMIT_S = 120.0
PAUSE_S = 0.2


class RollingRestart(Stage):
    """One run."""

    def __init__(
        self,
        root: Path,
        seed: int,
        say: Say,
        *,
        times: int = 10,
        patience: str = "20s",
        work: Work = Work(150),  # noqa: B008
        agents: int = 3,
    ) -> None:
        super().__init__(root, seed, say, work=work, patience=patience, agents=agents)
        self.times = times
        self.done = threading.Event()
        self.round = threading.Semaphore(0)
        """One job is submitted for each."""

    def storm(self) -> None:
        """See Stage."""
        self.finished = self.train("to be downloaded", SHORT)
        self.ended(self.finished)
        self.wanted = self.reference(self.finished)
        for number in range(len(self.names)):
            self.train(f"job-{number}")
        running = list(self.jobs)
        self.until_durable(running[1:])
        with ThreadPoolExecutor() as pool:
            loops = [
                pool.submit(loop, self._client())
                for loop in (self._deposit, self._download, self._submit)
            ]
            follows = [pool.submit(self._follow, self._client(), job) for job in running[1:]]
            try:
                for number in range(self.times):
                    self._restart(number)
                    self._check_alive(loops)
                self.round.release()
            finally:
                self.done.set()
            for loop in loops:
                loop.result(AWAY_LIMIT_S)
            self.all_ended()
            for job, follow in zip(running[1:], follows, strict=True):
                told = [(line.cursor, line.text) for line in follow.result(AWAY_LIMIT_S)]
                kept = [(line.cursor, line.text) for line in job.logs()]
                self.need(told == kept, f"{job.name}: who followed its log was told something else")
        known = {view.id for view in self.client.jobs(limit=500).jobs}
        forgotten = [job.name for job in self.jobs if job.id not in known]
        self.need(not forgotten, f"forgotten: {forgotten}")
        for job in self.jobs:
            self.need(len(job.view().runs) == 1, f"{job.name} was preempted")

    def _restart(self, number: int) -> None:
        broker = self.market.broker
        assert broker is not None
        assert broker.process is not None
        self.round.release()
        broker.stop(STOP_LIMIT_S)
        self.need(broker.process.returncode == 0, f"SIGTERM: exit {broker.process.returncode}")
        self.restart_broker()
        self.connected(len(self.names))
        self.hit("restarts by SIGTERM")
        self.say(f"  {number + 1} of {self.times} restarts; {dict(self.facts.injected)}")

    def _check_alive(self, loops: list[Future[None]]) -> None:
        for loop in loops:
            if loop.done():
                loop.result()

    def _client(self) -> Client:
        return self.client.copy(AWAY_LIMIT_S)

    # -- what goes on meanwhile, each in a thread --------------------------------------------------

    def _deposit(self, client: Client) -> None:
        def once() -> None:
            client.fund(client.party, 1, operator_key=self.market.operator_key)
            self.funds_ucr += 1_000_000
            self.hit("deposits")

        self._again_and_again(once)

    def _download(self, client: Client) -> None:
        job = Job(client, self.finished.id, self.finished.view())
        target = self.root / "downloads"

        def once() -> None:
            job.download(target)
            got = hashlib.sha256((target / "weights.json").read_bytes()).hexdigest()
            self.need(got == self.wanted, "a download brought other bytes")
            self.hit("downloads")

        self._again_and_again(once)

    def _again_and_again(self, act: Callable[[], None]) -> None:
        while not self.done.is_set():
            act()
            self.done.wait(PAUSE_S)

    def _submit(self, client: Client) -> None:
        while True:
            self.round.acquire()
            if self.done.is_set():
                return
            self.train(f"submitted-{self.facts.injected['submissions']}", SHORT)
            self.hit("submissions")

    def _follow(self, client: Client, job: Job) -> list[JobLogLine]:
        return list(Job(client, job.id, job.view()).logs(follow=True))
