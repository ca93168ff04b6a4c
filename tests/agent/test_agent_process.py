"""The agent as a process, against the real broker as a process: killed, drained, reclaimed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sublet.demo.local import LocalMarket
from sublet_agent.adapters.process import exit_events
from sublet_contracts.keys import SigningKey
from sublet_contracts.states import LeaseState
from tests.agent.owners_command import provider
from tests.agent.renter import Renter
from tests.e2e.bad_market import BadMarket

TRAINING = Path(__file__).parents[1] / "e2e" / "training_job.py"
LIMIT_S = 240.0
NAME = "place"


def until(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {limit_s:.0f} s for {what}")
        time.sleep(0.1)
    return found


class Place:
    """One agent's folder, at the tests' broker. It serves this renter, whom nobody else serves."""

    def __init__(self, market: LocalMarket) -> None:
        self.log = (market.root / "logs" / f"{NAME}.log").open("ab")
        self.url = market.url
        self.renter = Renter(self.url, SigningKey.load_or_create(market.operator_key))
        self.renter.introduce()
        self.state = market.root / NAME
        self.agent: subprocess.Popen[bytes] | None = None

    def start_agent(self) -> None:
        self.agent = subprocess.Popen(
            [
                *(sys.executable, "-m", "sublet_agent.main", "--broker", self.url),
                *("--state", str(self.state), "--name", NAME, "--cpu", "--memory", "1GB"),
                *("--runner", "process", "--trust", self.renter.key.party),
            ],
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        until(lambda: self.command("status").get("connected"), "the agent to connect")
        until(self.offers, "an offer")

    def offers(self) -> bool:
        offers = self.renter.call("GET", "/v1/offers").json()["offers"]
        return any(offer["name"] == NAME for offer in offers)

    def kill_agent(self) -> None:
        assert self.agent
        self.agent.kill()
        self.agent.wait()

    def job_process(self) -> int:
        """Return the pid of the one job that runs here."""
        (found,) = (
            record
            for record in (self.state / "engine" / "runs").glob("*/running.json")
            if not (record.parent / "exit.json").exists()
        )
        return int(json.loads(found.read_text())["job_pid"])

    def command(self, *arguments: str) -> dict[str, Any]:
        found = provider(*arguments, "--state", str(self.state), "--json")
        return dict(json.loads(found.stdout)) if found.returncode == 0 else {}

    def submit(self, steps: int = 60, hold_at: int = 0, **changes: Any) -> str:
        return self.renter.submit(
            TRAINING,
            "--steps",
            str(steps),
            "--every",
            "5",
            "--pace-s",
            "0.1",
            "--out",
            "/out",
            "--hold-at",
            str(hold_at),
            **changes,
        )

    def finished(self, job: str) -> Any:
        until(lambda: self.renter.job(job).state in ("succeeded", "failed"), "the job's end")
        return self.renter.job(job)

    def close(self) -> None:
        if self.agent and self.agent.poll() is None:
            self.agent.send_signal(signal.SIGCONT)
            self.agent.terminate()
            try:
                self.agent.wait(300)
            except subprocess.TimeoutExpired:
                self.agent.kill()
        self.log.close()


@pytest.fixture(scope="module")
def place(world: BadMarket) -> Iterator[Place]:
    place = Place(world.market)
    try:
        yield place
    finally:
        place.close()


@pytest.fixture
def agent(place: Place) -> Place:
    if place.agent is None or place.agent.poll() is not None:
        place.start_agent()
    return place


def output_of(place: Place, job: str) -> list[str]:
    return [str(json.loads(line)["text"]) for line in place.renter.logs(job)]


@pytest.mark.slow
def test_a_killed_agent_takes_its_run_up_again(agent: Place) -> None:
    job = agent.submit(80)
    until(lambda: agent.renter.job(job).durable_step >= 10, "a durable checkpoint")
    agent.kill_agent()
    agent.start_agent()
    view = agent.finished(job)
    assert view.state == "succeeded"
    assert view.recoveries == 0
    assert len(view.runs) == 1
    # Neither a line twice nor one missing.
    steps = [line.split()[1] for line in output_of(agent, job) if line.startswith("step ")]
    assert steps == [str(number) for number in range(1, 81)]


@pytest.mark.slow
def test_reclaim_loses_nothing_and_is_paid(agent: Place) -> None:
    job = agent.submit(80, hold_at=42)
    until(lambda: agent.renter.job(job).durable_step >= 5, "a durable checkpoint")
    status = agent.command("reclaim", "--grace", "20s")
    assert status["draining"]
    assert all(run["phase"] == "ended" for run in status["runs"])
    agent.command("offer")
    view = agent.finished(job)
    assert view.state == "succeeded"
    first, second = view.runs
    assert first.reason == "reclaimed"
    assert second.start_step == first.durable_step
    assert first.charge_ucr > 0
    steps = [int(line.split()[1]) for line in output_of(agent, job) if line.startswith("step ")]
    assert steps == list(range(1, 81))


def test_a_failing_job_brings_its_last_words(agent: Place, tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text("print('about to fail', flush=True)\nraise SystemExit(3)\n")
    view = agent.finished(agent.renter.submit(script, outputs=""))
    assert view.state == "failed"
    assert view.reason == "job_failed"
    assert "about to fail" in output_of(agent, view.id)


ENDS_WITH_0 = """
import os, signal, sys, time
def leave(*_):
    print("asked to end", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("up", flush=True)
time.sleep(600)
open(os.environ["SUBLET_OUTPUT_DIR"] + "/model", "w").write("trained")
"""


def test_an_end_that_somebody_else_asked_for_is_no_success(agent: Place, tmp_path: Path) -> None:
    """Exit code 0, and nothing says that it had finished: it goes on, and the time is free."""
    script = tmp_path / "ends_with_0.py"
    script.write_text(ENDS_WITH_0)
    job = agent.renter.submit(script)
    until(lambda: "up" in output_of(agent, job), "the job to be up")
    subprocess.run(["kill", "-TERM", str(agent.job_process())], check=True)
    closed = LeaseState.CLOSED
    until(lambda: agent.renter.job(job).runs[0].lease_state is closed, "the first run's end")
    view = agent.renter.job(job)
    assert view.state not in ("succeeded", "failed")
    assert (view.runs[0].reason, view.runs[0].charge_ucr) == ("run_killed", 0)
    assert "TERM came from outside of the run" in view.runs[0].detail
    until(lambda: output_of(agent, job).count("up") == 2, "the job to go on")
    agent.renter.call("POST", f"/v1/jobs/{job}/cancel")
    until(lambda: not agent.command("status")["runs"], "the cancelled run to be gone")


@pytest.mark.parametrize("code", [137, 143])
def test_a_code_like_a_signals_is_the_jobs_own_and_is_paid(
    agent: Place, tmp_path: Path, code: int
) -> None:
    if why := exit_events.why_not():
        pytest.skip(f"the kernel's process events can't be followed: {why}")
    script = tmp_path / "returns.py"
    script.write_text(f"import sys, time\nprint('42')\ntime.sleep(1)\nsys.exit({code})\n")
    view = agent.finished(agent.renter.submit(script, outputs=""))
    assert (view.state, view.reason, len(view.runs)) == ("failed", "job_failed", 1)
    assert view.runs[0].charge_ucr > 0


def test_sigterm_drains_and_ends(agent: Place) -> None:
    job = agent.submit(200)
    until(lambda: agent.renter.job(job).durable_step >= 5, "a durable checkpoint")
    assert agent.agent
    agent.agent.terminate()
    assert agent.agent.wait(300) == 0
    first = agent.renter.job(job).runs[0]
    assert first.reason == "provider_drained"
    assert first.charge_ucr > 0
    agent.renter.call("POST", f"/v1/jobs/{job}/cancel")


def test_a_second_agent_with_the_same_state_is_refused(agent: Place) -> None:
    second = subprocess.run(
        [
            sys.executable,
            "-m",
            "sublet_agent.main",
            "--broker",
            agent.url,
            "--state",
            str(agent.state),
            "--cpu",
        ],
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert second.returncode == 1
    assert b"another agent is using" in second.stdout
    assert os.path.exists(agent.state / "lock")


@pytest.mark.slow
def test_a_sleeper_that_wakes_stops_what_went_elsewhere(agent: Place) -> None:
    if agent.agent is None or agent.agent.poll() is not None:
        agent.start_agent()
    job = agent.submit(400, patience_ms=10_000)
    until(lambda: agent.renter.job(job).durable_step >= 5, "a durable checkpoint")
    assert agent.agent
    agent.agent.send_signal(signal.SIGSTOP)
    until(
        lambda: agent.renter.job(job).recoveries or agent.renter.job(job).state == "recovering",
        "the machine to count as lost",
    )
    agent.agent.send_signal(signal.SIGCONT)
    until(lambda: len(agent.renter.job(job).runs) == 2, "the next run")
    first = agent.renter.job(job).runs[0]
    assert first.reason == "provider_lost"
    until(lambda: len(agent.command("status")["runs"]) == 1, "the first run to be gone")
    assert agent.command("status")["runs"][0]["lease"] != first.lease
    until(lambda: agent.renter.job(job).durable_step > first.durable_step, "new progress")
    agent.renter.call("POST", f"/v1/jobs/{job}/cancel")
    until(lambda: not agent.command("status")["runs"], "the cancelled run to be gone")
