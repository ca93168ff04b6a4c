"""What an owner does at his machine: looks at it, takes it back, and reads what it has earned."""

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sublet.client import Job
from sublet_agent.core.status import DeviceStatus, HeldRun, Status
from sublet_agent.main import Signals, main
from sublet_contracts.amounts import format_credits
from sublet_contracts.api import Charge
from sublet_contracts.keys import SigningKey
from tests.agent.owners_command import Answer, provider
from tests.e2e.bad_market import BadMarket

GUIDE = Path(__file__).parents[2] / "provider_agent" / "README.md"
ROWS, COLUMNS = 24, 80
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
ERASE = "\x1b[2K"

# Each key, and what it holds, is a promise to scripts: provider_agent/README.md.
STATUS = {
    "provider": str, "name": str, "broker": str, "connected": bool, "since_ms": int,
    "trouble": str, "runner": str, "draining": bool, "stopping": bool,
    "set_aside": str, "engine_trouble": str, "waits_for": list, "fee_bps": int | None,
    "net_ucr_per_device_hour": int | None, "price_ucr_per_device_hour": int, "devices": list,
    "runs": list, "earned_ucr": int,
    "settled_leases": int, "now_ms": int, "stopped": bool,
}  # fmt: skip
DEVICE = {
    "id": str, "kind": str, "name": str, "memory_bytes": int, "lease": str | None, "trouble": str,
}  # fmt: skip
RUN = {
    "lease": str,
    "epoch": int,
    "job": str,
    "name": str,
    "phase": str,
    "devices": list,
    "step": int,
    "total_steps": int,
    "durable_step": int,
    "cum_device_ms": int,
    "charge_ucr": int,
    "earned_ucr": int,
    "reason": str | None,
}
EARNINGS = {"party": str, "earned_ucr": int, "pending_ucr": int, "charges": list}

# Runs until the file is there; saves when it is asked to stop.
STEPS = """
import os, sys, time
import sublet_ckpt as ckpt
found = ckpt.restore()
step = found.step if found else 0
while not os.path.exists(sys.argv[1]):
    step += 1
    ckpt.progress(step, 400)
    stop = ckpt.should_stop()
    if stop or step % 5 == 0:
        ckpt.save(step, {"state": b"x"})
    if stop:
        ckpt.exit_preempted()
    time.sleep(0.1)
"""


class Owner:
    """Who sits at the machine of one agent."""

    def __init__(self, world: BadMarket, name: str) -> None:
        self.world, self.name = world, name
        self.state = world.market.root / name

    def asks(self, *arguments: str) -> Answer:
        return provider(*arguments, "--state", str(self.state))

    def reads(self, *arguments: str) -> dict[str, Any]:
        done = self.asks(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return dict(json.loads(done.stdout))

    def refused(self, *arguments: str) -> str:
        return refused(self.state, *arguments)

    def runs(self, finish: Path) -> Job:
        """Have a job run here until `finish` exists; return it with a durable step."""
        self.world.offered(self.name)
        job = self.world.submit(
            self.name, ["python3", "-c", STEPS, str(finish)], patience="10s", budget="5"
        )
        self.world.until(job, lambda view: view.durable_step, "a durable step")
        return job


def refused(state: Path, *arguments: str) -> str:
    """Run a command that can't work; with --json the error is an object, too."""
    words = provider(*arguments, "--state", str(state))
    scripted = provider(*arguments, "--state", str(state), "--json")
    assert (words.returncode, scripted.returncode) == (1, 1)
    assert words.stdout == scripted.stdout == ""
    error = json.loads(scripted.stderr)["error"]
    assert words.stderr == f"error: {error}\n"
    return str(error)


def command(*arguments: str, **environment: str) -> Answer:
    """Run `sublet ...` as people do: in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "sublet.cli.main", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def owner(world: BadMarket, request: pytest.FixtureRequest) -> Iterator[Owner]:
    owner = Owner(world, "-".join(re.findall("[a-z0-9]+", request.node.name))[:40])
    yield owner
    if owner.name in world.market.agents:
        world.market.agents[owner.name].stop()


def has(document: dict[str, Any], keys: dict[str, Any]) -> None:
    """Check that these are all the keys, each with a value of its type."""
    assert set(document) == set(keys)
    for key, kind in keys.items():
        assert isinstance(document[key], kind), key
        assert (kind is bool) == isinstance(document[key], bool), key


def test_status_and_earnings_as_json(owner: Owner, tmp_path: Path) -> None:
    world, finish = owner.world, tmp_path / "finish"
    world.agent(owner.name)
    job = owner.runs(finish)

    status = owner.reads("status")
    has(status, STATUS)
    assert (status["connected"], status["trouble"], status["stopped"]) == (True, "", False)
    assert (status["broker"], status["runner"]) == (world.market.url, "process")
    assert status["price_ucr_per_device_hour"] == 400_000
    assert (status["fee_bps"], status["net_ucr_per_device_hour"]) == (500, 380_000)
    assert (status["set_aside"], status["engine_trouble"], status["waits_for"]) == ("", "", [])
    assert (status["earned_ucr"], status["settled_leases"]) == (0, 0)
    assert status["since_ms"] <= status["now_ms"]
    [device], [run] = status["devices"], status["runs"]
    has(device, DEVICE)
    has(run, RUN)
    assert (device["id"], device["kind"], device["lease"]) == ("cpu", "cpu", run["lease"])
    assert (run["job"], run["epoch"], run["name"]) == (job.id, 1, owner.name)
    assert (run["phase"], run["reason"], run["devices"]) == ("running", None, ["cpu"])
    assert run["step"] >= run["durable_step"] > 0
    assert run["total_steps"] == 400
    assert run["cum_device_ms"] > 0
    assert 0 <= run["earned_ucr"] <= run["charge_ucr"]

    finish.write_text("")
    assert world.ended(job).state == "succeeded"
    world.soon(lambda: owner.reads("status")["settled_leases"] == 1, "the settlement")
    world.soon(lambda: not owner.reads("status")["runs"], "the run to be gone")

    # By the agent's own settlements, by the broker's books, by the renter's bill: the same.
    [charge] = job.statement().charges
    earned_ucr = charge.charged_ucr - charge.fee_ucr
    assert earned_ucr > 0
    assert owner.reads("status")["earned_ucr"] == earned_ucr
    earnings = owner.reads("earnings")
    has(earnings, EARNINGS)
    assert (earnings["earned_ucr"], earnings["pending_ucr"]) == (earned_ucr, 0)
    assert [set(item) for item in earnings["charges"]] == [set(Charge.model_fields)]
    assert earnings["charges"][0]["lease"] == charge.lease

    # The same words for people.
    assert f"earned    {format_credits(earned_ucr)} credits in all" in owner.asks("status").stdout
    assert "succeeded" in owner.asks("earnings").stdout
    assert command("provider", "earnings", "--state", str(owner.state)) == owner.asks("earnings")

    # Without the agent: its own word can't be had, the broker's books can.
    world.market.agents[owner.name].stop()
    assert "start `sublet provide`" in owner.refused("status")
    assert "no agent runs" in owner.refused("drain")
    assert owner.reads("earnings") == earnings
    # Started again it remembers what it has earned.
    world.agent(owner.name)
    world.soon(lambda: not owner.asks("status").returncode, "the agent")
    again = owner.reads("status")
    assert (again["earned_ucr"], again["settled_leases"]) == (earned_ucr, 1)


@pytest.mark.parametrize("asked", ["status", "drain", "reclaim", "offer", "earnings"])
def test_a_folder_in_which_no_agent_has_ever_run(asked: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    error = refused(state, asked)
    assert str(state) in error
    assert "--state" in error
    # Asking makes neither folder nor key.
    assert not state.exists()


def test_an_error_as_json_is_an_object_on_stderr(tmp_path: Path) -> None:
    answer = command("provider", "status", "--state", str(tmp_path), "--json")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert str(tmp_path) in json.loads(answer.stderr)["error"]


def test_drain_as_json_is_one_object_at_its_end(owner: Owner, tmp_path: Path) -> None:
    agent = owner.world.agent(owner.name)
    job = owner.runs(tmp_path / "finish")
    status = owner.reads("drain", "--grace", "20s")
    has(status, STATUS)
    assert status["stopping"]
    assert all(run["phase"] == "ended" for run in status["runs"])
    owner.world.soon(lambda: not agent.running, "the agent's end")
    assert agent.process is not None
    assert agent.process.returncode == 0
    assert "handed back" in agent.log_tail(1)
    assert let_go(owner.world, job) > 0


def let_go(world: BadMarket, job: Job) -> int:
    """End the job of a drained run, and return what that was paid: once it is settled, because
    until then a view shows what it would cost if all of it were owed."""
    world.until(job, lambda view: view.runs[0].reason == "provider_drained", "the run's end")
    job.cancel()
    view = world.ended(job)
    assert (view.state, len(view.runs)) == ("cancelled", 1)
    return view.charged_ucr


def test_a_second_ctrl_c_leaves_and_a_start_takes_up(owner: Owner, tmp_path: Path) -> None:
    world = owner.world
    agent = world.agent(owner.name, "--grace", "10m")
    world.offered(owner.name)
    job = world.python(
        owner.name,
        "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(600)\n",
        patience="60s",
        stop_grace="60s",
    )
    world.soon(lambda: "deaf" in world.log(job), "a run that can't hear TERM")
    agent.signal(signal.SIGINT)
    world.soon(lambda: "draining" in agent.log_tail(), "the first answer")
    agent.signal(signal.SIGINT)
    world.soon(lambda: not agent.running, "the agent's end")
    assert "left: 1 run(s) go on without this agent" in agent.log_tail()
    assert world.market.run_processes(job.id)
    # It knows that this run was asked to stop, and keeps to it.
    agent = world.agent(owner.name)
    world.soon(lambda: not owner.asks("status").returncode, "the agent")
    [run] = owner.reads("status")["runs"]
    assert (run["job"], run["phase"]) == (job.id, "draining")
    # And a shorter grace can still be given.
    assert owner.reads("drain", "--grace", "0s")["stopping"]
    world.soon(lambda: not world.market.run_processes(job.id), "the run's end")
    # It saved nothing, so it earned nothing.
    assert let_go(world, job) == 0


def test_the_fee_is_shown_at_the_start(owner: Owner) -> None:
    agent = owner.world.agent(owner.name)
    owner.world.offered(owner.name)
    assert (
        "the broker keeps 5 % of each charge: of 0.40 credits per device-hour you earn 0.38"
        in agent.log_tail()
    )
    assert "0.40 credits per device-hour, 0.38 after the fee" in owner.asks("status").stdout


def test_a_reclaim_outlives_the_agent(owner: Owner, tmp_path: Path) -> None:
    """A crash, or a reboot, is no offer: the owner is at his machine."""
    world = owner.world
    agent = world.agent(owner.name)
    job = owner.runs(tmp_path / "finish")
    assert owner.reads("reclaim", "--grace", "20s")["draining"]
    view = world.until(job, lambda view: view.runs[0].reason, "the run's end")
    assert view.runs[0].reason == "reclaimed"
    for crashes in (True, False):
        if crashes:
            agent.kill()
        else:
            agent.stop()
        agent = world.agent(owner.name)
        world.soon(lambda: owner.asks("status").returncode == 0, "the agent")
        world.soon(lambda: owner.reads("status")["connected"], "its connection")
        assert "nothing is offered until `sublet provider offer`" in agent.log_tail()
        assert owner.reads("status")["draining"]
        assert owner.name not in {offer.name for offer in world.client.offers().offers}
    assert not owner.reads("offer")["draining"]
    world.offered(owner.name)
    (tmp_path / "finish").write_text("")
    assert world.ended(job).state == "succeeded"


def test_two_agents_with_one_key_stop_with_words(owner: Owner) -> None:
    world = owner.world
    first = world.agent(owner.name)
    world.offered(owner.name)
    shutil.copytree(
        owner.state, world.market.root / f"{owner.name}-2", ignore=lambda *_: ["control.sock"]
    )
    second = world.agent(f"{owner.name}-2", region=owner.name)
    world.soon(lambda: not first.running, "the end of the older")
    assert first.process is not None
    assert first.process.returncode == 1
    last = first.log_tail(1)
    assert "error: refused (stale_instance): another agent with this key has joined since" in last
    assert "stop one of the two agents, or give one of them its own --state folder" in last
    # The other isn't driven away in its turn, by whatever starts this one again.
    again = world.agent(owner.name)
    world.soon(lambda: not again.running, "the end of the second start")
    assert "stop that one and delete" in again.log_tail(1)
    time.sleep(2.0)
    assert second.running
    assert json.loads(provider("status", "--state", f"{owner.state}-2", "--json").stdout)[
        "connected"
    ]
    second.stop()


@pytest.mark.parametrize("option", ["--memory", "--disk"])
def test_more_than_there_is_is_wrong_usage(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cpu", "--runner", "process", "--trust", SigningKey.generate().party]
    state = ["--broker", "http://127.0.0.1:9", "--state", str(tmp_path / "state")]
    assert main([*arguments, *state, option, "900TB"]) == 2
    said = capsys.readouterr().out.splitlines()[-1]
    assert f"error: {option}: " in said
    assert "900 TB are asked for: offer less" in said


@pytest.mark.slow
def test_a_drain_ends_though_the_broker_is_away(tmp_path: Path) -> None:
    """What is finished waits on the disk, and is handed over by the next start. The promise itself
    is shown in a second by tests/agent/test_owner_drain.py."""
    world = BadMarket(tmp_path)
    try:
        world.start()
        owner = Owner(world, "alone")
        agent = world.agent("alone")
        job = owner.runs(tmp_path / "finish")
        assert world.market.broker is not None
        world.market.broker.kill()
        world.soon(lambda: not owner.reads("status")["connected"], "the agent to notice")
        # A reclaim frees the device, and returns: it has no end to wait for.
        reclaimed = owner.reads("reclaim", "--grace", "3s")
        assert [run["phase"] for run in reclaimed["runs"]] == ["finishing"]
        began = time.monotonic()
        asked = owner.asks("drain", "--grace", "3s")
        assert time.monotonic() - began < 120
        assert "waiting for job" in asked.stdout
        assert "the broker, which is away" in asked.stdout
        world.soon(lambda: not agent.running, "the agent's end", limit_s=10)
        assert agent.process is not None
        assert agent.process.returncode == 0
        assert f"waits on this disk for the broker (of job {job.id[:10]})" in agent.log_tail(1)
        world.market.restart_broker()
        world.agent("alone")
        world.soon(lambda: owner.asks("offer").returncode == 0, "the agent")
        (tmp_path / "finish").write_text("")
        assert world.ended(job).state == "succeeded"
        world.balanced()
    finally:
        world.stop()


@pytest.mark.parametrize(
    "url", ["broker.example", "http://", "http://:8470", "http://host:99999", "http://host:x"]
)
def test_a_broker_that_can_be_none(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--cpu", "--broker", url, "--state", str(tmp_path / "state")])
    assert caught.value.code == 2
    assert f"--broker {url!r}" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_wrong_usage_is_exit_code_2(tmp_path: Path) -> None:
    answer = command("provide", "--broker", "broker.example", "--state", str(tmp_path / "state"))
    assert answer.returncode == 2
    assert "--broker 'broker.example'" in answer.stderr


def test_sigterm_while_it_starts_drains_too(tmp_path: Path) -> None:
    agent = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sublet.cli.main",
            "provide",
            "--cpu",
            "--runner",
            "process",
            "--trust",
            SigningKey.generate().party,
            "--broker",
            "http://127.0.0.1:9",
            "--state",
            str(tmp_path / "state"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    door = tmp_path / "state" / "control.sock"
    while not door.exists() and agent.poll() is None:
        time.sleep(0.001)  # it has only just come to where it can be asked
    agent.send_signal(signal.SIGTERM)
    said, _ = agent.communicate(timeout=300)
    assert agent.returncode == 0
    assert "draining" in said


@pytest.mark.parametrize("turns", range(4))
async def test_a_signal_is_heeded_whenever_it_came(turns: int) -> None:
    signals = Signals()
    heard: asyncio.Queue[signal.Signals] = asyncio.Queue()
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(turns):  # of the loop, which takes some until it tells
        await asyncio.sleep(0)
    signals.handle_with(heard.put_nowait)
    assert await heard.get() is signal.SIGTERM


def test_the_guide_names_every_key() -> None:
    words = re.findall("[a-z_]+", GUIDE.read_text())
    assert {*STATUS, *DEVICE, *RUN, *EARNINGS} <= set(words)
    shown = {field for view in (Status, DeviceStatus, HeldRun) for field in view.model_fields}
    assert shown == {*STATUS, *DEVICE, *RUN}


# -- a terminal ------------------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal with an agent on it; what it writes is kept."""

    def __init__(self, owner: Owner, *arguments: str, **environment: str) -> None:
        self.owner = owner
        self.main, agent = pty.openpty()
        fcntl.ioctl(agent, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        environ = {**os.environ, **owner.world.market.environment, "TERM": "xterm-256color"}
        for name in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR"):
            environ.pop(name, None)
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "sublet.cli.main",
                "provide",
                "--cpu",
                "--runner",
                "process",
                "--trust",
                owner.world.client.party,
                "--state",
                str(owner.state),
                "--region",
                owner.name,
                "--name",
                owner.name,
                *arguments,
            ],
            stdin=agent,
            stdout=agent,
            stderr=agent,
            env={**environ, **environment},
            start_new_session=True,
        )
        os.close(agent)
        self.written = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # Linux says EIO once nobody has the other side open.
        with contextlib.suppress(OSError):
            while data := os.read(self.main, 65536):
                self.written += data

    def shows(self, words: str) -> None:
        """Wait until these words have been on it, whatever their colours."""
        self.owner.world.soon(lambda: words in ESCAPE.sub("", self.written.decode()), words)

    def ended(self, number: signal.Signals = signal.SIGINT) -> str:
        """Press Ctrl-C (or send another signal), and return all that was written until the end."""
        self.process.send_signal(number)
        assert self.process.wait(300) == 0
        self._reader.join(300)
        return self.written.decode()

    def close(self) -> None:
        """End it, however far it is."""
        self.process.kill()
        self.process.wait()
        self._reader.join(300)
        os.close(self.main)


@pytest.fixture
def terminal(owner: Owner) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str, **environment: str) -> Terminal:
        opened.append(Terminal(owner, *arguments, **environment))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_terminal_gets_a_picture_that_is_gone_at_the_end(
    terminal: Callable[..., Terminal],
) -> None:
    agent = terminal()
    agent.shows("connected for")
    agent.shows("Ctrl-C: drain and stop")
    text = agent.ended()
    assert "draining" in text
    assert "handed back" in text
    # Each line of the last picture is erased, and the cursor is there again.
    last = text[text.rindex("credits in all, 0 leases") :]
    assert last.count(ERASE) == 6
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_broker_that_is_away_is_said_on_the_picture(terminal: Callable[..., Terminal]) -> None:
    agent = terminal("--broker", "http://127.0.0.1:9")
    agent.shows("reconnecting for")
    agent.shows("no connection: nothing answers at 127.0.0.1:9")
    assert "handed back" in agent.ended()


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_lines_where_a_picture_is_not_wanted(
    terminal: Callable[..., Terminal], arguments: tuple[str, ...]
) -> None:
    agent = terminal(*arguments, TERM="xterm" if arguments else "dumb")
    agent.shows("connected")
    text = agent.ended()
    assert "\x1b" not in text
    if arguments:
        assert all(set(json.loads(line)) == {"time_ms", "says"} for line in text.splitlines())


def test_a_closed_terminal_drains(terminal: Callable[..., Terminal]) -> None:
    ours = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup a child would ignore it
    try:
        agent = terminal()
    finally:
        signal.signal(signal.SIGHUP, ours)
    agent.shows("connected for")
    assert "draining" in agent.ended(signal.SIGHUP)


def test_a_thread_that_waits_does_not_keep_the_process() -> None:
    """An answer of the broker's may take for ever; the owner's second Ctrl-C has to end it."""
    code = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from sublet_agent.adapters.shell import THREAD_NAME
from sublet_agent.main import leave_threads
ThreadPoolExecutor(1, thread_name_prefix=THREAD_NAME).submit(threading.Event().wait)
print("last words")
leave_threads(0)
sys.exit("it has not left")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "last words\n", "")
