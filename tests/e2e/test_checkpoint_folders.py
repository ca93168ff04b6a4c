"""Scripts as researchers write them, with --checkpoint: lost, and gone on with to the same bytes.

None of them knows sublet. One moves a pickle into its outputs folder; one writes the same file in
its working folder over and over, in place; one leaves a file for each ten steps; one is a shell's.
Each is killed, by kill -9 of its run or of run and agent at once. One more only grows a file that
it keeps open: nothing of that is durable, and nothing is paid for it where its machine is at fault.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from sublet.client import Client
from sublet.demo.local import LocalMarket
from tests.e2e.scenario import Outcome, Scenario

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("folder_job.py")
TORN = Path(__file__).with_name("torn_job.py")
STEPS, HOLD_AT = 40, 30
PACE_S = 0.1


@dataclass(frozen=True)
class Way:
    """How a script saves, and how it is lost."""

    folder: str
    """as the command names it"""
    checkpoint: str
    """as --checkpoint names it"""
    lost_by: str = "kill -9 of the run"


WAYS = {
    "atomic": Way("/out", "/out"),
    "inplace": Way(".", ".", "kill -9 of run and agent"),
    "epochs": Way("ckpts", "./ckpts", "kill -9 of run and agent"),
    "shell": Way("/state/here", "/state"),
    "growing": Way("ckpts", "ckpts", "its owner"),
}


def play(scenario: Scenario, name: str) -> Outcome:
    """Lose it once something of it is durable, or has had the time to be."""
    way = WAYS[name]
    scenario.begin(
        command=[
            *("python3", "/job/folder_job.py", name, "--folder", way.folder, "--out", "/out"),
            *("--steps", str(STEPS), "--pace-s", str(PACE_S), "--hold-at", str(HOLD_AT)),
        ],
        inputs={str(SCRIPT): "/job/folder_job.py"},
        checkpoint=way.checkpoint,
        checkpoint_every="2s",
        patience="8s",
        stop_grace="2s",
    )
    if name == "growing":
        said = "state.bin is open for writing"
        view = scenario.until(lambda _: said in log_of(scenario), f"a line that says {said!r}")
    else:
        view = scenario.until_durable(1)
    index = scenario.holder(view)
    match way.lost_by:
        case "its owner":
            scenario.market.agents[scenario.agent_name(index)].signal(signal.SIGTERM)
        case "kill -9 of run and agent":
            scenario.kill_agent(index)
            assert scenario.kill_run(index) > 0
        case _:
            assert scenario.kill_run(index) > 0
    outcome = scenario.finish()
    outcome.notes["first"], outcome.notes["second"] = begins(scenario)
    return outcome


def play_torn(scenario: Scenario) -> Outcome:
    """Case 15 of those from the world: killed when a torn checkpoint lies beside a whole one."""
    scenario.begin(
        command=["python3", "/job/torn_job.py"],
        inputs={str(TORN): "/job/torn_job.py"},
        checkpoint_every="2s",
    )
    scenario.until(lambda _: "both are there" in log_of(scenario), "both checkpoints")
    assert scenario.kill_run(scenario.holder(scenario.submitted.view())) > 0
    return scenario.finish()


def log_of(scenario: Scenario) -> str:
    return "\n".join(line.text for line in scenario.submitted.logs())


def begins(scenario: Scenario) -> list[float]:
    """Return at which step each of its runs began, by its own word."""
    return [float(step) for step in re.findall(r"begins at step (\d+)", log_of(scenario))]


class Played:
    """All ways at once on one market, and the weights of a run that nobody disturbs."""

    def __init__(self, folder: Path) -> None:
        self.market = LocalMarket(folder / "market", ray="off")
        self.market.start_broker()
        config = folder / "config"
        client = Client(broker=self.market.url, config_dir=config)
        client.fund(client.party, 20, operator_key=self.market.operator_key)
        self.pool = ThreadPoolExecutor(2)
        self.outcomes: dict[str, Future[Outcome]] = {}
        for name in WAYS:
            (folder / name).mkdir()
            own = Client(broker=self.market.url, config_dir=config)
            scenario = Scenario(name, self.market, own, "process", "local/python", folder / name)
            self.outcomes[name] = self.pool.submit(play, scenario, name)
        (folder / "torn").mkdir()
        own = Client(broker=self.market.url, config_dir=config)
        scenario = Scenario("torn", self.market, own, "process", "local/python", folder / "torn")
        self.outcomes["torn"] = self.pool.submit(play_torn, scenario)
        quick = [sys.executable, str(SCRIPT), "atomic", "--steps", str(STEPS)]
        subprocess.run(
            [*quick, "--folder", str(folder / "here"), "--out", str(folder / "there")], check=True
        )
        self.undisturbed = (folder / "there" / "weights.json").read_bytes()

    def close(self) -> None:
        """Stop everything."""
        self.pool.shutdown(cancel_futures=True)
        self.market.stop()


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    played = Played(tmp_path_factory.mktemp("folders"))
    yield played
    played.close()


@pytest.mark.parametrize("name", [name for name in WAYS if name != "growing"])
def test_a_script_goes_on_elsewhere_from_its_folder_and_ends_with_the_same_bytes(
    played: Played, name: str
) -> None:
    outcome = played.outcomes[name].result()
    assert outcome.view.state == "succeeded", outcome.view.says
    first, second = outcome.view.runs
    assert first.start_step == 0
    assert second.start_step >= 1
    assert outcome.notes["first"] == 0
    assert 0 < outcome.notes["second"] <= HOLD_AT
    assert outcome.weights == played.undisturbed
    assert outcome.verdict.holds, outcome.verdict.problems
    assert outcome.statement.lost_work_charged_ucr == 0


def test_a_file_that_is_never_closed_is_neither_durable_nor_paid_for(played: Played) -> None:
    outcome = played.outcomes["growing"].result()
    first, second = outcome.view.runs
    assert first.reason == "provider_drained"
    assert first.charge_ucr == first.payable_device_ms == 0 < first.cum_device_ms
    assert second.start_step == 0
    assert outcome.notes["second"] == 0
    assert outcome.weights == played.undisturbed
    assert outcome.verdict.holds, outcome.verdict.problems


def test_an_empty_optimizer_is_torn_and_the_checkpoint_before_it_is_gone_on_from(
    played: Played,
) -> None:
    outcome = played.outcomes["torn"].result()
    assert outcome.view.state == "succeeded", outcome.view.says
    assert [run.start_step for run in outcome.view.runs] == [0, 100]
    assert outcome.weights == b'["checkpoint-100"]'
