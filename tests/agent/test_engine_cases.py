"""The owner's engine, and jobs of others on it: whole agents, a real engine, real money."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import docker
import pytest

from sublet.client import Job
from sublet_agent.adapters.docker.runner import DockerRunner
from tests.agent.owners_command import provider
from tests.agent.test_docker_evidence import LEAVES
from tests.e2e.bad_market import BadMarket
from tests.images import base_image
from tests.services import require

pytestmark = [pytest.mark.docker, pytest.mark.slow]

YIELDS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("up", flush=True)
time.sleep(600)
"""
PAUSED_S = 8.0


@pytest.fixture(autouse=True)
def _docker() -> None:
    require("docker")


def container_of(job: Job) -> Any:
    (found,) = docker.from_env().containers.list(filters={"label": f"sublet.job={job.id}"})
    return found


def up(world: BadMarket, job: Job) -> None:
    world.until(job, lambda view: view.state == "running", "its start")
    world.soon(lambda: "up" in world.log(job), "its first line")


def test_what_docker_stop_ends_goes_on_elsewhere_at_no_cost(world: BadMarket) -> None:
    """Case 05: exit code 0 of a script that was asked to end by somebody is no success."""
    world.agent("stopped-1", runner="docker", region="stopped")
    world.offered("stopped-1")
    job = world.python("stopped", LEAVES, image=base_image())
    up(world, job)
    world.agent("stopped-2", runner="docker", region="stopped")
    world.offered("stopped-2")
    container_of(job).stop()
    view = world.until(job, lambda found: len(found.runs) == 2, "its next run")
    assert view.runs[0].reason == "engine_stopped"
    world.until(job, lambda found: found.runs[-1].run_state == "running", "its going on")
    (charge,) = job.statement().charges
    assert charge.charged_ucr == 0
    job.cancel()
    world.ended(job)


def test_a_job_that_returns_137_has_failed_and_pays_and_one_that_was_killed_has_not(
    world: BadMarket,
) -> None:
    """Case 06, and its mirror: the same number, by an owner's `kill -9`."""
    if why := DockerRunner("nobody").why_no_witness():
        pytest.skip(f"the kernel's process events can't be followed: {why}")
    world.agent("codes-1", runner="docker", region="codes")
    world.offered("codes-1")
    script = "echo the result is 42; echo up; sleep 3; exit 137"
    job = world.submit("codes", ["sh", "-c", script], image=base_image())
    view = world.ended(job)
    assert (view.state, view.reason, len(view.runs)) == ("failed", "job_failed", 1)
    assert view.charged_ucr > 0
    killed = world.python("codes", YIELDS, image=base_image())
    up(world, killed)
    _, own, *_ = container_of(killed).top(ps_args="-eo pid")["Processes"]
    os.kill(int(own[0]), signal.SIGKILL)
    view = world.until(killed, lambda found: found.runs[0].reason is not None, "its kill")
    assert view.runs[0].reason == "killed_unattributed"
    assert killed.statement().charged_ucr == 0
    killed.cancel()
    world.ended(killed)


def test_paused_time_costs_nothing_and_a_reclaim_gets_through(world: BadMarket) -> None:
    """Case 12, and the agent is killed while it is paused."""
    agent = world.agent("paused", runner="docker")
    world.offered("paused")
    job = world.python("paused", YIELDS, image=base_image(), patience="60s")
    up(world, job)
    began = time.monotonic()
    container_of(job).pause()
    told = "that time is not charged"
    world.soon(lambda: told in " ".join(world.log(job, "sublet")), "what the renter is told")
    agent.kill()
    world.agent("paused", runner="docker")
    world.soon(
        lambda: provider("status", "--state", str(world.market.root / "paused")).returncode == 0,
        "the agent to come back",
    )
    time.sleep(PAUSED_S)
    state = str(world.market.root / "paused")
    assert provider("reclaim", "--grace", "5s", "--state", state).returncode == 0
    paused_ms = (time.monotonic() - began) * 1000
    world.soon(lambda: job.view().runs[0].run_state == "exited", "its end")
    run = job.view().runs[0]
    assert run.reason == "reclaimed"
    assert run.cum_device_ms < paused_ms / 2
    job.cancel()
    world.ended(job)
