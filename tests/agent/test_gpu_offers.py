"""`sublet provide --devices ...` as real processes: the driver's library is a stand-in, the agent,
the broker and `sublet offers` are not.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sublet.errors import SubletError
from tests.agent.nvml_stub import build
from tests.e2e.bad_market import BadMarket

WHOLE = {
    "id": "GPU-0",
    "kind": "gpu",
    "name": "NVIDIA A100-SXM4-80GB",
    "memory_bytes": 80 * 2**30,
    "hardware_class": "nvidia-a100-sxm4-80gb",
    "compute_capability": "8.0",
    "driver": "580.10",
    "ecc": True,
    "mig": False,
    "pcie_generation": 4,
    "pcie_lanes": 16,
    "power_limit_mw": 400_000,
}
ALL = ["GPU-0", "GPU-1", "MIG-10", "MIG-12"]


class Machine:
    """A machine with the stand-in's GPUs."""

    def __init__(self, world: BadMarket, region: str, environment: dict[str, str]) -> None:
        self.world, self.region = world, region
        self.state = world.market.root / region
        self.environment = {**os.environ, **world.market.environment, **environment}

    def _sublet(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "sublet.cli.main", *arguments]

    def _provide(self, *arguments: str) -> list[str]:
        return self._sublet(
            "provide",
            "--runner",
            "process",
            "--trust",
            self.world.client.party,
            "--state",
            str(self.state),
            "--region",
            self.region,
            "--name",
            self.region,
            *arguments,
        )

    @contextlib.contextmanager
    def provides(self, *arguments: str) -> Iterator[None]:
        """Have the agent run, connected."""
        log = self.world.market.root / "logs" / f"{self.region}.log"
        with log.open("ab") as file:
            agent = subprocess.Popen(
                self._provide(*arguments),
                stdout=file,
                stderr=file,
                env=self.environment,
                start_new_session=True,
            )
        try:
            self.world.soon(lambda: self.status().get("connected"), "the agent")
            yield
        finally:
            agent.terminate()
            assert agent.wait(300) == 0

    def refuses(self, *arguments: str) -> str:
        """Start an agent that can't offer that; return its last line."""
        done = subprocess.run(
            self._provide(*arguments),
            capture_output=True,
            text=True,
            env=self.environment,
            check=False,
            timeout=300,
        )
        assert done.returncode == 2
        assert done.stderr == ""
        return done.stdout.splitlines()[-1].split(" ", 1)[1]

    def prints(self, *arguments: str) -> str:
        done = subprocess.run(
            self._sublet(*arguments),
            capture_output=True,
            text=True,
            env=self.environment,
            check=False,
        )
        return done.stdout

    def status(self) -> dict[str, Any]:
        text = self.prints("provider", "status", "--state", str(self.state), "--json")
        return dict(json.loads(text)) if text else {}

    def devices(self) -> list[dict[str, Any]]:
        """Return this machine's devices as `sublet offers --json` has them."""
        offers = json.loads(self.prints("offers", "--json"))["offers"]
        mine = [offer for offer in offers if offer["name"] == self.region]
        return [device for offer in mine for device in offer["devices"]]

    def offered(self) -> list[str]:
        """Wait for the offer; return the ids of its devices."""
        self.world.soon(self.devices, "the offer")
        return [device["id"] for device in self.devices()]


@pytest.fixture
def machine(world: BadMarket, request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    number = request.node.name.removeprefix("test_").replace("_", "-")[:30].rstrip("-")
    return Machine(world, number, build(tmp_path))


def test_all_gpus_with_their_facts(machine: Machine) -> None:
    with machine.provides("--price", "1.25"):
        assert machine.offered() == ALL
        whole, silent, part, _ = machine.devices()
        assert {key: whole[key] for key in WHOLE} == WHOLE
        # What the driver doesn't tell is left open, not made up.
        assert (silent["name"], silent["memory_bytes"]) == ("NVIDIA GPU", 0)
        assert silent["compute_capability"] is silent["ecc"] is silent["power_limit_mw"] is None
        assert (part["mig"], part["memory_bytes"]) == (True, 10 * 2**30)
        # A person sees them, too: on the market, and at the machine.
        table = machine.prints("offers")
        assert "1.25" in table
        assert "A100" in table
        status = machine.status()
        assert [device["id"] for device in status["devices"]] == ALL
        assert status["price_ucr_per_device_hour"] == 1_250_000
        refused_for_want_of_memory(machine)
    # Taken back with the agent.
    machine.world.soon(lambda: not machine.devices(), "the market to be empty")


def refused_for_want_of_memory(machine: Machine) -> None:
    """A job that no GPU here can hold is refused at once, and is told why."""
    with pytest.raises(SubletError) as caught:
        machine.world.python(machine.region, "pass", gpus="1x200GB", max_price="2.00")
    assert caught.value.problem.code == "no_match"
    assert caught.value.problem.fix


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [("GPU-0", ["GPU-0"]), ("2", ["MIG-10"]), ("MIG-12,0", ["GPU-0", "MIG-12"])],
)
def test_named_ones_only(world: BadMarket, tmp_path: Path, wanted: str, ids: list[str]) -> None:
    machine = Machine(world, f"named-{wanted.lower().replace(',', '-')}", build(tmp_path))
    with machine.provides("--devices", wanted):
        assert machine.offered() == ids


def test_none(machine: Machine) -> None:
    with machine.provides("--devices", "none"):
        assert machine.status()["devices"] == []
        assert "nothing" in machine.prints("provider", "status", "--state", str(machine.state))
        assert machine.devices() == []


def test_one_that_is_not_there_and_those_that_are(machine: Machine) -> None:
    for wanted in ("GPU-7", "0,GPU-7", "GPU-7,0"):
        assert machine.refuses("--devices", wanted) == (
            "error: --devices: no GPU GPU-7 here; there are: "
            "0 (GPU-0), 1 (GPU-1), 2 (MIG-10), 3 (MIG-12)"
        )
    assert "no GPU 4 here" in machine.refuses("--devices", "4")


def test_no_driver(world: BadMarket, tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"not a library")  # hides a real one, too
    machine = Machine(world, "no-driver", {"LD_LIBRARY_PATH": str(tmp_path)})
    error = machine.refuses()
    assert "no NVIDIA GPU" in error
    assert "pass --cpu" in error
    assert "there are: none" in machine.refuses("--devices", "GPU-0")
