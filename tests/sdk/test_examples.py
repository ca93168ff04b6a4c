"""The examples do what they say: on a laptop, and on a market of real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
