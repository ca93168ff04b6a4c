"""Disks that fail: the file system of the broker, then that of a provider, becomes read-only in
mid-run, as ext4 does on an error. An operator ends the process, checks the disk, starts it again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx

from sublet.errors import BrokerAway
from tests.chaos.churn import Say
from tests.chaos.loop_disk import LoopDisk
from tests.chaos.stage import Stage, Work

BROKER_BYTES = 256 << 20
AGENT_BYTES = 512 << 20
STOP_LIMIT_S = 120.0


class FailingDisks(Stage):
    """One run."""

    def __init__(
        self,
        root: Path,
        seed: int,
        say: Say,
        *,
        rounds: int = 2,
        patience: str = "20s",
        work: Work = Work(900),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(root, seed, say, agents=2, work=work, patience=patience)
        self.rounds = rounds
        self.disks: dict[str, LoopDisk] = {}

    def start(self) -> None:
        """See Stage."""
        for name, size in (("broker", BROKER_BYTES), ("box0", AGENT_BYTES)):
            image = self.root / "images" / name
            self.disks[name] = LoopDisk(image, self.market.root / name, size)
        super().start()
        # The operator's own copy, on a disk that works.
        self.key = Path(shutil.copy2(self.market.operator_key, self.root / "operator.key"))

    def start_agent(self, name: str) -> None:
        """See Stage. A small disk isn't offered unless its owner says so."""
        self.agent(name, "--image-policy", "any", "--disk", "300MB", region="here")

    def storm(self) -> None:
        """See Stage."""
        for number in range(self.rounds):
            jobs = [self.train(f"{name} {number}") for name in self.names]
            self.until_durable(jobs)
            self._broker_fails()
            self.goes_on(jobs)
            for job in jobs:
                self.need(len(job.view().runs) == 1, "the broker's disk cost a job its machine")
            self.all_ended()
            # An agent that has nothing to write wouldn't notice.
            self.until_durable([self.train(f"{name} {number} again") for name in self.names])
            self._agent_fails()
            self.all_ended()

    def _broker_fails(self) -> None:
        broker = self.market.broker
        assert broker is not None
        steps = [self.market.last_step(name) for name in self.names]
        self.disks["broker"].fail()
        self.hit("the broker's disk failed")
        ready = f"http://{self.listens}/readyz"
        self.soon(lambda: httpx.get(ready, timeout=60).status_code == 503, "the broker's alarm")
        try:
            self.client.fund(self.client.party, 1, operator_key=self.key)
        except BrokerAway:
            self.hit("refused meanwhile")
        else:
            self.need(False, "a deposit was taken that can't be kept")
        self.soon(
            lambda: all(
                self.market.last_step(name) >= min(step + 3, self.work.steps)
                for name, step in zip(self.names, steps, strict=True)
            ),
            "steps that go on",
        )
        broker.stop(STOP_LIMIT_S)
        self.disks["broker"].mend()
        self.restart_broker()
        self.connected(len(self.names))
        self.say("  the broker's disk failed and was mended")

    def _agent_fails(self) -> None:
        self.disks["box0"].fail()
        self.hit("a provider's disk failed")
        agent = self.market.agents["box0"]
        self.soon(lambda: not agent.running or "[Errno" in agent.log_tail(), "its agent's alarm")
        self.say("  a provider's disk failed: " + agent.log_tail(2))
        agent.stop(STOP_LIMIT_S)
        self.disks["box0"].kill_users()
        self.disks["box0"].mend()
        self.start_agent("box0")

    def stop(self) -> None:
        """See BadMarket."""
        try:
            super().stop()
        finally:
            for disk in self.disks.values():
                disk.close()
