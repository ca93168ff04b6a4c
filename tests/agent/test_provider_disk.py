"""A machine whose disk is full, on a real small disk: it is the provider's fault, so the job goes
on elsewhere from its last durable step, and what was lost costs nothing.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sublet_contracts.api import JobView
from tests.e2e.bad_market import BadMarket
from tests.small_disk import small_disk

DISK_BYTES = 160 << 20
LOW_BYTES = 6 << 20
"""below what an agent wants to be free"""

# Steps until the file is there; each run says where it began.
STEPS = """
import os, sys, time
import sublet_ckpt as ckpt
found = ckpt.restore()
step = found.step if found else 0
print("from", step, flush=True)
while not os.path.exists(sys.argv[1]):
    step += 1
    ckpt.progress(step, 0)
    if step % 5 == 0:
        ckpt.save(step, {"state": str(step).encode()})
    time.sleep(0.05)
open(os.environ["SUBLET_OUTPUT_DIR"] + "/steps", "w").write(str(step))
"""


@pytest.fixture(scope="module")
def region(world: BadMarket) -> Iterator[str]:
    """Two machines in one region: a cheap one with the small disk, and one that is in order."""
    region = "disks"
    with small_disk(world.market.root / "small", DISK_BYTES):
        arguments = ("--price", "0.10", "--disk", "100MB")
        world.agent("small", *arguments, region=region)
        world.agent("sound", "--price", "0.90", region=region)
        try:
            world.offered("small", "sound")
            yield region
        finally:
            world.market.agents["small"].stop()
            world.market.agents["sound"].stop()


def _free_bytes(folder: Path) -> int:
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


@contextlib.contextmanager
def taken(folder: Path, left_bytes: int) -> Iterator[None]:
    """Take all but so much of this disk, as another program of the owner's would."""
    ballast = folder / "ballast"
    # Not more than was free at first: what the agent gives up of its reserve meanwhile is its own.
    most = _free_bytes(folder) - left_bytes
    with ballast.open("wb") as file:
        while (free := _free_bytes(folder) - left_bytes) > 0:
            size = ballast.stat().st_size
            if size >= most:
                break
            # The agent writes here too: what was free a moment ago may be taken, so ask again.
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), size, min(free, most - size))
    try:
        yield
    finally:
        ballast.unlink()


def fails_at_the_small_one(view: JobView) -> None:
    first, second = view.runs[0], view.runs[-1]
    assert (first.provider_name, first.reason) == ("small", "provider_disk_full"), view.runs
    assert (second.provider_name, second.reason) == ("sound", "succeeded"), view.runs


@pytest.mark.parametrize("left_bytes", [pytest.param(LOW_BYTES, marks=pytest.mark.slow), 0])
def test_a_disk_that_fills_during_a_run(
    world: BadMarket, region: str, tmp_path: Path, left_bytes: int
) -> None:
    world.offered("small")
    finish = tmp_path / "finish"
    job = world.submit(region, ["python3", "-u", "-c", STEPS, str(finish)], outputs="/out")
    world.until(job, lambda view: view.durable_step >= 10, "a durable step")
    with taken(world.market.root / "small", left_bytes):
        world.until(job, lambda view: len(view.runs) == 2, "the next run")
        world.until(job, lambda view: view.durable_step > view.runs[-1].start_step, "new progress")
        # The agent with the full disk lives, and says so.
        assert world.market.agents["small"].running
        finish.write_text("")
        view = world.ended(job)
    fails_at_the_small_one(view)
    # It went on from the durable step, and only what led there is billed.
    first = view.runs[0]
    assert view.runs[1].start_step == first.durable_step >= 10
    assert world.log(job, "stdout") == ["from 0", f"from {first.durable_step}"]
    lost, _ = sorted(job.statement().charges, key=lambda charge: charge.epoch)
    assert (lost.reason, lost.fault) == ("provider_disk_full", "provider")
    assert lost.payable_device_ms + lost.lost_device_ms == lost.cum_device_ms
    assert lost.lost_device_ms > 0
    job.download(tmp_path / "out")
    assert int((tmp_path / "out" / "steps").read_text()) >= view.durable_step


@pytest.mark.slow
def test_an_input_that_does_not_fit(world: BadMarket, region: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(os.urandom(DISK_BYTES + (1 << 20)))
    code = "import os, sys; print(os.path.getsize(sys.argv[1]))"
    world.offered("small")
    job = world.submit(
        region, ["python3", "-c", code, "/data"], inputs={str(data): "/data"}, disk="100MB"
    )
    view = world.ended(job)
    fails_at_the_small_one(view)
    assert world.log(job, "stdout") == [str(DISK_BYTES + (1 << 20))]
    assert view.runs[0].charge_ucr == 0
    world.said_by_us(
        job, f"provider_disk_full: [Errno 28] inputs and checkpoint have {data.stat().st_size}"
    )
    # Nothing of it fills the small disk any more: the machine is fit for another job.
    assert not list((world.market.root / "small").glob("runs/*/inputs/*"))
    small = world.python(region, "print('fits')")
    view = world.ended(small)
    assert (view.state, view.runs[0].provider_name) == ("succeeded", "small")
