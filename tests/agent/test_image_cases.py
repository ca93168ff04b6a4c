"""What a renter sees of images that can't be had: real agents on Docker, a registry in a mood.

Each machine has an agent of its own; all of them share this machine's engine, as no two do in the
world. An image is no other agent's for that: each pulls what its own renters ask for.
"""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest

from sublet.client import Job
from sublet_contracts.api import JobView
from tests.agent.registry_double import Mood, RegistryDouble, layer_of, serving
from tests.agent.test_images import Machine
from tests.e2e.bad_market import BadMarket
from tests.images import base_image
from tests.services import require

pytestmark = [pytest.mark.docker, pytest.mark.slow]

LIMIT_S = 300.0
# Saves a step once a second for a minute.
TRAINS = """
import time
import sublet_ckpt as ckpt
found = ckpt.restore()
step = found.step if found else 0
print("from", step, flush=True)
while step < 60:
    time.sleep(0.5)
    step += 1
    stop = ckpt.should_stop()
    if stop or step % 2 == 0:
        ckpt.save(step, {"state": b"%d" % step})
    if stop:
        ckpt.exit_preempted()
    if found and step >= found.step + 2:
        break
print("done", flush=True)
"""


@dataclass
class Place:
    """A region with machines of its own, and the registry."""

    world: BadMarket
    registry: RegistryDouble
    true: bytes
    """a program that does nothing, with all that it needs in it"""
    region: str

    def machines(self, *arguments: str) -> None:
        """Start two machines, the first the cheaper one."""
        for name, price in (("one", "0.10"), ("two", "0.20")):
            self.world.agent(
                f"{self.region}-{name}",
                "--price",
                price,
                "--allow-registry",
                "127.0.0.1",
                *arguments,
                runner="docker",
                region=self.region,
            )
        self.world.offered(f"{self.region}-one", f"{self.region}-two")

    def image(self, tag: str, megabytes: float = 1) -> str:
        """Hold an image that runs `/true`. Returns its name."""
        files = {"true": self.true, "noise": os.urandom(int(megabytes * 2**20))}
        self.registry.add(f"t/{self.region}", tag, [layer_of(files)], command=("/true",))
        return f"{self.registry.name}/t/{self.region}:{tag}"

    def submit(self, image: str, *command: str, **options: object) -> Job:
        """Submit a job that runs an image of the registry's."""
        return self.world.submit(self.region, command, image=image, **options)

    def failed(self, job: Job, runs: int, reason: str) -> JobView:
        """Wait until so many runs have ended for a reason, without the job's own end."""

        def enough(view: JobView) -> bool:
            return sum(run.reason == reason for run in view.runs) >= runs

        view = self.world.until(job, enough, f"{runs} runs that end as {reason}", LIMIT_S)
        assert view.state not in ("failed", "cancelled", "succeeded")
        assert all(run.charge_ucr == 0 for run in view.runs if run.reason == reason)
        return view

    def succeeded(self, job: Job) -> JobView:
        """Wait for its good end."""
        view = self.world.ended(job, LIMIT_S)
        assert view.state == "succeeded", (view.state, view.says)
        return view

    def stop(self) -> None:
        """Stop the machines."""
        for name in ("one", "two"):
            agent = self.world.market.agents.get(f"{self.region}-{name}")
            if agent is not None:
                agent.stop()


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    require("cc")
    folder = tmp_path_factory.mktemp("true")
    source = folder / "true.c"
    source.write_text("int main(void) { return 0; }\n")
    subprocess.run(["cc", "-static", "-Os", "-s", "-o", folder / "true", source], check=True)
    return (folder / "true").read_bytes()


@pytest.fixture
def place(
    world: BadMarket, true: bytes, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Place]:
    require("docker")
    region = request.node.name.removeprefix("test_").split("[")[0].replace("_", "-")[:20].strip("-")
    with serving(RegistryDouble()) as registry, closing(docker.from_env()) as engine:
        made = Place(world, registry, true, region)
        try:
            yield made
        finally:
            registry.mood = Mood.WELL
            made.stop()
            Machine(registry, engine, tmp_path).forget()


def saved_python() -> bytes:
    """Return an image with Python that is not here and that no owner lists: it must be pulled."""
    dockerfile = f"FROM {base_image()}\nLABEL org.sublet.test={os.urandom(8).hex()}\n"
    with closing(docker.from_env()) as engine:
        source = io.BytesIO(dockerfile.encode())
        made, _ = engine.images.build(fileobj=source, rm=True, network_mode="none")
        try:
            return b"".join(made.save())
        finally:
            engine.images.remove(str(made.id), force=True)


@pytest.mark.parametrize("mood", [Mood.BUSY, Mood.DOWN, Mood.NO_BLOBS, Mood.HALF_MANIFEST])
def test_busy(place: Place, mood: Mood) -> None:
    """Case 03 a), and its neighbours: one machine's bad pull is not the job's end."""
    place.machines()
    image = place.image(mood.name.lower().replace("_", ""))
    place.registry.mood = mood
    job = place.submit(image)
    view = place.failed(job, 1, "pull_failed")
    assert view.runs[0].provider_name.endswith("one")
    place.registry.mood = Mood.WELL
    view = place.succeeded(job)
    # The other one is asked next, whatever the registry's mood was by then.
    assert view.runs[1].provider_name.endswith("two")
    line = place.world.said_by_us(job, "pull_failed: image")
    assert "HTTP" not in line
    assert "127.0.0.1" in line, "the image is named"


def test_durable(place: Place) -> None:
    """Case 03 b): what is durable outlives a registry that is down."""
    place.registry.add_saved("t/python", "1", saved_python())
    place.machines()
    image = f"{place.registry.name}/t/python:1"
    job = place.submit(image, "python3", "-u", "-c", TRAINS, disk="256MB")
    durable = place.world.until(job, lambda view: view.durable_step >= 4, "a durable step", LIMIT_S)
    assert durable.runs[0].provider_name.endswith("one")
    place.registry.mood = Mood.DOWN
    state = str(place.world.market.root / f"{place.region}-one")
    place.world.market.command("provider", "reclaim", "--state", state)
    place.failed(job, 1, "pull_failed")
    place.registry.mood = Mood.WELL
    view = place.succeeded(job)
    assert view.runs[-1].start_step >= durable.durable_step
    assert view.runs[-1].provider_name.endswith("two")


def test_moved(place: Place) -> None:
    """A tag is given to another image while its job runs: the job goes on with the one it began."""
    with closing(docker.from_env()) as engine:
        saved = b"".join(engine.images.get(base_image()).save())
    digest = place.registry.add_saved("t/moved", "1", saved)
    place.machines()
    name = f"{place.registry.name}/t/moved"
    job = place.submit(f"{name}:1", "python3", "-u", "-c", TRAINS, disk="256MB")
    durable = place.world.until(job, lambda view: view.durable_step >= 4, "a durable step", LIMIT_S)
    assert durable.image_pinned == f"{name}@{digest}"
    # The new one has no Python.
    assert place.registry.add("t/moved", "1", [layer_of({"true": place.true})]) != digest
    state = str(place.world.market.root / f"{place.region}-one")
    place.world.market.command("provider", "reclaim", "--state", state)
    view = place.succeeded(job)
    assert view.runs[-1].provider_name.endswith("two")
    assert view.runs[-1].start_step >= durable.durable_step
    assert view.image_pinned == f"{name}@{digest}"


def test_stay(place: Place) -> None:
    """Case 17: what was pulled goes again before the disk that is offered is used up."""
    place.machines("--disk", "80MB", "--image-cap", "70MB")
    images = []
    for number in (1, 3, 4):
        image = place.image(str(number), megabytes=10)
        place.succeeded(place.submit(image, disk="64MB"))
        images.append(image)
    with closing(docker.from_env()) as engine:
        held = engine.images.list(f"{place.registry.name}/t/{place.region}")
        # 64 MB are what a job may write: 16 are left, and each image has 11.
        assert len(held) == 1
    # One of a job that was cancelled on the way is not there either, or goes as any other.
    place.registry.mood = Mood.DRIP
    known = set(place.registry.blobs)
    image = place.image("5", megabytes=10)
    layer = max(place.registry.blobs.keys() - known, key=lambda one: len(place.registry.blobs[one]))
    job = place.submit(image, disk="64MB")
    place.world.soon(lambda: place.registry.asked_for(layer), "the pull to begin")
    job.cancel()
    assert place.world.ended(job).state == "cancelled"
    place.world.soon(lambda: place.registry.ended_early > 0, "the engine to let go")


@pytest.mark.parametrize("how", ["listed", "alone"])
def test_platform(place: Place, how: str) -> None:
    """Case 18: an image for another architecture is not held against the job."""
    place.machines()
    repository = f"t/{place.region}"
    digest = place.registry.add(repository, "alone", architecture="s390x")
    place.registry.add_list(repository, "listed", digest, "s390x")
    job = place.submit(f"{place.registry.name}/{repository}:{how}", "/true")
    view = place.failed(job, 2, "pull_failed")
    assert {run.provider_name for run in view.runs[:2]} == {
        f"{place.region}-one",
        f"{place.region}-two",
    }
    assert place.world.said_by_us(job, "there is none for this machine's architecture")
    job.cancel()
    place.world.ended(job)


@pytest.mark.parametrize("mood", [Mood.STILL, Mood.RESET])
def test_still(place: Place, mood: Mood) -> None:
    """Case 19: a pull that stands still, or is cut again and again, ends, and the next is asked."""
    place.machines("--pull-patience", "8s")
    image = place.image(mood.name.lower(), megabytes=3)
    place.registry.mood = mood
    job = place.submit(image)
    place.world.soon(
        lambda: any("pulling the image" in line for line in place.world.log(job, "sublet")),
        "the renter to be told that it is pulled",
    )
    view = place.failed(job, 1, "pull_failed")
    place.registry.mood = Mood.WELL
    view = place.succeeded(job)
    # The other one is asked next; who succeeds in the end is the registry's mood.
    assert view.runs[1].provider_name.endswith("two")


def test_not_allowed(place: Place) -> None:
    """A private image of the owner's, an odd name, a registry at home: none kills the agent."""
    place.machines()
    with closing(docker.from_env()) as engine:
        engine.api.import_image_from_data(
            layer_of({"true": place.true}),
            repository=f"{place.registry.name}/owner/private",
            tag="1",
        )
    for image, reason in (
        (f"{place.registry.name}/owner/private:1", "image_unknown"),
        ("localhost:1/x:1", "image_not_allowed"),
        ("169.254.169.254/latest/meta-data", "image_not_allowed"),
    ):
        job = place.submit(image, "/true")
        place.failed(job, 1, reason)
        job.cancel()
        place.world.ended(job)
    place.succeeded(place.submit(place.image("after")))
