"""While a run is unknown, its successor fetches ahead; real agents, and files that are moved once.

That nothing is fetched twice is seen at the files themselves: what the run finds has the inode of
what was prepared.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sublet.client import Job
from tests.e2e.bad_market import BadMarket

REGION = "ahead"
WEIGHTS = b"w" * 300_000

# Saves once, then only waits, so that every successor starts from that step.
SAVES_ONCE = """
import os, sys, time
import sublet_ckpt as ckpt
found = ckpt.restore()
print("from", found.step if found else 0, flush=True)
if not found:
    ckpt.save(7, {"weights": open(sys.argv[1], "rb").read()})
while not os.path.exists(sys.argv[2]):
    time.sleep(0.1)
weights = open(sys.argv[1], "rb").read()
assert not found or (found.path / "weights").read_bytes() == weights
open(os.environ["SUBLET_OUTPUT_DIR"] + "/size", "w").write(str(len(weights)))
"""


@pytest.fixture(scope="module")
def agents(world: BadMarket) -> Iterator[BadMarket]:
    """A cheap machine and a dear one."""
    world.agent("cheap", "--price", "0.10", region=REGION)
    world.agent("dear", "--price", "0.90", region=REGION)
    world.offered("cheap", "dear")
    yield world
    for name in ("cheap", "dear"):
        world.market.agents[name].stop()


@pytest.fixture
def job(agents: BadMarket, tmp_path: Path) -> Job:
    """A job on the cheap machine, with an input and a durable checkpoint."""
    data = tmp_path / "weights"
    data.write_bytes(WEIGHTS)
    job = agents.submit(
        REGION,
        ["python3", "-u", "-c", SAVES_ONCE, "/in/weights", str(tmp_path / "finish")],
        inputs={str(data): "/in/weights"},
        outputs="/out",
        patience="20s",
    )
    view = agents.until(job, lambda view: view.durable_step == 7, "the durable step")
    assert view.runs[0].provider_name == "cheap"
    # What a machine has not sent when it is lost is lost, its last words too.
    agents.soon(lambda: agents.log(job, "stdout") == ["from 0"], "its first line")
    return job


def prepared(world: BadMarket, job: Job) -> Path:
    return world.market.root / "dear" / "prepared" / job.id[:16]


def whole(folder: Path) -> set[int]:
    """Return the inodes of all files there, once inputs and checkpoint are whole; else nothing."""
    ready = [folder / "inputs", *folder.glob("checkpoint-*")]
    if len(ready) != 2 or any(path.suffix == ".tmp" or not path.is_dir() for path in ready):
        return set()
    return {
        path.stat().st_ino for place in ready for path in place.rglob("*") if path.name == "weights"
    }


def silent(world: BadMarket, job: Job) -> set[int]:
    """Stop the cheap machine's agent in its tracks; return what its successor has fetched."""
    world.market.agents["cheap"].signal(signal.SIGSTOP)
    world.soon(lambda: whole(prepared(world, job)), "the successor to be prepared")
    return whole(prepared(world, job))


def test_a_blip_prepares_and_unprepares(agents: BadMarket, job: Job, tmp_path: Path) -> None:
    silent(agents, job)
    agents.market.agents["cheap"].signal(signal.SIGCONT)
    agents.soon(lambda: not prepared(agents, job).exists(), "what was prepared to be deleted")
    (tmp_path / "finish").write_text("")
    view = agents.ended(job)
    # It went on where it was; the successor had no lease, and nothing is left with it.
    assert (view.state, view.recoveries, len(view.runs)) == ("succeeded", 0, 1)
    assert not list((agents.market.root / "dear").glob("runs/*"))
    agents.offered("cheap", "dear")


@pytest.mark.slow
def test_a_loss_starts_from_what_was_prepared(agents: BadMarket, job: Job, tmp_path: Path) -> None:
    inodes = silent(agents, job)
    # One is the input, one is in the checkpoint.
    assert len(inodes) == 2
    view = agents.until(
        job,
        lambda view: len(view.runs) == 2 and view.runs[1].run_state == "running",
        "its next run",
    )
    second = view.runs[1]
    assert (second.provider_name, second.start_step) == ("dear", 7)
    run = agents.market.root / "dear" / "runs" / second.lease[:16]
    there = {path.stat().st_ino for path in run.rglob("weights")}
    assert there == inodes
    assert not prepared(agents, job).exists()
    # The sleeper wakes, and stops what is no longer its.
    agents.market.agents["cheap"].signal(signal.SIGCONT)
    (tmp_path / "finish").write_text("")
    view = agents.ended(job)
    assert (view.state, view.recoveries, len(view.runs)) == ("succeeded", 1, 2)
    assert agents.log(job, "stdout") == ["from 0", "from 7"]
    job.download(tmp_path / "out")
    assert (tmp_path / "out" / "size").read_text() == str(len(WEIGHTS))
