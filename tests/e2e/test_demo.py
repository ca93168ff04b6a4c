"""`sublet demo --quick`: every promise holds, and nothing is left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        [sys.executable, "-m", "sublet.cli.main", "demo", "--quick", "--build-dir",
         str(tmp_path / "build"), "--json-file", str(figures)],
        env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config")},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(figures.read_text())
    assert outcome.keys() >= PROMISED
    assert outcome["weights_identical"]
    assert outcome["lost_work_charged_ucr"] == 0
    assert not (tmp_path / "config").exists(), "the demo used the user's own configuration"
    assert not list((tmp_path / "build").glob("demo-*")), "the demo left its folders behind"
