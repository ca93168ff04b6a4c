"""Ordinary scripts of each framework, killed three times each: they go on at the newest whole step.

None knows of sublet, and none has named a folder to keep: what their libraries write below
`--outputs` is recognised. Each ends with the bytes of a run that nothing disturbed, where its
framework makes the same when it is resumed.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from sublet.client import Client
from sublet.demo.local import LocalMarket
from tests.e2e.scenario import Outcome, Scenario
from tests.e2e.test_trainers import EXAMPLE, PACER, write_reviews
from tests.services import missing, require

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parent / "scripts"
HOLD = Path(__file__).with_name("hold.py")
KILLS = 3
AT_ONCE = 3
"""plays: each has its processes load torch again and again, on two cores"""


@dataclass(frozen=True)
class Way:
    """How a framework's script is run, where it is killed, and what it says of its start."""

    script: str
    arguments: tuple[str, ...]
    """with OUT for its outputs folder"""
    held: tuple[str, ...]
    """lines at which its first three runs stand still; one checkpoint lies between two of them"""
    starts: str
    """an expression: at which step or epoch it starts, in its own words"""
    at: tuple[int, ...]
    """what that says in each run"""
    result: str
    here: bool = False
    """whether it writes into the folder that it is started in"""
    identical: bool = True
    """whether the framework itself makes the same bytes when it is resumed"""


STEPS = ("step 7", "step 12", "step 17")
WAYS = {
    "torch": Way(
        "torch_in_place.py",
        ("20", "0"),
        STEPS,
        r"resume at (\d+)|cold start",
        (0, 7, 12, 17),
        "weights.f32",
        here=True,
    ),
    "peft": Way(
        "lora_epochs.py",
        ("--epochs", "4", "--resume", "--ckpt_dir", "OUT", "--pace_s", "0"),
        ("epoch 0:", "epoch 1:", "epoch 2:"),
        r"resumed from .* at epoch (\d+)",
        (1, 2, 3),
        "epoch_3.pt",
    ),
    "accelerate": Way(
        "accelerate_loop.py",
        ("OUT", "20", "0"),
        STEPS,
        r"starting at step (\d+)",
        (0, 5, 10, 15),
        "weights.safetensors",
    ),
    "diffusers": Way(
        "diffusers_unet.py",
        ("--output_dir", "OUT", "--max_train_steps", "20"),
        STEPS,
        r"starting at step (\d+)",
        (0, 5, 10, 15),
        "unet/diffusion_pytorch_model.safetensors",
    ),
    "lightning": Way(
        "lightning_fit.py",
        ("OUT", "20", "0"),
        STEPS,
        r"starting at step (\d+)",
        (0, 5, 10, 15),
        "weights.safetensors",
        identical=False,  # its loader begins its epoch anew
    ),
    "keras": Way(
        "keras_fit.py",
        ("OUT", "5", "0"),
        ("starting epoch 1", "starting epoch 2", "starting epoch 3"),
        r"starting epoch (\d+)",
        (0, 1, 1, 2, 2, 3, 3, 4),
        "weights.npz",
    ),
    "orbax": Way(
        "orbax_loop.py",
        ("OUT", "20", "0"),
        STEPS,
        r"starting at step (\d+)",
        (0, 5, 10, 15),
        "weights.npz",
    ),
    "trainer": Way(
        str(EXAMPLE),
        ("--data", "DATA", "--output_dir", "OUT", "--max_steps", "20", "--save_steps", "5"),
        ("7", "12", "17"),
        r"starting from .*checkpoint-(\d+)",
        (5, 10, 15),
        "model.safetensors",
    ),
}
NO_ORBAX = find_spec("orbax") is None or find_spec("jax") is None
BY_HAND = "JAX is too large for every environment: pip install 'jax[cpu]' orbax-checkpoint optax"


def play(scenario: Scenario, name: str) -> Outcome:
    """Kill it three times, each time once what it has saved since is durable."""
    way = WAYS[name]
    script = SCRIPTS / way.script
    data = scenario.folder / "reviews.csv"
    write_reviews(data)
    scenario.weights_file = way.result
    known = {"OUT": "/out", "DATA": "/job/reviews.csv"}
    arguments = [known.get(argument, argument) for argument in way.arguments]
    runner = (PACER, "0", ",".join(way.held)) if name == "trainer" else (HOLD, "|".join(way.held))
    scenario.begin(
        command=[
            *(("env", "-C", "/out") if way.here else ()),
            *("python3", f"/job/{runner[0].name}", *runner[1:]),
            *(f"/job/{script.name}", *arguments),
        ],
        inputs={str(file): f"/job/{file.name}" for file in (runner[0], script, data)},
        memory="3GB",
        cpus=1,
        checkpoint_every="1h",
        patience="8s",
    )
    durable = 0
    for kill in range(KILLS):
        # The run may be one that still stands on what the one before it has saved.
        view = scenario.until(
            lambda view, kill=kill, durable=durable: (  # type: ignore[misc]
                len(view.runs) == kill + 1 and view.durable_step > durable
            ),
            f"what it saves before kill {kill + 1}",
        )
        durable = view.durable_step
        if kill == 1:  # its machine dies: a third kill that nobody owns to would pause it
            scenario.kill_agent(scenario.holder(view))
        assert scenario.kill_run(scenario.holder(view)) > 0
    return scenario.finish()


class Played:
    """All of them on one market."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.market = LocalMarket(folder / "market", ray="off")
        self.market.start_broker()
        config = folder / "config"
        self.client = Client(broker=self.market.url, config_dir=config)
        self.client.fund(self.client.party, 40, operator_key=self.market.operator_key)
        self.pool = ThreadPoolExecutor(AT_ONCE)
        self.scenarios: dict[str, Scenario] = {}
        self.outcomes: dict[str, Future[Outcome]] = {}
        for name in names:
            (folder / name).mkdir()
            own = Client(broker=self.market.url, config_dir=config)
            scenario = Scenario(name, self.market, own, "process", "local/python", folder / name)
            self.scenarios[name] = scenario
            self.outcomes[name] = self.pool.submit(play, scenario, name)

    def undisturbed(self, name: str) -> bytes:
        """Return the result of a run here, without any market."""
        way = WAYS[name]
        place, data = self.folder / "undisturbed" / name, self.folder / name / "reviews.csv"
        place.mkdir(parents=True)
        known = {"OUT": str(place), "DATA": str(data)}
        subprocess.run(
            [sys.executable, str(SCRIPTS / way.script), *(known.get(a, a) for a in way.arguments)],
            cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
        return (place / way.result).read_bytes()

    def close(self) -> None:
        """Stop everything."""
        self.pool.shutdown(cancel_futures=True)
        self.client.close()
        self.market.stop()


@pytest.fixture(scope="module")
def played(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Played]:
    """The plays of the frameworks that were chosen."""
    chosen = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == Path(__file__)
    ]
    here = [] if missing("frameworks") else [n for n in chosen if n != "orbax" or not NO_ORBAX]
    played = Played(tmp_path_factory.mktemp("frameworks"), here)
    yield played
    played.close()


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in WAYS if name != "orbax"),
        pytest.param("orbax", marks=pytest.mark.skipif(NO_ORBAX, reason=BY_HAND)),
    ],
)
def test_a_script_that_is_killed_three_times_goes_on_each_time_at_its_newest_whole_step(
    played: Played, name: str
) -> None:
    require("frameworks")
    outcome, way = played.outcomes[name].result(), WAYS[name]
    view = outcome.view
    assert view.state == "succeeded", view.says
    log = [line.text for line in played.scenarios[name].submitted.logs()]
    assert len(view.runs) == KILLS + 1
    for before, after in zip(view.runs, view.runs[1:], strict=False):
        assert after.start_step == before.durable_step > before.start_step
    said = [match for line in log if (match := re.fullmatch(way.starts + ".*", line))]
    assert tuple(int(match[1] or 0) for match in said) == way.at
    assert outcome.weights is not None
    if way.identical:
        assert outcome.weights == played.undisturbed(name)
    assert outcome.verdict.holds, outcome.verdict.problems
    assert outcome.statement.lost_work_charged_ucr == 0
