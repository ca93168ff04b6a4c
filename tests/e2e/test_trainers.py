"""Scripts that have never heard of sublet: their machine is lost, and their weights are the same.

A Hugging Face Trainer script (the one of sdk/examples, unchanged) saves below its output folder and
starts from the last checkpoint there. All state must come back: weights, AdamW, schedule, dropout's
generator, the order of the data. A second script writes its checkpoints as Lightning does and, as
it does, ends with exit code 0 when it is asked to stop.
"""

import csv
import os
import random
import signal
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
LIGHTNING = Path(__file__).with_name("lightning_job.py")
PACER = Path(__file__).with_name("trainer_job.py")
STEPS, SAVE_STEPS = 60, 10
PACE_S = 0.3
HOLD_AT = 45
WORDS = {0: ("dull", "poor", "slow", "bad"), 1: ("good", "fine", "bright", "warm")}


def write_reviews(path: Path) -> None:
    """Write a CSV of made-up reviews, the same each time."""
    generator = random.Random(5)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "label"))
        for _ in range(120):
            label = generator.randrange(2)
            words = [
                generator.choice(WORDS[label if generator.random() < 0.8 else 1 - label])
                for _ in range(8)
            ]
            rows.writerow((" ".join(words), label))


def write_numbers(path: Path) -> None:
    """Write a CSV of four numbers and what is to be learnt from them."""
    generator = random.Random(6)
    rows = [[generator.gauss(0.0, 1.0) for _ in range(4)] for _ in range(80)]
    path.write_text("".join(",".join(map(str, [*row, sum(row) / 2])) + "\n" for row in rows))


def undisturbed(script: Path, options: list[str], weights: Path) -> bytes:
    """Return the weights that a script makes here, without any market."""
    weights.parent.mkdir()
    subprocess.run(
        [sys.executable, str(script), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return weights.read_bytes()


def arguments(data: Path | str, out: Path | str) -> list[str]:
    """Return the example's arguments."""
    return [
        "--data",
        str(data),
        "--output_dir",
        str(out),
        "--max_steps",
        str(STEPS),
        "--save_steps",
        str(SAVE_STEPS),
    ]


def lightning_arguments(data: Path | str, out: Path | str, pace_s: float) -> list[str]:
    """Return the arguments of the script that behaves as Lightning's do."""
    return [
        "--data",
        str(data),
        "--out",
        str(out),
        "--steps",
        str(STEPS),
        "--every",
        str(SAVE_STEPS),
        "--pace-s",
        str(pace_s),
    ]


def machine_dies(scenario: Scenario, data: Path) -> Outcome:
    """The Trainer's script; kill -9 of agent and run, after the second durable checkpoint."""
    scenario.begin(
        command=[
            sys.executable,
            "/job/trainer_job.py",
            str(PACE_S),
            str(HOLD_AT),
            "/job/trainer.py",
            *arguments("/data/reviews.csv", "/out"),
        ],
        inputs={
            str(PACER): "/job/trainer_job.py",
            str(EXAMPLE): "/job/trainer.py",
            str(data / "reviews.csv"): "/data/reviews.csv",
        },
        memory="3GB",
        patience="8s",
    )
    view = scenario.until_durable(2 * SAVE_STEPS)
    index = scenario.holder(view)
    scenario.kill_agent(index)
    assert scenario.kill_run(index) > 0
    return scenario.finish()


def machine_is_reclaimed(scenario: Scenario, data: Path) -> Outcome:
    """Lightning's manners; its machine is taken back with notice."""
    scenario.begin(
        command=[
            sys.executable,
            "/job/lightning_job.py",
            *lightning_arguments("/data/numbers.csv", "/out", PACE_S),
            "--hold-at",
            str(HOLD_AT),
        ],
        inputs={
            str(LIGHTNING): "/job/lightning_job.py",
            str(data / "numbers.csv"): "/data/numbers.csv",
        },
    )
    index = scenario.holder(scenario.until_durable(2 * SAVE_STEPS))
    scenario.market.agents[scenario.agent_name(index)].signal(signal.SIGTERM)
    return scenario.finish()


SCENARIOS = {
    "trainer": (machine_dies, "model.safetensors"),
    "lightning": (machine_is_reclaimed, "weights.json"),
}


class Trained:
    """The faults, played at once on one market, and the weights of an undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.market = LocalMarket(folder / "market", ray="off")
        self.market.start_broker()
        config = folder / "config"
        self.client = Client(broker=self.market.url, config_dir=config)
        self.client.fund(self.client.party, 20, operator_key=self.market.operator_key)
        write_reviews(folder / "reviews.csv")
        write_numbers(folder / "numbers.csv")
        self.pool = ThreadPoolExecutor(len(SCENARIOS))
        self.outcomes: dict[str, Future[Outcome]] = {}
        for name, (play, weights_file) in SCENARIOS.items():
            (folder / name).mkdir()
            scenario = Scenario(
                name,
                self.market,
                Client(broker=self.market.url, config_dir=config),
                "process",
                "local/python",
                folder / name,
                weights_file=weights_file,
            )
            self.outcomes[name] = self.pool.submit(play, scenario, folder)
        self.undisturbed = {
            "trainer": undisturbed(
                EXAMPLE,
                arguments(folder / "reviews.csv", folder / "a"),
                folder / "a" / "model.safetensors",
            ),
            "lightning": undisturbed(
                LIGHTNING,
                lightning_arguments(folder / "numbers.csv", folder / "b", 0),
                folder / "b" / "weights.json",
            ),
        }

    def same(self, name: str, outcome: Outcome) -> None:
        """Assert what both outcomes must satisfy."""
        view = outcome.view
        assert view.state == "succeeded", view.says
        assert len(view.runs) == 2
        assert view.runs[0].provider != view.runs[1].provider
        assert outcome.weights is not None
        assert sha256(outcome.weights) == sha256(self.undisturbed[name])
        assert outcome.verdict.holds, outcome.verdict.problems
        assert outcome.statement.lost_work_charged_ucr == 0

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
    trained.same("trainer", outcome)
    first, second = outcome.view.runs
    assert first.reason == "provider_lost"
    assert second.start_step >= 2 * SAVE_STEPS
    assert second.start_step % SAVE_STEPS == 0


def test_a_script_that_leaves_with_0_when_its_machine_is_reclaimed_goes_on_elsewhere(
    trained: Trained,
) -> None:
    outcome = trained.outcomes["lightning"].result()
    trained.same("lightning", outcome)
    first, second = outcome.view.runs
    assert first.reason == "provider_drained"
    assert second.start_step >= 2 * SAVE_STEPS
