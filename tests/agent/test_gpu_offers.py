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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sublet.client import Job
from sublet.errors import SubletError
from sublet_agent.adapters.machine.facts import Machine as MachineReader
from sublet_agent.adapters.machine.facts import choose_gpus, device_of
from sublet_agent.adapters.machine.nvml import Gpu, GpuProbe
from sublet_agent.adapters.machine.terms import make_terms
from sublet_agent.adapters.options import UsageError, read_options
from sublet_agent.adapters.process.runner import ProcessRunner
from tests.agent.nvml_stub import CARDS, Driver, build
from tests.agent.owners_command import provider
from tests.e2e.bad_market import BadMarket
from tests.images import base_image
from tests.services import require

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
INSTANCES = {"MIG-10": (2, 0), "MIG-12": (2, 2)}
"""the number of the GPU that they are of, and theirs"""
BROKER = ("--broker", "http://broker.example")


def gpu(uuid: str) -> Gpu:
    """A GPU of which the driver tells only the uuid."""
    unknown = (field.name for field in dataclasses.fields(Gpu))
    facts: dict[str, Any] = dict.fromkeys(unknown)
    index, instance = INSTANCES.get(uuid, (int(uuid[-1]), None))
    told = {"uuid": uuid, "name": "NVIDIA GPU", "hardware_class": "nvidia-gpu", "used_bytes": 0}
    return Gpu(**facts | told | {"index": index, "instance": instance})


FOUND = GpuProbe(tuple(gpu(uuid) for uuid in ALL), ())


@pytest.mark.parametrize(
    ("option", "ids"),
    [
        ("all", ALL),
        ("GPU-0", ["GPU-0"]),
        ("2", ["MIG-10", "MIG-12"]),
        ("2:0", ["MIG-10"]),
        ("MIG-12,0", ["GPU-0", "MIG-12"]),
        ("0,GPU-0", ["GPU-0"]),
    ],
)
def test_named_ones_only(option: str, ids: list[str]) -> None:
    wanted = read_options([*BROKER, "--devices", option]).devices
    assert [chosen.uuid for chosen in choose_gpus(FOUND, wanted)] == ids


@pytest.mark.parametrize(
    ("option", "missing"),
    [
        ("GPU-7", "GPU-7"),
        ("0,GPU-7", "GPU-7"),
        ("GPU-7,0", "GPU-7"),
        ("4", "4"),
        ("2:1", "2:1"),
    ],
)
def test_one_that_is_not_there_and_those_that_are(option: str, missing: str) -> None:
    wanted = read_options([*BROKER, "--devices", option]).devices
    with pytest.raises(UsageError) as caught:
        choose_gpus(FOUND, wanted)
    assert str(caught.value) == (
        f"--devices: no GPU {missing} here; there are: 0 (GPU-0), 1 (GPU-1), 2:0 (MIG-10), "
        "2:2 (MIG-12)"
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
    runner = ProcessRunner("owner", tmp_path)
    facts = MachineReader(options, runner).first(said.append)
    assert make_terms(options, runner, ("party",), facts, 0).devices == ()
    assert said == ["--devices none: nothing is offered; runs that are there go on"]


def test_what_the_driver_does_not_tell_is_left_open() -> None:
    device = device_of(gpu("GPU-1"))
    assert (device.name, device.memory_bytes) == ("NVIDIA GPU", 0)
    assert device.compute_capability is device.ecc is device.power_limit_mw is None


class Machine:
    """A machine with the stand-in's GPUs."""

    def __init__(
        self,
        world: BadMarket,
        region: str,
        environment: dict[str, str],
        runner: tuple[str, ...] = ("process",),
    ) -> None:
        self.world, self.region, self.runner = world, region, runner
        self.state = world.market.root / region
        self.environment = {**os.environ, **world.market.environment, **environment}

    def _provide(self, *arguments: str) -> list[str]:
        return [
            *(sys.executable, "-m", "sublet.cli.main", "provide", "--runner", *self.runner),
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
        # It has no memory of its own, and so it has its share of the machine's.
        assert silent["name"] == "NVIDIA GPU"
        assert 0 < silent["memory_bytes"] < part["memory_bytes"]
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
        machine.world.python(
            machine.region, "pass", gpus="1x200GB", max_price="2.00", wait_for_offer=False
        )
    assert caught.value.problem.code == "no_match"
    assert caught.value.fix


# -- GPUs that go, and come back -------------------------------------------------------------------

# Stands for a job that computes: it dies when its GPU no longer answers, and is done when told so.
ON_A_GPU = """
import os, sys, time
control, finish, mine = sys.argv[1], sys.argv[2], os.environ["CUDA_VISIBLE_DEVICES"]
print("on", mine)
while not os.path.exists(finish):
    told = open(control).read()
    if "all " in told or f"err{mine[4]} " in told:
        sys.exit("CUDA error: the GPU does not answer")
    time.sleep(0.1)
"""


class Lab:
    """A machine of two GPUs with a driver that says what it is told, and jobs on it."""

    def __init__(self, world: BadMarket, region: str, folder: Path) -> None:
        self.world = world
        self.driver = Driver(folder / "driver")
        self.machine = Machine(world, region, self.driver.environment)
        self.finish = folder / "finish"

    def submit(self, *, wait_for_offer: bool = True) -> Job:
        return self.world.submit(
            self.machine.region,
            ["python3", "-c", ON_A_GPU, str(self.driver.file), str(self.finish)],
            gpus="1x24GB",
            wait_for_offer=wait_for_offer,
        )

    def run_on_both(self) -> dict[str, Job]:
        """Have a job run on each GPU; return them by GPU."""
        self.offered(*CARDS)
        jobs = [self.submit(), self.submit()]
        for job in jobs:
            self.world.until(job, lambda view: view.state == "running", "running")
        held = {run["job"]: run["devices"][0] for run in self.machine.status()["runs"]}
        return {held[job.id]: job for job in jobs}

    def offered(self, *uuids: str) -> float:
        """Wait until just these are on the market; return how long that took."""
        began = time.monotonic()
        self.world.soon(
            lambda: [device["id"] for device in self.machine.devices()] == [*uuids],
            f"the offer of {uuids}",
        )
        return time.monotonic() - began

    def memory(self) -> set[int]:
        return {device["memory_bytes"] for device in self.machine.devices()}

    def finished(self, *jobs: Job) -> None:
        self.finish.write_text("")
        for job in jobs:
            assert self.world.ended(job).state == "succeeded"


@pytest.fixture
def lab(world: BadMarket, tmp_path: Path, request: pytest.FixtureRequest) -> Lab:
    return Lab(world, request.node.name.replace("_", "-")[-40:].strip("-"), tmp_path)


def test_a_gpu_that_falls_off_is_not_held_against_its_job(lab: Lab) -> None:
    with lab.machine.provides():
        jobs = lab.run_on_both()
        lab.driver.says(err1=15)
        # Heartbeats come every half second here, and the machine is looked at as often.
        assert lab.offered(CARDS[0]) < 5.0
        lost, other = jobs[CARDS[1]], jobs[CARDS[0]]
        view = lab.world.until(
            lost,
            lambda view: view.runs[0].reason and view.state != "running",
            "the run's end, and what follows",
        )
        assert view.runs[0].reason == "device_failed"
        assert view.state in ("queued", "starting", "recovering")
        # Whoever looks at the machine sees it, and no new job is sent there.
        [gone] = [d for d in lab.machine.status()["devices"] if d["trouble"]]
        assert (gone["id"], gone["trouble"], gone["lease"]) == (CARDS[1], "GPU is lost", None)
        late = lab.submit()
        time.sleep(2.0)
        assert not late.view().runs
        assert [run["devices"] for run in lab.machine.status()["runs"]] == [[CARDS[0]]]
        # It answers again: it is offered again, and used.
        lab.driver.says()
        lab.offered(*CARDS)
        lab.finished(lost, other, late)
    assert [charge.reason for charge in lost.statement().charges if charge.charged_ucr] == [
        "succeeded"
    ]


def test_all_gpus_gone_by_an_upgrade_of_the_driver_and_back(lab: Lab) -> None:
    with lab.machine.provides():
        jobs = lab.run_on_both()
        lab.driver.says(init=18, all=18)
        lab.offered()
        for job in jobs.values():
            view = lab.world.until(job, lambda view: view.runs[0].reason, "the run's end")
            assert view.runs[0].reason == "device_failed"
        lab.driver.says()
        lab.offered(*CARDS)
        lab.finished(*jobs.values())


def test_a_driver_that_hangs_stops_neither_agent_nor_jobs(lab: Lab) -> None:
    with lab.machine.provides():
        jobs = lab.run_on_both()
        lab.driver.says(hang0=1)
        lab.offered()
        # The agent answers its owner, and the broker hears from its runs.
        began = time.monotonic()
        assert len(lab.machine.status()["runs"]) == 2
        assert time.monotonic() - began < 2.0
        lab.driver.says()
        lab.offered(*CARDS)
        lab.finished(*jobs.values())
        assert all(len(job.view().runs) == 1 for job in jobs.values())


def test_a_job_is_not_sent_where_the_owner_uses_the_memory(lab: Lab) -> None:
    lab.driver.says(used0=19_000_000_000, used1=19_000_000_000)
    with lab.machine.provides():
        lab.offered(*CARDS)
        assert lab.memory() == {6_757_220_864}
        with pytest.raises(SubletError) as caught:
            lab.submit(wait_for_offer=False)
        assert caught.value.problem.code == "no_match"
        # The owner is done: no restart is needed.
        lab.driver.says()
        lab.world.soon(
            lambda: (
                {device["memory_bytes"] for device in lab.machine.devices()} == {25_757_220_864}
            ),
            "all of the memory",
        )
        lab.finished(lab.submit())


def test_a_machine_with_fewer_cores_than_gpus_serves_as_well(lab: Lab) -> None:
    gpus = 4 * (os.cpu_count() or 1)
    lab.driver.says(count=gpus)
    code = "import os; print('threads', os.environ['OMP_NUM_THREADS'])"
    with lab.machine.provides():
        lab.world.soon(lambda: len(lab.machine.devices()) == gpus, "the offer")
        job = lab.world.python(lab.machine.region, code, gpus=1, cpus="", memory="64MB")
        assert lab.world.ended(job).state == "succeeded"
        # Its share is less than a core, and a job has one thread at least.
        assert "threads 1" in lab.world.log(job)


def test_a_machine_without_the_nvidia_runtime_sets_itself_aside(
    world: BadMarket, tmp_path: Path
) -> None:
    """Its engine takes a GPU's container, and fails to start it."""
    require("docker")
    image = base_image()
    machine = Machine(world, "no-runtime", build(tmp_path), ("docker", "--allow-image", image))
    with machine.provides():
        world.soon(machine.devices, "the offer")
        jobs = [
            world.python("no-runtime", f"print({number})", image=image, gpus=1)
            for number in range(3)
        ]
        world.soon(lambda: machine.status()["set_aside"], "the machine to set itself aside")
        assert "can't hand out its GPU" in machine.status()["set_aside"]
        world.soon(lambda: not machine.devices(), "the offer to be gone")
        # It has tested itself, which has failed in the same way.
        log = world.market.root / "logs" / "no-runtime.log"
        world.soon(lambda: "a start test failed" in log.read_text(), "a start test")
        asked = provider("status", "--state", str(machine.state)).stdout
        assert "nothing until a start test passes: " in asked
        # None of the jobs has failed by it.
        for job in jobs:
            view = job.view()
            assert view.state == "queued" or view.runs[-1].reason == "start_failed"
            job.cancel()
            assert world.ended(job).charged_ucr == 0


@pytest.mark.slow
def test_a_job_that_does_not_notice_a_recorded_fault_is_stopped_and_goes_on_elsewhere(
    lab: Lab,
) -> None:
    with lab.machine.provides():
        job = lab.run_on_both()[CARDS[0]]
        lab.driver.says(xids=2, xid0=1031, xid1=48)
        lab.offered(CARDS[1])
        view = lab.world.until(job, lambda view: view.runs[0].reason, "the run's end")
        assert view.runs[0].reason == "device_failed"
        assert "Xid 48" in view.runs[0].detail
        lab.finished(*lab.world.jobs[-2:])
        # What the other job had done wrong by itself was held against nobody.
        assert [len(done.view().runs) for done in lab.world.jobs[-2:]].count(1) == 1
