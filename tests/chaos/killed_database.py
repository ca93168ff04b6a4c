"""A broker on PostgreSQL whose server dies: its sessions by kill -9, and the server itself, which
stays away for longer than the jobs' patience. fsync is on."""

from __future__ import annotations

import time
from pathlib import Path

import httpx

from tests.chaos.churn import Say
from tests.chaos.postgres import PostgresServer
from tests.chaos.stage import TIMES, Stage, Work


class KilledDatabase(Stage):
    """One run. `kills`: how often all sessions are killed, and how often the server."""

    def __init__(
        self,
        root: Path,
        seed: int,
        say: Say,
        *,
        kills: int = 5,
        away_s: float = 30.0,
        patience: str = "20s",
        work: Work = Work(600),  # noqa: B008
        agents: int = 3,
    ) -> None:
        super().__init__(root, seed, say, work=work, patience=patience, agents=agents)
        self.kills = kills
        self.away_s = away_s
        """How long the server stays away, each second time; the other times it's back at once."""

    def start(self) -> None:
        """See Stage."""
        self.server = PostgresServer(self.root / "postgres")
        self.market.broker_arguments = (*TIMES, "--database", self.server.url)
        super().start()

    def storm(self) -> None:
        """See Stage."""
        for name in self.names:
            self.train(f"at {name}")
        self.until_durable()
        for number in range(self.kills):
            self.hit("sessions killed", self.server.kill_sessions())
            self.say(f"  sessions killed, {number + 1} of {self.kills}")
            self._back()
            self.server.kill()
            self.hit("servers killed")
            if number % 2 == 0:
                self._told()
                time.sleep(self.away_s)  # the fault itself
                self.hit("servers away for long")
            self.server.start()
            self.say(f"  server killed, {number + 1} of {self.kills}")
            self._back()
        self.all_ended()
        for job in self.jobs:
            self.need(len(job.view().runs) == 1, f"{job.name} was given up for the database's loss")

    def _told(self) -> None:
        """Who asks meanwhile is told to come again, not that it's a mistake."""
        answer = httpx.get(f"http://{self.listens}/readyz", timeout=60)
        self.need(answer.status_code == 503, f"/readyz says {answer.status_code}")

    def _back(self) -> None:
        def ready() -> bool:
            return httpx.get(f"http://{self.listens}/readyz", timeout=60).status_code == 200

        self.soon(ready, "the broker to be ready again", 120)
        self.goes_on()

    def stop(self) -> None:
        """See BadMarket."""
        try:
            super().stop()
        finally:
            if hasattr(self, "server"):
                self.server.stop()
