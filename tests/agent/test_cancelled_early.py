"""A job that is cancelled before it runs is over at once, whatever the machine is busy with."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from sublet_agent.adapters.session.disk_reserve import Reserve
from sublet_agent.adapters.session.journal import Journal
from sublet_agent.adapters.session.log_spool import Spool
from sublet_agent.adapters.shell import Shell
from sublet_agent.adapters.workspace.workspace import Workspace
from sublet_agent.core import events
from sublet_agent.core.run_phases import RunPhase
from sublet_agent.core.runner_port import ResolvedImage, RunStatus
from sublet_contracts.documents import Receipt, read_document
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import Order, ReceiptIssued, RunChanged
from tests.agent.test_core import NOW, PROVIDER, World


class Busy:
    """A runner that has started nothing yet, and is busy with a pull or a start."""

    name = "process"

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.calls: list[str] = []

    def _wait(self, what: str) -> None:
        self.calls.append(what)
        assert self.goes_on.wait(60)

    def ensure_image(self, image: str, *_: object, **__: object) -> ResolvedImage:
        self._wait("pull")
        return ResolvedImage(image, image)

    def tidy_images(self, _needs: object) -> list[str]:
        return []

    def start(self, _spec: object) -> None:
        self._wait("start")

    def status(self, _run: str) -> RunStatus:
        return RunStatus("gone")

    def furnish(self, *_: object, **__: object) -> None:
        """Restoring is held up by what comes before it."""

    def remove(self, _run: str) -> None:
        self.calls.append("remove")

    def kill(self, _run: str) -> None:
        self.calls.append("kill")

    def stop(self, _run: str) -> None:
        self.calls.append("stop")


class Agent:
    """A shell with a real journal."""

    def __init__(self, root: Path) -> None:
        self.runner = Busy()
        self.world = World()
        self.journal = Journal(root / "state")
        self.spool = Spool(root / "state" / "spool.db", Reserve(root / "state" / "reserve"))
        self.shell = Shell(
            state=root / "state",
            core=self.world.core,
            journal=self.journal,
            spool=self.spool,
            runner=cast(Any, self.runner),
            transfer=cast(Any, None),
            helper=root,
            now_ms=lambda: NOW,
            say=print,
        )

    def begin(self) -> str:
        """Have a lease signed; what follows is under way."""
        lease_id, step = self.world.assign(self.world.job())
        self.shell._perform(step)
        return lease_id

    async def until(self, holds: Callable[[], bool]) -> None:
        for _ in range(3_000):
            if holds():
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"waited in vain; {self.runner.calls}")

    async def busy_with(self, what: str) -> None:
        await self.until(lambda: what in self.runner.calls)

    def cancel(self, lease_id: str) -> None:
        self.shell.arrived(
            Order(
                lease=lease_id,
                epoch=1,
                desired="drain",
                reason=Reason.CANCELLED,
                grace_ms=600_000,
            )
        )

    def phase(self, lease_id: str) -> RunPhase:
        return self.world.core.runs[lease_id].record.phase

    async def has_told_its_end(self) -> bool:
        """On disk, and so on its way: the end, and the receipt that closes the lease."""
        await self.shell.written()
        told = [pending.message for pending in self.journal.pending()]
        ends = [m.reason for m in told if isinstance(m, RunChanged) and m.state == "exited"]
        receipts = [
            read_document(m.receipt, Receipt, signed_by=(PROVIDER.party,))
            for m in told
            if isinstance(m, ReceiptIssued)
        ]
        return ends == [Reason.CANCELLED] and [
            (receipt.final, receipt.reason, receipt.cum_device_ms) for receipt in receipts
        ] == [(True, Reason.CANCELLED, 0)]

    async def close(self) -> None:
        self.runner.goes_on.set()
        for task in list(self.shell._tasks.values()):
            task.cancel()
        await asyncio.sleep(0)
        self.shell.close()
        self.spool.close()
        self.journal.close()


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path)


async def test_while_its_image_is_pulled(agent: Agent) -> None:
    lease_id = agent.begin()
    await agent.busy_with("pull")
    agent.cancel(lease_id)
    assert agent.phase(lease_id) is RunPhase.ENDED
    assert await agent.has_told_its_end()
    await agent.close()


async def test_while_its_checkpoint_is_restored(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workspace, "restore", lambda *_, **__: agent.runner._wait("restore"))
    lease_id = agent.begin()
    agent.shell.images[lease_id] = ResolvedImage("local/python", "local/python")
    agent.shell.post(events.ImageReady(lease_id))
    await agent.busy_with("restore")
    agent.cancel(lease_id)
    assert agent.phase(lease_id) is RunPhase.ENDED
    assert await agent.has_told_its_end()
    # And when the transfer comes back, nothing is started.
    agent.runner.goes_on.set()
    await asyncio.wait(list(agent.shell._tasks.values()))
    assert "start" not in agent.runner.calls
    await agent.close()


async def test_before_its_container_is_there(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is at its place, and something else is waited for before the start."""
    reached, goes_on = asyncio.Event(), asyncio.Event()

    async def watchdog() -> None:
        reached.set()
        await goes_on.wait()

    monkeypatch.setattr(Workspace, "restore", lambda *_, **__: None)
    monkeypatch.setattr(agent.shell, "_ensure_watchdog", watchdog)
    lease_id = agent.begin()
    agent.shell.images[lease_id] = ResolvedImage("local/python", "local/python")
    for event in (events.ImageReady(lease_id), events.Restored(lease_id)):
        agent.shell.post(event)
    await reached.wait()
    agent.cancel(lease_id)
    goes_on.set()
    await agent.until(lambda: agent.phase(lease_id) is RunPhase.ENDED)
    assert await agent.has_told_its_end()
    assert "start" not in agent.runner.calls
    await agent.close()
