"""Ordinary scripts, which know nothing of sublet: killed, gone on elsewhere, all brought back.

Each test has a play of its own: a script, a machine or run that is taken away, and what came of
it. The plays of the tests that were chosen run at once, on one market. Where a script saves
something, in whatever way, `--checkpoint` names the folder and the job ends with the bytes of an
undisturbed one; where nothing can be resumed, its owner is told while it runs.
"""

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sublet.client import Client, Job
from sublet.demo.local import LocalMarket
from sublet_contracts.api import JobView
from sublet_contracts.job_warnings import WarningCode
from tests.e2e.scenario import Outcome, Scenario
from tests.e2e.test_trainers import PACER, write_numbers
from tests.services import Service, missing, require

HERE = Path(__file__).parent
SCRIPTS = HERE / "scripts"
LIGHTNING = HERE / "lightning_job.py"
HOLD, HOLD_SHELL = HERE / "hold.py", HERE / "hold.sh"
INTERVAL_S = 3
PATIENCE = "8s"


@dataclass
class Played:
    """What a play came to."""

    outcome: Outcome
    out: Path
    """what was downloaded in the end"""
    log: list[str]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def view(self) -> JobView:
        """The job in the end."""
        return self.outcome.view


Play = Callable[[Scenario], Played]
Test = Callable[["Plays"], None]
PLAYED_BY: dict[str, tuple[Play, str]] = {}
"""test -> its play, and the image that it needs: python, torch, or none (on the process runner)"""


def shows(play: Play, image: str) -> Callable[[Test], Test]:
    """Say what a test looks at."""

    def noted(test: Test) -> Test:
        PLAYED_BY[test.__name__] = (play, image)
        return test

    return noted


def needed(test: str) -> tuple[Service, ...]:
    """Return what must be here for the play of a test."""
    found: dict[str, tuple[Service, ...]] = {
        "none": ("torch",),
        "python": ("docker",),
        "torch": ("torch", "docker"),
    }
    return found[PLAYED_BY[test][1]]


# -- plays ---------------------------------------------------------------------------------------


def begin(
    scenario: Scenario, command: list[str], *files: Path, agents: int = 2, **more: object
) -> Job:
    """Submit a script, its files below /job; no outputs folder unless one is named."""
    options: dict[str, object] = {
        "command": command,
        "inputs": {str(file): f"/job/{file.name}" for file in files},
        "outputs": "",
        "checkpoint_every": INTERVAL_S,
        "patience": PATIENCE,
        "memory": "1GB",
        "cpus": 1,
    }
    return scenario.begin(agents, **{**options, **more})  # type: ignore[arg-type]


def held(words: str, script: str, *arguments: str) -> list[str]:
    """Return the command of a Python script that stops short of its end in its first run."""
    return ["python3", "/job/hold.py", words, f"/job/{script}", *arguments]


def machine_dies(scenario: Scenario) -> None:
    """kill -9 of agent and run at once."""
    index = scenario.holder(scenario.submitted.view())
    scenario.kill_agent(index)
    assert scenario.kill_run(index) > 0


def run_dies(scenario: Scenario) -> None:
    """kill -9 of the run alone."""
    assert scenario.kill_run(scenario.holder(scenario.submitted.view())) > 0


def ended(scenario: Scenario, **notes: str) -> Played:
    """Wait for the end, bring back all that there is, read the whole log."""
    outcome = scenario.finish()
    out = scenario.folder / "out"
    if outcome.view.state != "succeeded":
        scenario.submitted.download(out)
    log = [f"{line.epoch} {line.text}" for line in scenario.submitted.logs()]
    return Played(outcome, out, log, notes)


def numpy_goes_on(lost_by: Callable[[Scenario], None], pace_s: float) -> Play:
    """Return a play: the outputs folder is the checkpoint as well."""

    def play(scenario: Scenario) -> Played:
        scenario.weights_file = "weights.npy"
        script = SCRIPTS / "numpy_pickle.py"
        command = held("step 30", script.name, "/out", "40", str(pace_s))
        begin(scenario, command, HOLD, script, outputs="/out", checkpoint="/out")
        scenario.until_durable(1)
        lost_by(scenario)
        return ended(scenario)

    return play


def numpy_is_warned(scenario: Scenario) -> Played:
    """The same without a word of what it resumes from: it's told, loses its run, begins again."""
    scenario.weights_file = "weights.npy"
    script = SCRIPTS / "numpy_pickle.py"
    begin(scenario, held("step 30", script.name, "/out"), HOLD, script, outputs="/out")
    warned = WarningCode.NOTHING_SAVED
    scenario.until(lambda view: any(w.code == warned for w in view.warnings), "the warning")
    shown = scenario.market.command("inspect", scenario.submitted.id)
    run_dies(scenario)
    return ended(scenario, shown=shown)


def torch_goes_on(scenario: Scenario) -> Played:
    """Its working folder is named; the run dies."""
    scenario.weights_file = "weights.f32"
    script = SCRIPTS / "torch_in_place.py"
    begin(scenario, held("step 30", script.name), HOLD, script, checkpoint=".")
    scenario.until_durable(1)
    run_dies(scenario)
    return ended(scenario)


def lora_goes_on(scenario: Scenario) -> Played:
    """A folder in the working folder is named; the machine dies."""
    scenario.weights_file = "adapter/adapter_model.safetensors"
    script = SCRIPTS / "lora_epochs.py"
    command = held("epoch 6:", script.name, "--resume")
    begin(scenario, command, HOLD, script, checkpoint="checkpoints")
    scenario.until_durable(1)
    machine_dies(scenario)
    return ended(scenario)


def trainer_goes_on(manner: str) -> Play:
    """Return the play of one of the Trainer's manners: its results are named, the machine dies."""

    def play(scenario: Scenario) -> Played:
        scenario.weights_file = "final/model.safetensors"
        script = SCRIPTS / "trainer_blog.py"
        command = ["python3", "/job/trainer_job.py", "0.4", "24", f"/job/{script.name}", manner]
        begin(scenario, command, PACER, script, checkpoint="results", memory="2GB")
        scenario.until_durable(10)
        machine_dies(scenario)
        return ended(scenario)

    return play


def lightning_goes_on(scenario: Scenario) -> Played:
    """Lightning's manners in the working folder, in place of those in the outputs folder."""
    numbers = scenario.folder / "numbers.csv"
    write_numbers(numbers)
    scenario.weights_file = "lightning_logs/weights.json"
    command = [
        *("python3", "/job/lightning_job.py", "--data", "/job/numbers.csv"),
        *("--out", "lightning_logs", "--steps", "60", "--every", "10", "--pace-s", "0.3"),
        *("--hold-at", "45"),
    ]
    begin(scenario, command, LIGHTNING, numbers, checkpoint="lightning_logs")
    scenario.until_durable(1)
    run_dies(scenario)
    return ended(scenario)


def shell_goes_on(scenario: Scenario) -> Played:
    """A shell script's working folder is named; the machine dies."""
    scenario.weights_file = "distinct"
    script = SCRIPTS / "count.sh"
    command = ["sh", "-c", ". /job/hold.sh; . /job/count.sh", "count.sh", "30", "0.1"]
    begin(
        *(scenario, command, HOLD_SHELL, script),
        checkpoint=".",
        env={"HOLD": "at 22"},
        patience="5s",
        memory="256MB",
    )
    scenario.until_durable(1)
    machine_dies(scenario)
    return ended(scenario)


def fails(scenario: Scenario) -> Played:
    """A script that writes its results and then raises."""
    script = SCRIPTS / "fails.py"
    command = ["python3", f"/job/{script.name}", "/out"]
    begin(scenario, command, script, agents=1, outputs="/out")
    return ended(scenario)


def shows_bars(scenario: Scenario) -> Played:
    """Progress bars; a reader sees them while they move."""
    scenario.weights_file = ""
    script = SCRIPTS / "bars.py"
    job = begin(scenario, ["python3", f"/job/{script.name}"], script, agents=1)
    states = [line.text for line in job.logs(follow=True, unfinished=True) if line.unfinished]
    return ended(scenario, states="\n".join(states))


class Plays:
    """The plays of the tests that were chosen, all at once on one market."""

    def __init__(self, folder: Path, tests: list[str]) -> None:
        self.folder = folder
        self.market = LocalMarket(folder / "market", ray="off")
        self.market.start_broker()
        self.config = self.market.root / "config" / "sublet"  # the command line's own, too
        self.client = Client(broker=self.market.url, config_dir=self.config)
        self.client.fund(self.client.party, 40, operator_key=self.market.operator_key)
        self.pool = ThreadPoolExecutor(max(len(tests), 1))
        images = {"none": "local/python"}
        for image in sorted({PLAYED_BY[test][1] for test in tests} - {"none"}):
            images[image] = _image(image)
        self.played: dict[str, Future[Played]] = {}
        for number, test in enumerate(tests):
            play, image = PLAYED_BY[test]
            place = folder / f"play{number}"
            place.mkdir()
            scenario = Scenario(
                f"play{number}",
                self.market,
                Client(broker=self.market.url, config_dir=self.config),
                "process" if image == "none" else "docker",
                images[image],
                place,
            )
            self.played[test] = self.pool.submit(play, scenario)

    def of(self, test: Test) -> Played:
        """Return what the play of a test came to; raises what it raised."""
        for service in needed(test.__name__):
            require(service)
        return self.played[test.__name__].result()

    def undisturbed(self, script: str, *arguments: str, wanted: str) -> bytes:
        """Return the file that a script writes into its working folder where nothing happens."""
        place = self.folder / "undisturbed" / secrets.token_hex(4)
        place.mkdir(parents=True)
        subprocess.run(
            [sys.executable, str(SCRIPTS / script), *arguments],
            cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
        return (place / wanted).read_bytes()

    def close(self) -> None:
        """Stop everything."""
        self.pool.shutdown(cancel_futures=True)
        self.client.close()
        self.market.stop()


def _image(name: str) -> str:
    from tests.images import base_image, torch_image

    return torch_image() if name == "torch" else base_image()


@pytest.fixture(scope="module")
def plays(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Plays]:
    """What the chosen tests of this file look at."""
    chosen = [
        item.originalname
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == Path(__file__)
    ]
    here = [test for test in chosen if not any(map(missing, needed(test)))]
    all_of_them = Plays(tmp_path_factory.mktemp("scripts"), here)
    yield all_of_them
    all_of_them.close()


def goes_on(played: Played, *, elsewhere: bool) -> None:
    """Assert what holds of every job that lost its machine or run and had a checkpoint."""
    outcome, view = played.outcome, played.view
    assert view.state == "succeeded", view.says
    first, second = view.runs
    if elsewhere:
        assert first.reason == "provider_lost"
        assert first.provider != second.provider
    assert second.start_step >= first.durable_step > 0
    assert outcome.verdict.holds, outcome.verdict.problems
    assert outcome.statement.lost_work_charged_ucr == 0


# -- what came of it -----------------------------------------------------------------------------


@shows(numpy_goes_on(run_dies, 0.05), "none")
def test_a_numpy_script_goes_on_from_its_pickle(plays: Plays) -> None:
    played = plays.of(test_a_numpy_script_goes_on_from_its_pickle)
    _numpy_went_on(plays, played, elsewhere=False)


@shows(shell_goes_on, "python")
@pytest.mark.docker
def test_a_shell_script_goes_on_from_its_files(plays: Plays) -> None:
    played = plays.of(test_a_shell_script_goes_on_from_its_files)
    goes_on(played, elsewhere=True)
    # Each line is there: what was counted after the last checkpoint was counted again.
    assert played.outcome.weights == b"30\n"
    lines = (played.out / "lines.txt").read_text().split("\n")
    assert lines == [f"line {n}" for n in range(1, 31)] + [""]
    went_on = [line for line in played.log if line.startswith("2 going on after ")]
    assert len(went_on) == 1
    assert int(went_on[0].split()[-1]) > 0


@shows(numpy_goes_on(machine_dies, 0.3), "torch")
@pytest.mark.slow
@pytest.mark.docker
def test_a_numpy_script_goes_on_in_a_container(plays: Plays) -> None:
    played = plays.of(test_a_numpy_script_goes_on_in_a_container)
    _numpy_went_on(plays, played, elsewhere=True)


def _numpy_went_on(plays: Plays, played: Played, *, elsewhere: bool) -> None:
    goes_on(played, elsewhere=elsewhere)
    assert "1 from scratch" in played.log
    assert any(line.startswith("2 loaded step ") for line in played.log)
    expected = plays.undisturbed("numpy_pickle.py", ".", "40", "0", wanted="weights.npy")
    assert played.outcome.weights == expected


@shows(numpy_is_warned, "torch")
@pytest.mark.slow
@pytest.mark.docker
def test_a_script_that_nothing_is_saved_of_is_warned_of(plays: Plays) -> None:
    played = plays.of(test_a_script_that_nothing_is_saved_of_is_warned_of)
    shown = " ".join(played.notes["shown"].split())
    assert "nothing that could be resumed has been saved yet; a loss now costs" in shown
    assert "--checkpoint /out" in shown
    assert played.view.state == "succeeded", played.view.says
    assert [line[2:] for line in played.log if "from scratch" in line] == ["from scratch"] * 2
    assert sorted(path.name for path in played.out.iterdir()) == ["state.pkl", "weights.npy"]
    assert played.outcome.verdict.holds, played.outcome.verdict.problems


@shows(torch_goes_on, "torch")
@pytest.mark.slow
@pytest.mark.docker
def test_a_checkpoint_that_is_written_over_itself_is_caught_whole(plays: Plays) -> None:
    played = plays.of(test_a_checkpoint_that_is_written_over_itself_is_caught_whole)
    goes_on(played, elsewhere=False)
    assert "1 cold start in /work" in played.log
    assert any(line.startswith("2 resume at ") for line in played.log)
    expected = plays.undisturbed("torch_in_place.py", "40", "0", wanted="weights.f32")
    assert played.outcome.weights == expected


@shows(lora_goes_on, "torch")
@pytest.mark.slow
@pytest.mark.docker
def test_a_loop_with_a_file_for_each_epoch_goes_on(plays: Plays) -> None:
    played = plays.of(test_a_loop_with_a_file_for_each_epoch_goes_on)
    goes_on(played, elsewhere=True)
    assert any(line.startswith("2 resumed from ./checkpoints/epoch_") for line in played.log)
    assert (played.out / "adapter" / "adapter_config.json").is_file()
    # Those of both runs.
    epochs = sorted(path.name for path in (played.out / "checkpoints").iterdir())
    assert epochs == [f"epoch_{epoch}.pt" for epoch in range(8)]
    adapter = "adapter/adapter_model.safetensors"
    assert played.outcome.weights == plays.undisturbed(
        "lora_epochs.py", "--pace_s", "0", wanted=adapter
    )


def _trainer_went_on(plays: Plays, played: Played, manner: str) -> None:
    goes_on(played, elsewhere=True)
    assert any(line.startswith("2 starting from results/checkpoint-") for line in played.log)
    assert played.outcome.weights == plays.undisturbed(
        "trainer_blog.py", manner, wanted="final/model.safetensors"
    )


@shows(trainer_goes_on("every"), "torch")
@pytest.mark.slow
@pytest.mark.docker
def test_the_trainer_as_blogs_show_it(plays: Plays) -> None:
    played = plays.of(test_the_trainer_as_blogs_show_it)
    _trainer_went_on(plays, played, "every")
    kept = sorted(path.name for path in (played.out / "results").iterdir())
    assert kept == sorted(f"checkpoint-{step}" for step in range(5, 31, 5))


@shows(trainer_goes_on("best"), "torch")
@pytest.mark.slow
@pytest.mark.docker
def test_the_trainer_that_loads_its_best(plays: Plays) -> None:
    _trainer_went_on(plays, plays.of(test_the_trainer_that_loads_its_best), "best")


@shows(trainer_goes_on("one"), "torch")
@pytest.mark.slow
@pytest.mark.docker
def test_the_trainer_that_keeps_one(plays: Plays) -> None:
    played = plays.of(test_the_trainer_that_keeps_one)
    _trainer_went_on(plays, played, "one")
    assert [path.name for path in (played.out / "results").iterdir()] == ["checkpoint-30"]


@shows(lightning_goes_on, "python")
@pytest.mark.slow
@pytest.mark.docker
def test_lightnings_manners_in_the_working_folder(plays: Plays) -> None:
    played = plays.of(test_lightnings_manners_in_the_working_folder)
    goes_on(played, elsewhere=False)
    assert [line for line in played.log if "starting from step" in line][1] != (
        "2 starting from step 0"
    )
    place = plays.folder / "lightning"
    place.mkdir()
    write_numbers(place / "numbers.csv")
    arguments = ["--data", "numbers.csv", "--out", "out", "--steps", "60", "--every", "10"]
    subprocess.run([sys.executable, str(LIGHTNING), *arguments], cwd=place, check=True)
    assert played.outcome.weights == (place / "out" / "weights.json").read_bytes()


@shows(fails, "python")
@pytest.mark.slow
@pytest.mark.docker
def test_what_a_script_wrote_before_it_failed_comes_back(plays: Plays) -> None:
    played = plays.of(test_what_a_script_wrote_before_it_failed_comes_back)
    assert played.view.state == "failed"
    assert played.view.reason == "job_failed"
    assert played.view.outputs is None
    assert any("evaluation: division by zero" in line for line in played.log)
    files = {path.name: path.stat().st_size for path in played.out.iterdir()}
    assert files["metrics.csv"] == len("epoch,loss\n1,0.5\n2,0.25\n")
    assert [files[f"model_{number}.bin"] for number in range(3)] == [100_000] * 3


@shows(shows_bars, "python")
@pytest.mark.slow
@pytest.mark.docker
def test_bars_are_seen_while_they_move_and_kept_as_a_line(plays: Plays) -> None:
    played = plays.of(test_bars_are_seen_while_they_move_and_kept_as_a_line)
    assert played.view.state == "succeeded", played.view.says
    states = played.notes["states"].splitlines()
    assert len({state for state in states if state.startswith("époque")}) >= 4
    assert not [line for line in [*states, *played.log] if "\ufffd" in line]
    assert [line for line in played.log if "époque" in line] == [
        f"1 époque {epoch}: 60/60 |{'█' * 15}| loss=0.017" for epoch in range(2)
    ]
    assert "1 Обучение 🚀 início — 训练开始" in played.log
    assert "1 \x1b[31mrot\x1b[0m fertig ✓" in played.log
    assert played.log[-1] == "1 kein Zeilenende ✗"
