"""Told before it hurts, with real processes: what a renter sees of scripts that would lose work."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sublet.client import Client
from sublet.demo.local import LocalMarket
from sublet_contracts.api import JobView
from tests.e2e.scenario import Scenario

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("told_job.py")
LATE_S = 50.0
EVERY_S = 2
WITHIN_S = EVERY_S + 60
"""The first interval, and a minute."""


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalMarket, Client]]:
    local = LocalMarket(tmp_path_factory.mktemp("told"), ray="off")
    try:
        local.start_broker()
        config = Path(local.environment["XDG_CONFIG_HOME"]) / "sublet"
        client = Client(broker=local.url, config_dir=config)
        client.fund(client.party, 50, operator_key=local.operator_key)
        yield local, client
    finally:
        local.stop()


def begun(
    market: tuple[LocalMarket, Client], folder: Path, way: str, *arguments: str, **options: Any
) -> Scenario:
    local, client = market
    scenario = Scenario(way, local, client, "process", "local/python", folder)
    scenario.begin(
        1,
        command=["python3", "/job/told_job.py", way, *arguments],
        inputs={str(SCRIPT): "/job/told_job.py"},
        checkpoint_every=f"{EVERY_S}s",
        stop_grace="1s",
        **options,
    )
    return scenario


def codes(view: JobView) -> list[str]:
    return [warning.code for warning in view.warnings]


def command(market: tuple[LocalMarket, Client], *arguments: str) -> str:
    local, _ = market
    done = subprocess.run(
        [sys.executable, "-m", "sublet.cli.main", *arguments],
        env=local.environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_what_saves_nothing_is_told_in_time_and_no_longer_once_something_is_durable(
    market: tuple[LocalMarket, Client], tmp_path: Path
) -> None:
    scratch = begun(market, tmp_path, "scratch", "--folder", "/out", outputs="/out")
    late = begun(market, tmp_path, "late", "--save-after-s", str(LATE_S), outputs="")
    scratch.until(lambda view: view.started_ms is not None, "its start")
    for scenario in (scratch, late):
        view = scenario.until(lambda view: "nothing_saved" in codes(view), "the warning")
        (warning,) = view.warnings
        assert view.started_ms is not None
        assert warning.since_ms - view.started_ms <= WITHIN_S * 1000
        assert warning.facts["at_risk_ms"] > 0
    ref = scratch.submitted.id[:12]
    assert "nothing saved" in command(market, "ps")
    inspected = command(market, "inspect", ref)
    assert "nothing that could be resumed has been saved yet; a loss now costs" in inspected
    assert "it writes /out/state.pkl: run it with --checkpoint /out" in inspected
    said = json.loads(command(market, "inspect", ref, "--json"))
    assert [warning["code"] for warning in said["warnings"]] == ["nothing_saved"]
    late.until(lambda view: view.durable_ms is not None, "a durable checkpoint")
    late.until(lambda view: not view.warnings, "the end of the warning")
    events = [
        json.loads(line)
        for line in command(market, "events", late.submitted.id, "--json").splitlines()
    ]
    changes = [(e["before"], e["after"]) for e in events if e["kind"] == "warning"]
    assert changes == [("", "nothing_saved"), ("nothing_saved", "over")]
    assert codes(scratch.submitted.view()) == ["nothing_saved"]
    for scenario in (scratch, late):
        scenario.submitted.cancel()
        scenario.submitted.wait()
        scenario.stop_agents()


def test_a_script_that_begins_at_0_beside_its_checkpoint_is_told_and_one_that_loads_it_is_not(
    market: tuple[LocalMarket, Client], tmp_path: Path
) -> None:
    scenarios = [
        begun(market, tmp_path, way, "--folder", "ckpts", checkpoint="ckpts", outputs="")
        for way in ("forgets", "loads")
    ]
    for scenario in scenarios:
        scenario.until(lambda view: view.durable_ms is not None, "a durable checkpoint")
        assert scenario.kill_run(0) > 0
    for scenario in scenarios:
        scenario.until(lambda view: len(view.runs) == 2 and view.state == "running", "the next run")
    forgets, loads = scenarios
    view = forgets.until(lambda view: "checkpoint_unread" in codes(view), "the warning")
    assert any("has not opened it" in warning.says for warning in view.warnings)
    assert "checkpoint_unread" not in codes(loads.submitted.view())
    assert "let the script load at its start" in command(market, "inspect", forgets.submitted.id)
    for scenario in scenarios:
        scenario.submitted.cancel()
        scenario.submitted.wait()
        scenario.stop_agents()
