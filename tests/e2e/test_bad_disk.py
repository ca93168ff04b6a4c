"""A broker whose disk is full, on a real small disk: the sender is told, runs go on, nothing is
lost, and once there is space again everything catches up by itself.

The broker of this market takes pinned images only, and works with short times, so that a few
seconds are longer than a job's patience.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from sublet.client import Job
from sublet.errors import SubletError
from sublet.fixes import fix_of
from tests.e2e.bad_market import BadMarket
from tests.small_disk import small_disk

pytestmark = pytest.mark.slow

DISK_BYTES = 32 << 20
CHECKPOINT_BYTES = 100_000
PINNED = "python@sha256:" + "0" * 64
TIMES = ("--heartbeat-ms", "500", "--unknown-after-ms", "1500")
PATIENCE_S = 5

# Saves again and again, until it's told to finish by a file.
SAVES = f"""
import os, random, sys, time
import sublet_ckpt as ckpt
step = 0
while not os.path.exists(sys.argv[1]):
    step += 1
    ckpt.save(step, {{"state": random.Random(step).randbytes({CHECKPOINT_BYTES})}})
    ckpt.progress(step, 0)
    print("step", step, flush=True)
    time.sleep(0.4)
open(os.environ["SUBLET_OUTPUT_DIR"] + "/steps", "w").write(str(step))
"""


class Disk:
    """The broker's disk, and what is put on it to fill it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ballast = folder / "ballast"

    @property
    def free_bytes(self) -> int:
        room = os.statvfs(self.folder)
        return room.f_bavail * room.f_frsize

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Keep it full, whatever the broker lets go of meanwhile."""
        done = threading.Event()

        def fill() -> None:
            with self.ballast.open("ab") as file:
                while not done.wait(0.005):
                    # Where the broker was quicker, look again.
                    with contextlib.suppress(OSError):
                        os.write(file.fileno(), b"\0" * self.free_bytes)

        filler = threading.Thread(target=fill)
        filler.start()
        try:
            yield
        finally:
            done.set()
            filler.join()
            self.ballast.unlink()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BadMarket]:
    world = BadMarket(tmp_path_factory.mktemp("bad-disk"), ("--image-policy", "digest", *TIMES))
    with small_disk(world.market.root / "broker", DISK_BYTES):
        try:
            world.start()
            world.agent("here")
            world.offered("here")
            yield world
            world.balanced()
        finally:
            world.stop()


def test_an_image_by_tag_where_the_broker_wants_a_digest(world: BadMarket) -> None:
    problem = world.refused("here", image="python:3.11")
    assert (problem.code, problem.field) == ("image_not_pinned", "image")
    assert "name@sha256:" in fix_of(problem)


def test_a_full_disk_at_the_broker(world: BadMarket, tmp_path: Path) -> None:
    disk = Disk(world.market.root / "broker")
    finish = tmp_path / "finish"
    job = world.submit(
        "here",
        ["python3", "-u", "-c", SAVES, str(finish)],
        image=PINNED,
        outputs="/out",
        patience=f"{PATIENCE_S}s",
    )
    world.until(job, lambda view: view.durable_step >= 2, "a durable step")

    waiter = Waiter(job)

    # For longer than the job's patience not even a heartbeat can be kept: the job computes on,
    # uploads and submissions are refused with 507, and the broker can still be asked.
    with disk.full():
        full_s = time.monotonic()
        world.soon(lambda: " 507" in broker_log(world), "a refused upload")
        told_an_uploader(world, tmp_path)
        told_a_submitter(world)
        step = world.market.last_step("here")
        world.soon(lambda: world.market.last_step("here") > step + 2, "steps that go on")
        assert job.view().state == "running"
        health = httpx.get(f"{world.market.url}/readyz", timeout=120)
        assert health.status_code == 503
        assert "free some space" in health.text
        time.sleep(max(0.0, full_s + 2 * PATIENCE_S - time.monotonic()))  # the fault itself

    durable = job.view().durable_step
    world.until(job, lambda view: view.durable_step > durable + 1, "a newer durable step", 60)
    finish.write_text("")
    view = world.ended(job)
    assert view.state == "succeeded", view.says
    assert waiter.state() == "succeeded"
    # Nobody was preempted for the broker's own trouble.
    assert (len(view.runs), view.recoveries) == (1, 0), view.runs
    job.download(tmp_path / "out")
    assert int((tmp_path / "out" / "steps").read_text()) == view.durable_step
    lines = [int(line.split()[1]) for line in world.log(job, "stdout")]
    assert lines == list(range(1, view.durable_step + 1))


class Waiter:
    """A renter's program that waits for a job, and signs its receipts, all the while."""

    def __init__(self, job: Job) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._end = self._pool.submit(lambda: Job(job.client.copy(), job.id, job.view()).wait())

    def state(self) -> str:
        """Return the state that it was told in the end."""
        with self._pool:
            return self._end.result(timeout=300).state


def told_an_uploader(world: BadMarket, tmp_path: Path) -> None:
    """Send an input: refused, and the money is where it was."""
    data = tmp_path / "data"
    data.write_bytes(os.urandom(CHECKPOINT_BYTES))
    before = world.client.balance()
    with pytest.raises(SubletError) as caught:
        world.python("here", "pass", image=PINNED, inputs={str(data): "/data"})
    problem = caught.value.problem
    assert (problem.status, problem.code) == (507, "storage_full")
    assert "operator" in caught.value.fix
    assert world.client.balance() == before


def told_a_submitter(world: BadMarket) -> None:
    """Submit until the database has no page left: refused, and nothing is held for it."""

    problems = []

    def refused() -> bool:
        try:
            world.python("here", "pass", image=PINNED)
        except SubletError as error:
            problems.append(error.problem)
        return bool(problems)

    world.soon(refused, "a refused submission")
    assert (problems[0].status, problems[0].code) == (507, "storage_full")
    assert fix_of(problems[0])
    held = sum(view.held_ucr for view in world.client.jobs().jobs)
    assert world.client.balance().held_ucr == held


def broker_log(world: BadMarket) -> str:
    assert world.market.broker is not None
    return world.market.broker.log.read_text()


def test_what_was_submitted_meanwhile_is_whole(world: BadMarket) -> None:
    for view in world.client.jobs().jobs:
        assert world.ended(Job(world.client, view.id, view)).state == "succeeded"
    good = world.python("here", "print('fine')", image=PINNED)
    assert world.ended(good).state == "succeeded"
