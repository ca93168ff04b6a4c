"""Partitions: broker and agents in network namespaces of their own, and cables that are taken out.

Shorter than a job's patience: no recovery. Longer: exactly one, and the machine that comes back is
a zombie whose writes are refused and which is not paid for what it did meanwhile. One-way, either
way: the same.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sublet.client import Job
from sublet.demo.local import LocalMarket
from sublet_agent.adapters.workspace.transfer import StaleEpoch, Transfer
from sublet_contracts.keys import SigningKey
from sublet_contracts.tree import OnChunk, ScannedTree, scan_tree
from tests.chaos.churn import Say
from tests.chaos.namespaces import Networks, Way
from tests.chaos.stage import Stage, Work

LONG = Work(300)
"""It computes on while its machine is cut off."""
HELD = Work(40, hold_at=22)
"""Its first run doesn't end by itself."""
PATIENT, IMPATIENT = "300s", "5s"


class ScatteredMarket(LocalMarket):
    """Its broker and its agents have namespaces of their own."""

    networks: Networks

    def within(self, name: str) -> Sequence[str]:
        """See LocalMarket."""
        return self.networks.within(name)

    def start_broker(self, listen: str = "") -> None:
        """See LocalMarket."""
        super().start_broker(listen or f"{self.networks.address('broker')}:0")


class Partitions(Stage):
    """One run. `ways`: which partitions that aren't whole are played, too."""

    def __init__(
        self,
        root: Path,
        seed: int,
        say: Say,
        *,
        ways: Sequence[Way] = (),
        rounds: int = 1,
        work: Work = LONG,
        agents: int = 3,
    ) -> None:
        super().__init__(root, seed, say, agents=agents, work=work)
        self.networks = Networks()
        self.ways = ways
        self.rounds = rounds

    def start(self) -> None:
        """See Stage."""
        for name in ("broker", *self.names):
            self.networks.add(name)
        market = ScatteredMarket(self.root / "market", self.broker_arguments)
        market.networks = self.networks
        self.market = market
        super().start()

    def storm(self) -> None:
        """See Stage."""
        for number in range(self.rounds):
            self._blip(number, "a short partition", self.networks.cut, self.networks.heal)
            self._loss(number, "a long partition", self.networks.cut, self.networks.heal)
            for way in self.ways:

                def block(name: str, way: Way = way) -> None:
                    self.networks.block(name, way)

                def unblock(name: str, way: Way = way) -> None:
                    self.networks.unblock(name, way)

                self._blip(number, f"short - it {way}", block, unblock)
                self._loss(number, f"long - it {way}", block, unblock)

    def _blip(
        self, number: int, what: str, cut: Callable[[str], None], heal: Callable[[str], None]
    ) -> None:
        """Cut off a job's machine until that is noticed."""
        job = self.train(f"{what} {number}", patience=PATIENT)
        name = self._holder(job)
        cut(name)
        self.hit(what)
        self.until(job, lambda view: view.runs[-1].run_state == "unknown", "its silence")
        heal(name)
        self.say(f"  {what} of {name}")
        step = job.view().durable_step
        self.until_newer(job, step)
        view = self.until(job, lambda view: view.state == "succeeded", "its end", 240)
        self.need(len(view.runs) == 1, f"{what}: {view.name} was given up")

    def _loss(
        self, number: int, what: str, cut: Callable[[str], None], heal: Callable[[str], None]
    ) -> None:
        """Cut off a job's machine until it goes on elsewhere."""
        job = self.train(f"{what} {number}", HELD, patience=IMPATIENT)
        name = self._holder(job)
        cut(name)
        self.hit(what)
        self.until(job, lambda view: len(view.runs) == 2, "its next run", 240)
        # Who isn't heard may still hear that it's over.
        self.hit("zombies that computed on", bool(self.market.run_processes(job.id, name)))
        heal(name)
        self.say(f"  {what} of {name}")
        self._refused(job, name)
        self.soon(lambda: not self.market.run_processes(job.id, name), "the zombie's end", 120)
        view = self.until(job, lambda view: view.state == "succeeded", "its end", 240)
        self.need(
            [run.reason for run in view.runs][:1] == ["provider_lost"] and view.recoveries == 1,
            f"{what}: {[run.reason for run in view.runs]}, not one loss",
        )
        first, second = view.runs
        self.need(first.provider != second.provider, f"{what}: it went on at the same machine")
        self.need(
            first.payable_device_ms <= first.cum_device_ms and first.durable_step <= HELD.hold_at,
            f"{what}: the zombie is paid",
        )

    def _holder(self, job: Job) -> str:
        view = self.until(job, lambda view: view.durable_step > 0, "a durable step")
        return view.runs[-1].provider_name

    def _refused(self, job: Job, name: str) -> None:
        """Send as the zombie would: content under the epoch that it had."""
        key = SigningKey.load_or_create(self.market.root / name / "key")
        folder = self.root / "zombie"
        folder.mkdir(exist_ok=True)
        (folder / "step").write_text(f"{job.id} was never at this step")
        transfer = Transfer(
            self.market.url, key, lambda: self.market.broker_id, lambda: time.time_ns() // 1_000_000
        )
        try:
            read = functools.partial(_read, folder)
            transfer.upload(job.id, 1, read, threading.Event())
        except StaleEpoch:
            self.hit("zombies' writes refused")
        else:
            self.need(False, "a zombie's write was taken")
        finally:
            transfer.close()

    def stop(self) -> None:
        """See BadMarket."""
        try:
            super().stop()
        finally:
            self.networks.close()


def _read(folder: Path, on_chunk: OnChunk) -> ScannedTree:
    return scan_tree(folder, max_bytes=1 << 20, on_chunk=on_chunk)
