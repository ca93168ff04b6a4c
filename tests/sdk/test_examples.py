"""The examples do what they say: on a laptop, and on a market of real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sublet import ckpt
from sublet.client import Client
from sublet.demo.local import LocalMarket

EXAMPLES = Path(__file__).resolve().parents[2] / "sdk" / "examples"
POINTS = "x,y\n" + "".join(f"{i / 10},{2 * i / 10 + 1}\n" for i in range(-10, 11))


@pytest.fixture
def points(tmp_path: Path) -> Path:
    path = tmp_path / "points.csv"
    path.write_text(POINTS)
    return path


def test_the_script_runs_on_a_laptop_and_resumes_there(tmp_path: Path, points: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train.py"), "--data", str(points)]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder, steps in ((whole, ["400"]), (halves, ["200", "400"])):
        folder.mkdir()
        for count in steps:
            done = subprocess.run(
                [*command, "--out", "out", "--steps", count],
                cwd=folder,
                check=True,
                capture_output=True,
                text=True,
            )
    assert "from step 200" in done.stdout
    results = [(folder / "out" / "line.json").read_bytes() for folder in (whole, halves)]
    assert results[0] == results[1]
    assert json.loads(results[0])["slope"] == pytest.approx(2.0, abs=0.01)


def test_a_job_in_any_language_saves_by_folders_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to stop, it leaves a step that the agent accepts as whole, and goes on from it."""
    here, there = tmp_path / "here", tmp_path / "there"

    def run(checkpoint: Path, last: str) -> int:
        return subprocess.run(
            ["sh", str(EXAMPLES / "anything.sh"), str(tmp_path / "out"), last],
            env={"PATH": os.environ["PATH"], "SUBLET_CHECKPOINT_DIR": str(checkpoint)},
            check=False,
        ).returncode

    here.mkdir()
    assert run(here, "150") == 0
    assert [path.name for path in (here / "out").iterdir()] == ["step-100"]
    (there / "in").mkdir(parents=True)
    (here / "out" / "step-100").rename(there / "in" / "step-100")
    monkeypatch.setenv("SUBLET_CHECKPOINT_DIR", str(there))
    restored = ckpt.restore()  # it is as its DONE says
    assert restored is not None
    assert (restored / "sum").read_text() == f"{sum(range(101))}\n"
    (there / "STOP").touch()
    assert run(there, "1000") == ckpt.EXIT_PREEMPTED
    assert [path.name for path in (there / "out").iterdir()] == ["step-101"]
    (there / "STOP").unlink()
    assert run(there, "1000") == 0
    assert (tmp_path / "out" / "sum.txt").read_text() == f"{sum(range(1001))}\n"


@pytest.mark.slow
def test_submit_brings_the_result_back_from_a_market(tmp_path: Path, points: Path) -> None:
    market = LocalMarket(tmp_path / "market", ray="off")
    try:
        market.start_broker()
        environment = {**os.environ, **market.environment}
        config = Path(environment["XDG_CONFIG_HOME"]) / "sublet"
        with Client(broker=market.url, config_dir=config) as client:
            market.start_agent("owner", "--runner", "process", "--trust", client.party)
            market.wait_for(lambda: client.offers().offers, "an offer", market.agents["owner"])
            client.fund(client.party, 2, operator_key=market.operator_key)
        done = subprocess.run(
            [
                sys.executable,
                str(EXAMPLES / "submit.py"),
                "any/image",
                str(points),
                "--gpus",
                "cpu",
                "--out",
                str(tmp_path / "out"),
            ],
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads((tmp_path / "out" / "line.json").read_text())["shift"] == pytest.approx(
            1.0, abs=0.01
        )
    finally:
        market.stop()
