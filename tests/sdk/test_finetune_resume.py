"""The jobs of the demos end with the same bytes when they are stopped and resumed elsewhere."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import sublet.demo
from sublet import finetuning
from sublet_contracts.ckpt_helper_install import write_helper
from tests.services import require

TRAIN = Path(finetuning.__file__).with_name("train.py")
QUICK = Path(next(iter(sublet.demo.__path__))) / "quick.py"
STEPS = 5
WORDS = ("slow", "dull", "flat", "grim"), ("warm", "funny", "bright", "moving")


class Machine:
    """A folder that stands for one machine: it runs the job, and hands its checkpoints on."""

    def __init__(self, root: Path) -> None:
        self.checkpoint = root / "checkpoint"
        self.out = root / "out"
        self.helper = write_helper(root / "helper")
        self.checkpoint.mkdir()

    def run(self, script: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, str(script), *arguments, "--out", str(self.out)],
            env={"SUBLET_CHECKPOINT_DIR": str(self.checkpoint), "PYTHONPATH": str(self.helper)},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def continue_from(self, other: "Machine", step: int) -> None:
        """Place a step of another machine, as an agent does."""
        name = f"step-{step}"
        shutil.copytree(other.checkpoint / "out" / name, self.checkpoint / "in" / name)

    def outputs(self) -> Mapping[str, bytes]:
        files = (path for path in self.out.rglob("*") if path.is_file())
        return {str(path.relative_to(self.out)): path.read_bytes() for path in files}


@pytest.fixture
def machines(tmp_path: Path) -> tuple[Machine, Machine, Machine]:
    made = []
    for name in "abc":
        (tmp_path / name).mkdir()
        made.append(Machine(tmp_path / name))
    return made[0], made[1], made[2]


def stop_and_resume(
    machines: tuple[Machine, Machine, Machine], script: Path, *arguments: str
) -> tuple[Machine, Machine]:
    """Run undisturbed on one machine; stop on the second, resume on the third."""
    undisturbed, stopped, resumed = machines
    first = undisturbed.run(script, *arguments)
    assert first.returncode == 0, first.stderr
    (stopped.checkpoint / "STOP").touch()
    second = stopped.run(script, *arguments)
    assert second.returncode == 75, second.stderr
    assert not stopped.out.exists()
    resumed.continue_from(stopped, 1)
    third = resumed.run(script, *arguments)
    assert third.returncode == 0, third.stderr
    assert "resuming from step 1" in third.stdout
    assert f"step 1/{STEPS}" not in third.stdout
    return undisturbed, resumed


@pytest.mark.slow
def test_fine_tuning_resumes_to_the_bit(
    machines: tuple[Machine, Machine, Machine], tmp_path: Path
) -> None:
    require("torch")
    data = tmp_path / "data.jsonl"
    rows = (
        {"text": f"a {WORDS[i % 2][i // 2 % 4]} film, number {i}", "label": i % 2}
        for i in range(60)
    )
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (
        "--base",
        "minilm",
        "--data",
        str(data),
        "--max-steps",
        str(STEPS),
        "--batch",
        "4",
        "--checkpoint-steps",
        "2",
    )
    undisturbed, resumed = stop_and_resume(machines, TRAIN, *arguments)
    assert resumed.outputs() == undisturbed.outputs()
    assert {"adapter/adapter_model.safetensors", "metrics.json", "loss.csv"} <= set(
        resumed.outputs()
    )
    assert [p.name for p in sorted((undisturbed.checkpoint / "out").iterdir())][:2] == [
        "step-2",
        "step-4",
    ]
    said = json.loads((undisturbed.checkpoint / "progress.json").read_text())
    assert (said["step"], said["total"]) == (STEPS, STEPS)
    assert said["metrics"]["loss"] > 0


def test_the_quick_job_resumes_to_the_bit(machines: tuple[Machine, Machine, Machine]) -> None:
    undisturbed, resumed = stop_and_resume(machines, QUICK, "--steps", str(STEPS), "--every", "2")
    assert resumed.outputs() == undisturbed.outputs()
    metrics = json.loads((resumed.out / "metrics.json").read_text())
    assert metrics["accuracy_after"] > metrics["accuracy_before"]


def test_bad_data_ends_the_job_with_the_line(
    machines: tuple[Machine, Machine, Machine], tmp_path: Path
) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\ngood,1\n,0\n")
    done = machines[0].run(TRAIN, "--base", "minilm", "--data", str(data))
    assert done.returncode == 2
    assert "line 3" in done.stderr
