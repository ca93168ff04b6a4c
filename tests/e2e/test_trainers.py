"""Scripts that have never heard of sublet: their machine is lost, and their weights are the same.

A Hugging Face Trainer script (the one of sdk/examples, unchanged) saves below its output folder and
starts from the last checkpoint there. All state must come back: weights, AdamW, schedule, dropout's
generator, the order of the data.
"""

import csv
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from sublet.client import Client
from sublet.demo.local import LocalMarket
from tests.e2e.scenario import Outcome, Scenario, sha256
from tests.services import require

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "sdk" / "examples" / "trainer.py"
PACER = Path(__file__).with_name("trainer_job.py")
STEPS, SAVE_STEPS = 60, 10
PACE_S = 0.3
WORDS = {0: ("dull", "poor", "slow", "bad"), 1: ("good", "fine", "bright", "warm")}


def write_reviews(path: Path) -> None:
    """Write a CSV of made-up reviews, the same each time."""
    generator = random.Random(5)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "label"))
        for _ in range(120):
            label = generator.randrange(2)
            words = [generator.choice(WORDS[label if generator.random() < 0.8 else 1 - label])
                     for _ in range(8)]  # fmt: skip
            rows.writerow((" ".join(words), label))


def arguments(data: Path | str, out: Path | str) -> list[str]:
    """Return the example's arguments."""
    return ["--data", str(data), "--output_dir", str(out), "--max_steps", str(STEPS),
            "--save_steps", str(SAVE_STEPS)]  # fmt: skip


def submit(scenario: Scenario, data: Path) -> None:
    """Start the agents and submit the example, paced."""
    scenario.begin(
        command=[sys.executable, "/job/trainer_job.py", str(PACE_S), "/job/trainer.py",
                 *arguments("/data/reviews.csv", "/out")],
        inputs={
            str(PACER): "/job/trainer_job.py",
            str(EXAMPLE): "/job/trainer.py",
            str(data): "/data/reviews.csv",
        },
        memory="3GB",
        patience="8s",
    )  # fmt: skip


def machine_dies(scenario: Scenario, data: Path) -> Outcome:
    """kill -9 of agent and run, after the second durable checkpoint."""
    submit(scenario, data)
    view = scenario.until_durable(2 * SAVE_STEPS)
    index = scenario.holder(view)
    scenario.kill_agent(index)
    assert scenario.kill_run(index) > 0
    return scenario.finish()


class Trained:
    """The faults, played at once on one market, and the weights of an undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.market = LocalMarket(folder / "market")
        self.market.start_broker()
        config = folder / "config"
        self.client = Client(broker=self.market.url, config_dir=config)
        self.client.fund(self.client.party, 20, operator_key=self.market.operator_key)
        data = folder / "reviews.csv"
        write_reviews(data)
        self.pool = ThreadPoolExecutor(2)
        self.outcomes: dict[str, Future[Outcome]] = {}
        for name, play in {"trainer": machine_dies}.items():
            (folder / name).mkdir()
            scenario = Scenario(
                name, self.market, Client(broker=self.market.url, config_dir=config), "process",
                "local/python", folder / name, weights_file="model.safetensors",
            )  # fmt: skip
            self.outcomes[name] = self.pool.submit(play, scenario, data)
        subprocess.run(
            [sys.executable, str(EXAMPLE), *arguments(data, folder / "undisturbed")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
        self.reference = (folder / "undisturbed" / "model.safetensors").read_bytes()

    def close(self) -> None:
        """Stop everything."""
        self.pool.shutdown(cancel_futures=True)
        self.client.close()
        self.market.stop()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    require("torch")
    played = Trained(tmp_path_factory.mktemp("trainers"))
    yield played
    played.close()


def test_a_trainer_script_goes_on_elsewhere_and_ends_with_the_same_weights(
    trained: Trained,
) -> None:
    outcome = trained.outcomes["trainer"].result()
    view = outcome.view
    assert view.state == "succeeded", view.says
    first, second = view.runs
    assert first.reason == "provider_lost"
    assert first.provider != second.provider
    assert second.start_step >= 2 * SAVE_STEPS
    assert second.start_step % SAVE_STEPS == 0
    assert outcome.weights is not None
    assert sha256(outcome.weights) == sha256(trained.reference)
    assert outcome.verdict.holds, outcome.verdict.problems
    assert outcome.statement.lost_work_charged_ucr == 0
