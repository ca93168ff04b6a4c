"""No run outlives its lease or its budget, whatever becomes of its agent."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from sublet_agent.adapters.process import tree
from sublet_agent.adapters.watchdog.deadline_files import DeadlineFiles, boot_clock_ms
from sublet_agent.adapters.watchdog.watchdog import Watchdog, WatchdogKeeper
from sublet_agent.core import effects, events
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.deadlines import MARGIN_MS, RENEW_EVERY_MS, deadline_of
from sublet_agent.core.exit_reasons import ExitEvidence
from sublet_agent.core.runner_port import Runner, RunnerError, RunStatus
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import RunChanged
from tests.agent.runner_world import Kind, World, wait_for
from tests.agent.test_core import NOW, PRICE, PROVIDER, only, terms, wanted
from tests.agent.test_core import World as CoreWorld
from tests.e2e.bad_market import BadMarket
from tests.images import base_image
from tests.services import require

RUN = "r1"
HOUR_UCR = PRICE  # what one device-hour costs
IGNORES = """
import os, signal, subprocess, sys, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("up", flush=True)
"""
KILLS_ALL = (
    IGNORES
    + """
while True:
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
    time.sleep(0.05)
    os.kill(-1, signal.SIGKILL)
"""
)
"""It kills all that it may: for containers only. It would end this machine's session as well."""
STAYS = IGNORES + "time.sleep(600)"


# -- the decisions -------------------------------------------------------------------------------


def record_of(world: CoreWorld, lease_id: str) -> Any:
    return world.core.saved.runs[lease_id]


def running(patience_ms: int = 20_000, **lease: Any) -> tuple[CoreWorld, str]:
    world = CoreWorld()
    lease_id, _ = world.assign(world.job(patience_ms=patience_ms), **lease)
    world.do(events.ImageReady(lease_id))
    world.do(events.Restored(lease_id))
    world.ran(lease_id, 0)
    return world, lease_id


def test_a_deadline_is_patience_and_a_margin_or_the_end_of_the_hold() -> None:
    world, lease_id = running()
    record = record_of(world, lease_id)
    deadline = deadline_of(record)
    assert (deadline.over, deadline.in_ms) == ("silence", record.job.patience_ms + MARGIN_MS)
    minute_ucr = HOUR_UCR // 60
    world, lease_id = running(patience_ms=120_000, hold_ucr=minute_ucr)
    record = record_of(world, lease_id)
    world.ran(lease_id, 58_000)
    deadline = deadline_of(record)
    assert deadline.over == "budget"
    assert deadline.in_ms == pytest.approx(2_000 + record.job.stop_grace_ms, abs=200)


def test_it_is_written_before_the_run_starts_and_renewed_while_it_lives() -> None:
    world = CoreWorld()
    lease_id, _ = world.assign(world.job())
    world.do(events.ImageReady(lease_id))
    step = world.do(events.Restored(lease_id))
    kinds = [type(effect) for effect in step.effects]
    assert kinds.index(effects.RenewDeadline) < kinds.index(effects.Start)
    world.ran(lease_id, 0)
    renewed = 0
    for ran_ms in range(0, 20_000, 200):
        world.now = NOW + ran_ms
        renewed += len(wanted(world.do(events.Tick()), effects.RenewDeadline))
    assert 20_000 // RENEW_EVERY_MS - 1 <= renewed <= 20_000 // RENEW_EVERY_MS + 1
    world.ran(lease_id, 20_000, running=False, exit_code=0)
    world.now += 10_000
    assert not wanted(world.do(events.Tick()), effects.RenewDeadline)


def test_an_agent_that_comes_back_renews_before_anything_else() -> None:
    world, lease_id = running()
    again = AgentCore(terms(), PROVIDER, world.core.saved)
    step, _ = again.started([lease_id], NOW + 5_000)
    assert isinstance(step.effects[0], effects.RenewDeadline)


@pytest.mark.parametrize(
    ("over", "finished", "reason"),
    [
        ("budget", False, Reason.BUDGET_EXHAUSTED),
        ("silence", False, Reason.RUN_KILLED),
        ("silence", True, Reason.SUCCEEDED),
    ],
)
def test_what_the_watchdog_ended_ends_for_what_was_over(
    over: Any, finished: bool, reason: Reason
) -> None:
    world, lease_id = running()
    world.do(events.DeadlinePassed(lease_id, over))
    code = 0 if finished else 137
    world.do(
        events.Observed(
            lease_id, running=False, started_ms=NOW, ran_ms=9_000, end=ExitEvidence(code)
        )
    )
    ended = only(world.scanned(lease_id), RunChanged)
    assert ended.reason is reason
    if not finished:
        assert "watchdog" in ended.detail


# -- the files -----------------------------------------------------------------------------------


def test_deadlines_of_another_boot_mean_nothing(tmp_path: Path) -> None:
    files = DeadlineFiles(tmp_path)
    assert files.all() == []
    files.renew(RUN, 1_000, "silence")
    (found,) = files.all()
    assert (found.run_id, found.over) == (RUN, "silence")
    assert abs(found.at_ms - boot_clock_ms() - 1_000) < 500
    path = tmp_path / "deadlines" / RUN
    path.write_text(json.dumps(json.loads(path.read_text()) | {"boot": "another"}))
    assert files.all() == []
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_id": 1}', "\0" * 512])
def test_a_file_that_is_being_written_is_no_deadline_and_stays(tmp_path: Path, text: str) -> None:
    files = DeadlineFiles(tmp_path)
    files.renew(RUN, 1_000, "silence")
    path = tmp_path / "deadlines" / RUN
    path.write_text(text)
    assert files.all() == []
    assert path.exists()


def test_a_full_disk_does_not_keep_a_deadline_from_being_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = DeadlineFiles(tmp_path)
    files.renew(RUN, 1_000, "silence")
    (before,) = files.all()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    files.renew(RUN, 60_000, "budget")
    (after,) = files.all()
    assert after.at_ms > before.at_ms + 50_000
    assert after.over == "budget"


# -- one turn ------------------------------------------------------------------------------------


class Engine:
    """A runner with one run, that may refuse to answer."""

    def __init__(self) -> None:
        self.state = "running"
        self.refuses = False
        self.deaf = False
        self.at_kill: Callable[[], object] = lambda: None

    def status(self, run_id: str) -> RunStatus:
        if self.refuses:
            raise RunnerError("the engine does not answer")
        return RunStatus(cast(Any, self.state))

    def kill(self, run_id: str) -> None:
        self.at_kill()
        if not self.deaf:
            self.state = "exited"


class Turns:
    """A watchdog on a clock of the test's."""

    def __init__(self, state: Path) -> None:
        self.files = DeadlineFiles(state)
        self.engine = Engine()
        self.said: list[str] = []
        self.ahead_ms = 0
        self.dog = Watchdog(
            self.files,
            lambda: cast(Runner, self.engine),
            self.said.append,
            lambda: boot_clock_ms() + self.ahead_ms,
        )


@pytest.fixture
def turns(tmp_path: Path) -> Turns:
    return Turns(tmp_path)


def test_a_run_is_ended_when_its_deadline_has_passed_and_not_before(turns: Turns) -> None:
    turns.files.renew(RUN, 30_000, "silence")
    assert turns.dog.turn() == 1
    assert turns.engine.state == "running"
    turns.ahead_ms = 31_000
    noted: list[object] = []
    turns.engine.at_kill = lambda: noted.append(turns.files.passed(RUN))
    turns.dog.turn()
    assert turns.engine.state == "exited"
    assert noted == ["silence"]  # before the kill
    assert turns.dog.turn() == 1
    assert turns.dog.turn() == 0
    assert turns.files.passed(RUN) == "silence"
    turns.files.forget(RUN)
    assert turns.files.passed(RUN) is None


def test_a_run_that_is_renewed_lives_on(turns: Turns) -> None:
    turns.files.renew(RUN, 30_000, "silence")
    turns.ahead_ms = 29_000
    turns.dog.turn()
    turns.files.renew(RUN, 60_000, "silence")
    turns.ahead_ms = 45_000
    turns.dog.turn()
    assert turns.engine.state == "running"
    assert turns.files.passed(RUN) is None


def test_an_engine_that_is_away_or_deaf_is_asked_until_the_run_is_gone(turns: Turns) -> None:
    turns.files.renew(RUN, 0, "budget")
    turns.engine.refuses = True
    for _ in range(3):
        assert turns.dog.turn() == 1
    assert turns.files.passed(RUN) is None
    turns.engine.refuses, turns.engine.deaf = False, True
    for _ in range(3):
        assert turns.dog.turn() == 1
    turns.engine.deaf = False
    turns.dog.turn()
    assert turns.engine.state == "exited"


def test_what_ended_by_itself_leaves_no_note(turns: Turns) -> None:
    turns.files.renew(RUN, 0, "silence")
    turns.engine.state = "exited"
    turns.dog.turn()
    assert turns.dog.turn() == 0
    assert turns.files.passed(RUN) is None


# -- the process ---------------------------------------------------------------------------------

AGENT = """
import sys, time
from pathlib import Path
from sublet_agent.adapters.watchdog.watchdog import WatchdogKeeper
keeper = WatchdogKeeper(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
assert keeper.ensure()
print("up", flush=True)
time.sleep(600)
"""


class Agent:
    """A process that starts the watchdog, as an agent does, and can be killed."""

    def __init__(self, state: Path, kind: str, owner: str) -> None:
        self.state = state
        command = [sys.executable, "-c", AGENT, str(state), kind, owner]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"up\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def watchdogs(self) -> set[int]:
        """Return the watchdogs of this state folder."""
        found = set()
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                line = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            alive = tree.read_process(int(name))
            mine = b"sublet_agent.adapters.watchdog.watchdog\0" + bytes(self.state) in line
            if mine and alive is not None and alive.alive:
                found.add(int(name))
        return found


@pytest.fixture(params=["process", pytest.param("docker", marks=pytest.mark.docker)])
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    kind: Kind = request.param
    if kind == "docker":
        require("docker")
    made = World(kind, tmp_path)
    yield made
    made.close()


def state_of(world: World) -> Path:
    """Return the state folder, as the watchdog sees it: the process runner's is in `engine`."""
    state = world.root / "state"
    state.mkdir(exist_ok=True)
    if world.kind == "process" and not (state / "engine").exists():
        (state / "engine").symlink_to(".")
    return state


def test_a_killed_agents_run_that_kills_all_it_can_is_gone_by_its_deadline(runs: World) -> None:
    state = state_of(runs)
    agent = Agent(state, runs.kind, runs.owner)
    spec = runs.spec(KILLS_ALL if runs.kind == "docker" else STAYS)
    files = DeadlineFiles(state)
    files.renew(spec.run_id, 4_000, "silence")
    runs.runner.start(spec)
    runs.shown(spec.run_id, "up")
    files.renew(spec.run_id, 4_000, "silence")
    due_ms = boot_clock_ms() + 4_000
    assert len(agent.watchdogs()) == 1
    agent.kill()
    assert runs.runner.status(spec.run_id).state == "running"
    wait_for(lambda: runs.runner.status(spec.run_id).state == "exited", "the end of the run")
    assert -500 <= boot_clock_ms() - due_ms < 5_000
    assert files.passed(spec.run_id) == "silence"
    # It was ours that killed it, not the machine's owner.
    status = runs.restarted().status(spec.run_id)
    assert (status.exit_code, status.engine_stopped, status.outside_signal) == (137, "", "")
    wait_for(lambda: not agent.watchdogs(), "the end of the watchdog: nothing is left to watch")


def test_a_newer_watchdog_takes_over_and_a_lost_one_is_replaced(tmp_path: Path) -> None:
    DeadlineFiles(tmp_path).renew(RUN, 600_000, "silence")
    first = Agent(tmp_path, "process", "owner")
    (before,) = first.watchdogs()
    first.kill()
    second = Agent(tmp_path, "process", "owner")
    wait_for(lambda: len(second.watchdogs() - {before}) == 1 == len(second.watchdogs()), "another")
    second.kill()
    keeper = WatchdogKeeper(tmp_path, "process", "owner")
    assert keeper.ensure()
    assert not keeper.ensure() or len(second.watchdogs()) >= 1
    wait_for(lambda: len(second.watchdogs()) == 1 and not keeper.ensure(), "one that stays")
    (lost,) = second.watchdogs()
    os.kill(lost, signal.SIGKILL)
    wait_for(lambda: keeper.ensure(), "another")
    wait_for(lambda: bool(second.watchdogs() - {lost}), "another")
    DeadlineFiles(tmp_path).forget(RUN)
    keeper.close()
    wait_for(lambda: not second.watchdogs(), "its end")


# -- whole agents --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["process", pytest.param("docker", marks=pytest.mark.docker)])
def test_an_agent_that_comes_back_in_time_takes_up_and_one_that_does_not_leaves_nothing(
    world: BadMarket, runner: str
) -> None:
    if runner == "docker":
        require("docker")
    place = f"watched-{runner}"
    agent = world.agent(place, runner=runner)
    world.offered(place)
    image: dict[str, object] = {}
    if runner == "docker":
        image = {"image": base_image()}
    code = KILLS_ALL if runner == "docker" else STAYS
    job = world.python(place, code, patience="10s", **image)
    world.until(job, lambda view: view.state == "running", "its start")
    market = world.market
    world.soon(lambda: "up" in world.log(job), "its first line")

    def left() -> list[object]:
        return [*market.run_processes(job.id), *market.containers(job.id)]

    agent.kill()
    time.sleep(4.0)
    assert left()
    agent = world.agent(place, runner=runner)
    time.sleep(10.0 + MARGIN_MS / 1000)  # the deadline that the first agent wrote has passed
    view = job.view()
    assert (view.state, view.recoveries, len(view.runs)) == ("running", 0, 1)
    assert left()
    agent.kill()
    world.soon(lambda: not left(), "the end of the run", limit_s=10.0 + MARGIN_MS / 1000 + 5.0)
    job.cancel()
    world.agent(place, runner=runner)
    world.ended(job)


@pytest.mark.slow
def test_a_run_whose_hold_is_used_up_is_ended_without_its_agent_and_for_that_reason(
    world: BadMarket,
) -> None:
    agent = world.agent("edge")
    world.offered("edge")
    edge = {"max_price": "0.40", "budget": "0.0067", "patience": "120s", "stop_grace": "5s"}
    job = world.python("edge", STAYS, **edge)
    world.until(job, lambda view: view.state == "running", "its start")
    world.soon(lambda: "up" in world.log(job), "its first line")
    began = time.monotonic()
    agent.kill()
    world.soon(lambda: not world.market.run_processes(job.id), "the end of the run")
    assert time.monotonic() - began < 75  # the budget is a minute, and there are 5 s to stop
    world.agent("edge")
    view = world.until(job, lambda found: found.state == "paused", "its pause")
    assert view.runs[0].reason == "budget_exhausted"
    assert view.charged_ucr <= view.budget_ucr
    job.cancel()
