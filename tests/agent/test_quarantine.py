"""An error that nobody had thought of ends one run: never the agent, the others, or the next start.

The errors are put in by hand where the real ones came up; what is done about them is the real core,
journal, link's outbox and shell.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from sublet_agent.adapters.session import log_spool
from sublet_agent.adapters.session.disk_reserve import Reserve
from sublet_agent.adapters.session.journal import Journal
from sublet_agent.adapters.session.log_spool import Spool
from sublet_agent.adapters.shell import UNEXPECTED, Shell
from sublet_agent.adapters.workspace import quarantine
from sublet_agent.adapters.workspace.workspace import Workspace, run_id
from sublet_agent.core import effects, events
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.effects import Queued, Save
from sublet_agent.core.exit_reasons import ExitEvidence
from sublet_agent.core.records import Saved
from sublet_agent.core.run import QUARANTINED_TEXT, Run
from sublet_agent.core.run_phases import RunPhase
from sublet_agent.core.runner_port import (
    LINE_BYTES,
    FoundRun,
    LogBatch,
    Measure,
    OutputLine,
    RunnerError,
    RunStatus,
)
from sublet_contracts.documents import Receipt, read_document
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import LeaseAnswer, Order, ReceiptIssued, RunChanged, Withdraw
from tests.agent.test_core import GPU, NOW, PROVIDER, World, only, said, terms, wanted

TWO = (GPU, GPU.model_copy(update={"id": "gpu-1"}))
ODD = ZeroDivisionError("nobody had thought of this")


class Broken:
    """Breaks a method of `Run` for one lease."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def __call__(self, method: str, lease_id: str, unless: type[Any] | None = None) -> None:
        real: Callable[..., Any] = getattr(Run, method)

        def odd(run: Run, *arguments: Any, **options: Any) -> Any:
            answer = real(run, *arguments, **options)
            spared = unless is not None and isinstance(arguments[0], unless)
            if run.record.lease_id == lease_id and not spared:
                # Half of it is done by now.
                run.record.local_checkpoints[77] = 1
                raise ODD
            return answer

        self._patch.setattr(Run, method, odd)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Broken:
    return Broken(monkeypatch)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "state")
    yield journal
    journal.close()


class Market(World):
    """Two runs on an agent whose steps are committed to a real journal."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        super().__init__(devices=TWO)
        self.core.last_saved = journal.run
        self.one = self.running()
        self.other, _ = self.assign(self.job(nonce="1" * 32), device_ids=("gpu-1",))
        self.do(events.ImageReady(self.other))
        self.do(events.Restored(self.other))
        self.do(events.Observed(self.other, running=True, started_ms=NOW, ran_ms=0))

    def do(self, event: events.Event) -> effects.Step:
        step = self.core.handle(event, self.now)
        self.journal.commit(step.save)
        self.steps.append(step)
        return step

    def holds(self, phase: RunPhase, lease_id: str) -> bool:
        """In memory as on disk."""
        saved = self.journal.run(lease_id)
        assert saved is not None
        assert self.core.saved.runs[lease_id] is self.core.runs[lease_id].record
        return saved.phase is phase and self.core.runs[lease_id].record.phase is phase


def ended_as(step: effects.Step, lease_id: str, reason: Reason) -> None:
    """Told once: its end and its final receipt, together; and it is killed and put aside."""
    end = only(step, RunChanged)
    assert (end.lease, end.state, end.reason) == (lease_id, "exited", reason)
    receipt = read_document(only(step, ReceiptIssued).receipt, Receipt, signed_by=(PROVIDER.party,))
    assert (receipt.final, receipt.reason) == (True, reason)
    assert [e.lease_id for e in wanted(step, effects.Kill)] == [lease_id]
    assert [e.lease_id for e in wanted(step, effects.PutAside)] == [lease_id]
    [unexpected] = wanted(step, effects.Unexpected)
    assert unexpected.lease_id == lease_id


def test_an_error_in_one_runs_event_ends_that_run(journal: Journal, broken: Broken) -> None:
    market = Market(journal)
    broken("handle", market.one, unless=events.Quarantined)
    step = market.do(events.CheckpointFound(market.one, 5))
    ended_as(step, market.one, Reason.RUN_QUARANTINED)
    assert only(step, RunChanged).detail == QUARANTINED_TEXT  # nothing of this machine's
    assert not wanted(step, effects.Upload)  # what the event had begun is taken back
    assert market.holds(RunPhase.ENDED, market.one)
    record = market.core.runs[market.one].record
    assert "ZeroDivisionError" in record.quarantined
    assert record.local_checkpoints == {}
    # Nothing more is told of it, its device is free, and the other goes on.
    assert market.do(events.CheckpointFound(market.one, 6)).save.empty
    assert only(market.assign(market.job(nonce="2" * 32))[1], LeaseAnswer).signed
    assert wanted(market.do(events.CheckpointFound(market.other, 5)), effects.Upload)


def test_time_goes_on_for_the_others(journal: Journal, broken: Broken) -> None:
    market = Market(journal)
    market.ran(market.one, 40_000)
    market.do(events.Observed(market.other, running=True, started_ms=NOW, ran_ms=40_000))
    broken("tick", market.one)
    step = market.do(events.Tick())
    receipts = [
        read_document(message.receipt, Receipt, signed_by=(PROVIDER.party,))
        for message in said(step, ReceiptIssued)
    ]
    # What it had run for counts, although it is saved with the next receipt only.
    assert {(r.lease, r.final, r.cum_device_ms) for r in receipts} == {
        (market.one, True, 40_000),
        (market.other, False, 40_000),
    }
    assert market.holds(RunPhase.ENDED, market.one)


def test_a_message_that_nobody_can_take_is_taken_once(journal: Journal, broken: Broken) -> None:
    market = Market(journal)
    broken("stop", market.one)
    order = Order(
        lease=market.one, epoch=1, desired="drain", reason=Reason.RECLAIMED, grace_ms=9_000
    )
    ended_as(market.do(events.MessageArrived(order)), market.one, Reason.RUN_QUARANTINED)
    assert market.do(events.MessageArrived(order)).save.empty


def test_what_can_not_be_told_of_one_run_is_told_of_the_others(
    journal: Journal, broken: Broken
) -> None:
    market = Market(journal)
    broken("report", market.one)
    market.now += 60_000
    step = market.do(events.Tick())
    [beat] = [s.message for s in wanted(step, effects.Send) if s.message.TYPE == "heartbeat"]
    assert [report.lease for report in beat.runs] == [market.other]
    assert market.holds(RunPhase.ENDED, market.one)


def test_a_lease_that_could_not_be_taken_is_refused_and_leaves_nothing(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    market = Market(journal)
    market.do(events.Removed(market.one))

    def odd(*_: object) -> None:
        raise ODD

    with monkeypatch.context() as patch:
        patch.setattr("sublet_contracts.envelope.Envelope.countersigned", odd)
        lease_id, step = market.assign(market.job(nonce="3" * 32))
    assert only(step, LeaseAnswer).refusal == "an unexpected error at this provider"
    assert wanted(step, effects.Unexpected)
    assert not wanted(step, effects.Pull)
    assert lease_id not in market.core.runs.keys() | market.core.saved.runs.keys()
    # The same again, in better times.
    again, step = market.assign(market.job(nonce="3" * 32))
    assert only(step, LeaseAnswer).signed
    assert market.holds(RunPhase.PULLING, again)


def test_what_is_known_of_an_end_stays_known(journal: Journal, broken: Broken) -> None:
    """A job can't make its own failure ours by leaving behind what can't be handled."""
    market = Market(journal)
    market.do(
        events.Observed(
            market.one,
            running=False,
            started_ms=NOW,
            ran_ms=1_000,
            end=ExitEvidence(3, returned=True),
        )
    )
    assert market.holds(RunPhase.FINISHING, market.one)
    ended_as(market.do(events.Quarantined(market.one, "final: odd")), market.one, Reason.JOB_FAILED)


def test_a_cancelled_run_that_is_quarantined_was_cancelled(journal: Journal) -> None:
    market = Market(journal)
    stop = Order(lease=market.one, epoch=1, desired="stop", reason=Reason.CANCELLED, grace_ms=9_000)
    market.do(events.MessageArrived(stop))
    ended_as(market.do(events.Quarantined(market.one, "odd")), market.one, Reason.CANCELLED)


def test_a_run_whose_end_can_not_even_be_told_is_let_go(journal: Journal, broken: Broken) -> None:
    market = Market(journal)
    broken("handle", market.one)
    step = market.do(events.CheckpointFound(market.one, 5))
    assert not step.save.queue
    assert step.save.drop_messages_of == [market.one]
    assert [e.lease_id for e in wanted(step, effects.Remove)] == [market.one]
    assert market.holds(RunPhase.DISCARDED, market.one)


# -- the shell -------------------------------------------------------------------------------------


class OddRunner:
    """A runner of which some calls raise what no runner should."""

    name = "process"

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.calls: list[tuple[str, str]] = []
        self.found: list[FoundRun] = []

    def _call(self, name: str, run: str = "") -> None:
        self.calls.append((name, run))
        if name in self.broken or f"{name} {run}" in self.broken:
            raise KeyError("epoch")

    def find(self) -> list[FoundRun]:
        self._call("find")
        return self.found

    def start(self, spec: Any) -> None:
        self._call("start", spec.run_id)

    def status(self, run: str) -> RunStatus:
        self._call("status", run)
        return RunStatus("running", started_ms=NOW)

    def stop(self, run: str) -> None:
        self._call("stop", run)

    def kill(self, run: str) -> None:
        self._call("kill", run)

    def remove(self, run: str) -> None:
        self._call("remove", run)

    def read_logs(
        self, run: str, cursor: str | None, _limit: int, *, ended: bool = False
    ) -> LogBatch:
        self._call("read_logs", run)
        return LogBatch((), cursor, False)

    def unfinished_lines(self, run: str) -> tuple[OutputLine, ...]:
        self._call("unfinished_lines", run)
        return ()

    def measure(self, run: str) -> Measure | None:
        self._call("measure", run)
        return None


class Agent:
    """A shell on a real journal and spool, with runs in it."""

    def __init__(self, journal: Journal, state: Path, saved: Saved | None = None) -> None:
        self.state = state
        self.said: list[str] = []
        self.runner = OddRunner()
        self.world = World(devices=TWO)
        if saved is not None:
            self.world.core = AgentCore(terms(devices=TWO), PROVIDER, saved)
        self.spool = Spool(state / "spool.db", Reserve(state / "reserve"))
        self.shell = Shell(
            state=state,
            core=self.world.core,
            journal=journal,
            spool=self.spool,
            runner=cast(Any, self.runner),
            transfer=cast(Any, None),
            helper=state,
            now_ms=lambda: NOW,
            say=self.said.append,
        )

    def has_run(self, **changes: Any) -> str:
        """A running run, on disk as well, with its folder."""
        device = changes.pop("device", "gpu-0")
        lease_id, step = self.world.assign(self.world.job(**changes), device_ids=(device,))
        self.shell.journal.commit(step.save)
        for event in (
            events.ImageReady(lease_id),
            events.Restored(lease_id),
            events.Observed(lease_id, running=True, started_ms=NOW, ran_ms=0),
        ):
            self.shell.journal.commit(self.world.do(event).save)
        Workspace(self.state, self.world.core.runs[lease_id].record).make()
        return lease_id

    def reason(self, lease_id: str) -> Reason | None:
        return self.world.core.runs[lease_id].record.reason

    async def quiet(self) -> None:
        """Wait until nothing more is under way but the watching."""
        for _ in range(500):
            await self.shell.written()
            if not [key for key in self.shell._tasks if key[0] != "watch"]:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"under way: {list(self.shell._tasks)}")

    async def close(self) -> None:
        for task in list(self.shell._tasks.values()):
            task.cancel()
        await asyncio.sleep(0)
        self.shell.close()
        self.spool.close()

    def unexpected(self) -> list[str]:
        return [line for line in self.said if line.startswith(UNEXPECTED)]


async def test_a_task_that_fails_puts_its_run_aside(journal: Journal, tmp_path: Path) -> None:
    agent = Agent(journal, tmp_path / "state")
    lease_id, other = agent.has_run(), agent.has_run(nonce="1" * 32, device="gpu-1")
    folder = agent.state / "runs" / lease_id[:16]
    (folder / "checkpoint" / "out" / "odd").write_text("what it had written")

    async def odd() -> None:
        raise ODD

    agent.shell._spawn("upload checkpoint 5", lease_id, odd())
    await asyncio.sleep(0)
    await agent.quiet()
    assert agent.shell.failed is None
    assert not agent.shell.done.is_set()
    assert agent.reason(lease_id) is Reason.RUN_QUARANTINED
    assert agent.reason(other) is None
    assert ("remove", run_id(lease_id)) in agent.runner.calls
    [line] = agent.unexpected()
    assert "upload checkpoint 5" in line
    kept = agent.state / "quarantine" / lease_id[:16]
    assert str(kept) in agent.said[-1]
    assert "Traceback" in (kept / "error.txt").read_text()
    assert json.loads((kept / "record.json").read_text())["lease_id"] == lease_id
    assert (kept / "folder" / "checkpoint" / "out" / "odd").read_text() == "what it had written"
    assert not folder.exists()
    # Settled, the record goes, and what was kept stays.
    agent.shell._do(effects.Remove(lease_id))
    await agent.quiet()
    assert lease_id not in agent.world.core.runs
    assert (kept / "folder").is_dir()
    await agent.close()


async def test_what_can_not_be_written_of_one_run_does_not_stop_the_journal(
    journal: Journal, tmp_path: Path
) -> None:
    agent = Agent(journal, tmp_path / "state")
    lease_id = agent.has_run()
    agent.world.core.runs[lease_id].record.detail = "half a character: \ud800"
    agent.shell.post(events.CheckpointFound(lease_id, 5))
    await agent.quiet()
    assert agent.shell.failed is None
    assert agent.reason(lease_id) is Reason.RUN_QUARANTINED
    assert journal.run(lease_id) == agent.world.core.runs[lease_id].record
    await agent.close()


async def test_a_journal_that_can_not_be_written_ends_the_agent(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent(journal, tmp_path / "state")
    lease_id = agent.has_run()

    def full(_changes: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(journal, "write", full)
    agent.shell.post(events.CheckpointFound(lease_id, 5))
    with pytest.raises(sqlite3.OperationalError):
        await agent.shell.written()
    assert agent.shell.done.is_set()
    await agent.close()


async def test_an_agent_starts_whatever_is_left_of_before(journal: Journal, tmp_path: Path) -> None:
    """A record that can't be read, a runner that answers nonsense, folders of nobody."""
    state = tmp_path / "state"
    before = Agent(journal, state)
    lease_id, other = before.has_run(), before.has_run(nonce="1" * 32, device="gpu-1")
    await before.close()
    journal._db.execute("UPDATE runs SET record='{\"phase\": 7}' WHERE lease=?", (lease_id,))
    journal._db.execute("INSERT INTO outbox VALUES (900, '', 'withdraw', '{}')")
    journal.commit(Save(queue=[Queued(901, "", Withdraw(offer_sequence=1))]))
    (state / "runs" / "stranger" / "deep").mkdir(parents=True)
    saved = journal.load()
    assert list(saved.runs) == [other]

    agent = Agent(journal, state, saved)
    agent.runner.found = [FoundRun("sublet-odd", "?", "?", 0, RunStatus("exited"))]
    agent.runner.broken = {"remove sublet-odd"}
    await agent.shell.start()
    await asyncio.sleep(0.3)
    assert agent.shell.failed is None
    assert agent.reason(other) is None
    kept = state / "quarantine" / lease_id[:16]
    assert (kept / "record.json").read_text() == '{"phase": 7}'
    assert (kept / "folder").is_dir()
    assert not (state / "runs" / "stranger").exists()
    assert len(agent.unexpected()) == 2  # the record, and the run that could not be removed
    assert not Journal.load(journal).runs.keys() - {other}
    # Of the messages that wait, the one that can be read is sent.
    assert [p.message is None for p in journal.pending() if p.number >= 900] == [True, False]
    await agent.close()


async def test_an_agent_starts_where_the_runner_can_not_even_list(
    journal: Journal, tmp_path: Path
) -> None:
    agent = Agent(journal, tmp_path / "state")
    agent.runner.broken = {"find"}
    await agent.shell.start()
    assert agent.shell.failed is None
    [line] = agent.unexpected()
    assert "what runs here" in line
    await agent.close()


async def test_a_runner_that_answers_nonsense_about_one_run_costs_that_run(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent(journal, tmp_path / "state")
    lease_id, other = agent.has_run(), agent.has_run(nonce="1" * 32, device="gpu-1")
    agent.runner.broken = {f"status {run_id(lease_id)}"}
    monkeypatch.setattr("sublet_agent.adapters.run_observer.AGAIN_S", 0.01)
    for each in (lease_id, other):
        agent.shell.watch(each)
    for _ in range(500):
        if agent.reason(lease_id) is not None:
            break
        await asyncio.sleep(0.01)
    await agent.quiet()
    assert agent.reason(lease_id) is Reason.RUN_QUARANTINED
    assert agent.reason(other) is None
    assert ("watch", other) in agent.shell._tasks
    await agent.close()


async def test_no_container_outlives_its_lease_because_removing_it_failed(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent(journal, tmp_path / "state")
    lease_id = agent.has_run()
    monkeypatch.setattr("sublet_agent.adapters.shell.REMOVE_AGAIN_S", 0.01)
    tries: list[str] = []

    def remove(run: str) -> None:
        tries.append(run)
        if len(tries) == 1:
            raise RunnerError("the engine is restarting")
        if len(tries) == 2:
            raise KeyError("State")

    monkeypatch.setattr(agent.runner, "remove", remove)
    agent.shell._do(effects.Remove(lease_id))
    await agent.quiet()
    assert len(tries) == 3
    assert lease_id not in agent.world.core.runs
    await agent.close()


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "KEPT_BYTES", 100_000)
    for number in range(quarantine.KEPT_RUNS + 3):
        lease_id = f"{number:016x}" + "0" * 48
        folder = tmp_path / "runs" / lease_id[:16]
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"w" * (200_000 if number % 2 else 1_000))
        quarantine.keep(tmp_path, lease_id, record="{}", error="x" * 200_000)
        assert not folder.exists()
    there = sorted(path.name for path in (tmp_path / "quarantine").iterdir())
    assert there == [f"{number:016x}" for number in range(3, quarantine.KEPT_RUNS + 3)]
    for path in (tmp_path / "quarantine").iterdir():
        assert (path / "folder").exists() == (int(path.name, 16) % 2 == 0)
        assert (path / "error.txt").stat().st_size <= quarantine.MAX_TEXT_BYTES


def test_a_run_that_prints_nothing_but_empty_lines_is_bounded_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_spool, "MAX_BYTES", 10 * LINE_BYTES)
    spool = Spool(tmp_path / "spool.db", Reserve(tmp_path / "reserve"))
    spool.add("a" * 64, [OutputLine("stdout", NOW, "")] * 25, None)
    assert spool.unconfirmed("a" * 64) == 10
    spool.add_dropped_line("a" * 64, NOW)
    assert spool.batch("a" * 64)[-1].text.startswith("15 further lines were left out")
    spool.close()
