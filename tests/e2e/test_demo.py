"""`sublet demo --quick`: every promise holds, and nothing is left behind."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sublet.client import Client, Job
from sublet.demo import main
from sublet_contracts.reasons import Reason

PROMISED = {
    "accuracy_before",
    "accuracy_after",
    "steps_lost",
    "recovery_seconds",
    "weights_identical",
    "charged_ucr",
    "lost_work_charged_ucr",
    "receipts_verified",
    "ledger_balanced",
    "runner",
}


@pytest.mark.slow
def test_the_quick_demo_keeps_every_promise(tmp_path: Path) -> None:
    figures = tmp_path / "demo.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sublet.cli.main",
            "demo",
            "--quick",
            "--build-dir",
            str(tmp_path / "build"),
            "--json-file",
            str(figures),
        ],
        env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(figures.read_text())
    assert outcome.keys() >= PROMISED
    assert outcome["weights_identical"]
    assert outcome["lost_work_charged_ucr"] == 0
    assert not (tmp_path / "config").exists(), "the demo used the user's own configuration"
    assert not list((tmp_path / "build").glob("demo-*")), "the demo left its folders behind"


@dataclass
class SeenRun:
    """What the demo looks at of a run."""

    epoch: int
    step: int
    start_step: int = 0
    reason: Reason | None = None
    provider_name: str = "b"


@pytest.mark.parametrize("seen_recovering", [True, False])
def test_its_two_times_are_of_one_loss(seen_recovering: bool) -> None:
    """A machine that was ready takes the job over so fast that no look finds it recovering."""
    lost = SeenRun(1, 30, reason=Reason.PROVIDER_LOST)
    looks = [(101.0, [SeenRun(1, 30)]), (105.0, [lost])]
    looks += [(106.0, [lost, SeenRun(2, 20, 20)]), (107.0, [lost, SeenRun(2, 21, 20)])]
    looks += [(110.0, [lost, SeenRun(2, 40, 20)])]
    loss = main.Loss(100.0, 30, "a", 1)
    said = []
    for now_s, runs in looks if seen_recovering else [looks[0], *looks[3:]]:
        said += loss.look(cast(Any, SimpleNamespace(runs=runs, says="it goes on")), now_s)
    assert loss.noticed_at_s == (105.0 if seen_recovering else 107.0)
    assert (loss.resumed_at_s, loss.start_step) == (107.0, 20)
    assert said == ["a is called lost; it goes on", "b goes on from step 20, 7.0 s after the kill"]


def test_a_demo_that_fails_shows_what_its_job_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def submit(client: Client, image: str) -> Job:
        return client.run(
            image=image,
            gpus="cpu",
            max_price=0.6,
            budget=1,
            memory="64MB",
            disk="64MB",
            command=["python3", "-c", "print('[no weights here]'); raise SystemExit(3)"],
        )

    plan = replace(main.quick_plan(), submit=submit)
    monkeypatch.setattr(main, "quick_plan", lambda: plan)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    status = main.main(
        ["--quick", "--build-dir", str(tmp_path / "build"), "--json-file", str(tmp_path / "json")]
    )
    said = capsys.readouterr().out
    assert status == 1, said
    assert "the demo failed" in said
    assert "its last lines:" in said
    assert "  [no weights here]" in said
