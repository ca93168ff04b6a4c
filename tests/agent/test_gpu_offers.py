"""`sublet provide --devices ...`: which GPUs are offered, and as what.

The choice is a pure function; one real agent, on a stand-in for the driver's library, shows that
the market sees what was chosen.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sublet.errors import SubletError
from sublet_agent.adapters.machine.nvml import Gpu, GpuProbe
from sublet_agent.adapters.machine.terms import choose_gpus, device_of, make_terms
from sublet_agent.adapters.options import UsageError, read_options
from sublet_agent.adapters.process.runner import ProcessRunner
from tests.agent.nvml_stub import build
from tests.agent.owners_command import provider
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
BROKER = ("--broker", "http://broker.example")


def gpu(uuid: str) -> Gpu:
    """A GPU of which the driver tells only the uuid."""
    unknown = (field.name for field in dataclasses.fields(Gpu))
    facts: dict[str, Any] = dict.fromkeys(unknown)
    return Gpu(**facts | {"uuid": uuid, "name": "NVIDIA GPU", "hardware_class": "nvidia-gpu"})


FOUND = GpuProbe(tuple(gpu(uuid) for uuid in ALL), ())


@pytest.mark.parametrize(
    ("option", "ids"),
    [
        ("all", ALL),
        ("GPU-0", ["GPU-0"]),
        ("2", ["MIG-10"]),
        ("MIG-12,0", ["GPU-0", "MIG-12"]),
        ("0,GPU-0", ["GPU-0"]),
    ],
)
def test_named_ones_only(option: str, ids: list[str]) -> None:
    wanted = read_options([*BROKER, "--devices", option]).devices
    assert [chosen.uuid for chosen in choose_gpus(FOUND, wanted)] == ids


@pytest.mark.parametrize(
    ("option", "missing"),
    [("GPU-7", "GPU-7"), ("0,GPU-7", "GPU-7"), ("GPU-7,0", "GPU-7"), ("4", "4")],
)
def test_one_that_is_not_there_and_those_that_are(option: str, missing: str) -> None:
    wanted = read_options([*BROKER, "--devices", option]).devices
    with pytest.raises(UsageError) as caught:
        choose_gpus(FOUND, wanted)
    assert str(caught.value) == (
        f"--devices: no GPU {missing} here; there are: 0 (GPU-0), 1 (GPU-1), 2 (MIG-10), 3 (MIG-12)"
    )


def test_no_driver() -> None:
    nothing = GpuProbe((), ("no NVIDIA GPU: NVML Shared Library Not Found",))
    with pytest.raises(UsageError, match=r"no GPU to offer \(no NVIDIA GPU: .*pass --cpu"):
        choose_gpus(nothing, ("all",))
    with pytest.raises(UsageError, match="there are: none"):
        choose_gpus(nothing, ("GPU-0",))


def test_none_offers_nothing_and_says_that_runs_go_on(tmp_path: Path) -> None:
    options = read_options([*BROKER, "--devices", "none", "--state", str(tmp_path)])
    said: list[str] = []
    terms = make_terms(options, ProcessRunner("owner", tmp_path), ("party",), said.append)
    assert terms.devices == ()
    assert said == ["--devices none: nothing is offered; runs that are there go on"]


def test_what_the_driver_does_not_tell_is_left_open() -> None:
    device = device_of(gpu("GPU-1"))
    assert (device.name, device.memory_bytes) == ("NVIDIA GPU", 0)
    assert device.compute_capability is device.ecc is device.power_limit_mw is None


class Machine:
    """A machine with the stand-in's GPUs."""

    def __init__(self, world: BadMarket, region: str, environment: dict[str, str]) -> None:
        self.world, self.region = world, region
        self.state = world.market.root / region
        self.environment = {**os.environ, **world.market.environment, **environment}

    def _provide(self, *arguments: str) -> list[str]:
        return [
            *(sys.executable, "-m", "sublet.cli.main", "provide", "--runner", "process"),
            *("--trust", self.world.client.party, "--state", str(self.state)),
            *("--region", self.region, "--name", self.region, *arguments),
        ]

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

    def status(self) -> dict[str, Any]:
        text = provider("status", "--state", str(self.state), "--json").stdout
        return dict(json.loads(text)) if text else {}

    def devices(self) -> list[dict[str, Any]]:
        """Return this machine's devices as the market has them."""
        mine = [o for o in self.world.client.offers().offers if o.name == self.region]
        return [device.model_dump() for offer in mine for device in offer.devices]


def test_a_real_agent_offers_them_with_their_facts(world: BadMarket, tmp_path: Path) -> None:
    machine = Machine(world, "all-gpus", build(tmp_path))
    with machine.provides("--price", "1.25"):
        world.soon(machine.devices, "the offer")
        whole, silent, part, other = machine.devices()
        assert [device["id"] for device in (whole, silent, part, other)] == ALL
        assert {key: whole[key] for key in WHOLE} == WHOLE
        assert (silent["name"], silent["memory_bytes"]) == ("NVIDIA GPU", 0)
        assert silent["compute_capability"] is silent["ecc"] is silent["power_limit_mw"] is None
        assert (part["mig"], part["memory_bytes"]) == (True, 10 * 2**30)
        # A person sees them, too: on the market, and at the machine.
        table = world.market.command("offers")
        assert "1.25" in table
        assert "A100" in table
        status = machine.status()
        assert [device["id"] for device in status["devices"]] == ALL
        assert status["price_ucr_per_device_hour"] == 1_250_000
        refused_for_want_of_memory(machine)
    # Taken back with the agent.
    world.soon(lambda: not machine.devices(), "the market to be empty")
    # And one that isn't there is refused before anything is offered.
    assert machine.refuses("--devices", "0,GPU-7").startswith("error: --devices: no GPU GPU-7 here")


def refused_for_want_of_memory(machine: Machine) -> None:
    """A job that no GPU here can hold is refused at once, and is told why."""
    with pytest.raises(SubletError) as caught:
        machine.world.python(machine.region, "pass", gpus="1x200GB", max_price="2.00")
    assert caught.value.problem.code == "no_match"
    assert caught.value.fix
