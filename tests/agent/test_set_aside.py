"""A machine on which jobs can't be started takes itself off the market, tests itself, and comes
back."""

import os
import subprocess
from pathlib import Path

import pytest

from sublet_agent.adapters.docker.runner import DockerRunner
from sublet_agent.adapters.process.runner import ProcessRunner
from sublet_agent.adapters.workspace.start_test import idle_program
from sublet_agent.core import effects, events
from sublet_agent.core.effects import Step
from sublet_agent.core.runner_port import Runner, StartFailed
from sublet_agent.core.status import Connection, Income, Status, make_status
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import LeaseAnswer, Withdraw
from tests.agent.test_core import World, only, said, wanted
from tests.agent.test_facts import announced
from tests.services import require

MINUTE_MS = 60_000


class Machine(World):
    """A machine with one device, on which starts may fail."""

    def starts(self, trouble: str = "", nonce: str = "") -> Step:
        """Have a job come, and its start go well, or fail."""
        job = self.job(nonce=nonce or f"{len(self.steps):032x}")
        lease_id, step = self.assign(job, epoch=len(self.steps))
        if lease_id not in self.core.runs:
            return step
        self.do(events.ImageReady(lease_id))
        self.do(events.Restored(lease_id))
        if not trouble:
            step = self.do(events.Observed(lease_id, True, self.now, 0))
        else:
            step = self.do(events.PreparationFailed(lease_id, Reason.START_FAILED, trouble))
        self.core.runs.pop(lease_id)
        self.core.saved.runs.pop(lease_id)
        return step

    def fails(self, times: int = 3) -> Step:
        return [self.starts("no nvidia runtime") for _ in range(times)][-1]

    def passes(self, time_ms: int) -> Step:
        self.now += time_ms
        return self.do(events.Tick())

    def status(self) -> Status:
        connection = Connection(connected=True, since_ms=0)
        return make_status(
            self.core, url="", connection=connection, income=Income(), now_ms=self.now
        )


def lines(step: Step) -> str:
    return "\n".join(effect.text for effect in wanted(step, effects.Say))


def test_three_jobs_in_a_row_that_do_not_start_are_the_machines_trouble() -> None:
    world = Machine()
    assert not said(world.fails(2), Withdraw)
    step = world.fails(1)
    only(step, Withdraw)
    assert "no nvidia runtime" in lines(step)
    assert "`sublet provider offer`" in lines(step)
    assert world.status().set_aside == "no nvidia runtime"
    # What the broker had sent before it knew is refused in words.
    assert "set itself aside: no nvidia runtime" in only(world.starts(), LeaseAnswer).refusal


def test_a_good_start_between_is_a_machine_that_works() -> None:
    world = Machine()
    world.fails(2)
    world.starts()
    assert not said(world.fails(2), Withdraw)


def test_one_jobs_own_trouble_sets_nothing_aside() -> None:
    world = Machine()
    for _ in range(10):
        assert not said(world.starts("executable not found", nonce="a" * 32), Withdraw)


def test_failures_of_pulls_and_restores_are_not_of_starts() -> None:
    world = Machine()
    for reason in (Reason.PULL_FAILED, Reason.RESTORE_FAILED, Reason.PROVIDER_DISK_FULL):
        job = world.job(nonce=f"{len(world.steps):032x}")
        lease_id, _ = world.assign(job)
        step = world.do(events.PreparationFailed(lease_id, reason, "no"))
        assert not said(step, Withdraw)
        world.core.runs.clear()
        world.core.saved.runs.clear()


def test_it_tests_itself_at_once_and_offers_again_when_that_passes() -> None:
    world = Machine()
    world.fails()
    assert wanted(world.passes(0), effects.StartTest) == [effects.StartTest(("gpu-0",))]
    assert not wanted(world.passes(10_000), effects.StartTest)  # one at a time
    step = world.do(events.StartTested(""))
    assert announced(step) is not None
    assert world.status().set_aside == ""


def test_each_failed_test_makes_the_next_wait_longer() -> None:
    world = Machine()
    world.fails()
    world.passes(0)
    waited = []
    for _ in range(8):
        step = world.do(events.StartTested("still no runtime"))
        assert announced(step) is None
        minutes = 1
        while not wanted(world.passes(MINUTE_MS), effects.StartTest):
            minutes += 1
        waited.append(minutes)
    assert waited == [1, 2, 4, 8, 16, 30, 30, 30]
    assert world.status().set_aside == "still no runtime"


def test_after_a_test_that_proved_nothing_it_waits_longer_before_the_next() -> None:
    world = Machine()
    world.fails()
    world.passes(0)
    world.do(events.StartTested(""))
    world.fails()
    assert not wanted(world.passes(0), effects.StartTest)
    assert wanted(world.passes(MINUTE_MS), effects.StartTest)
    world.do(events.StartTested(""))
    # Once a job has started well the machine is as good as new.
    world.starts()
    world.fails()
    assert wanted(world.passes(0), effects.StartTest)


def test_the_owners_offer_tries_at_once() -> None:
    world = Machine()
    world.fails()
    world.passes(0)
    world.do(events.StartTested("no"))
    assert announced(world.do(events.OfferAgain())) is None
    assert wanted(world.passes(0), effects.StartTest)
    assert announced(world.do(events.StartTested(""))) is not None


def test_a_test_that_ends_after_a_reclaim_offers_nothing() -> None:
    world = Machine()
    world.fails()
    world.passes(0)
    world.do(events.DrainAsked(Reason.RECLAIMED, 0, then_stop=False))
    assert announced(world.do(events.StartTested(""))) is None


# -- the runners' own tests ------------------------------------------------------------------------


def runner(name: str, folder: Path) -> Runner:
    if name == "docker":
        require("docker")
        return DockerRunner(f"t{os.getpid()}{os.urandom(3).hex()}")
    return ProcessRunner("owner", folder / "engine")


@pytest.mark.parametrize("name", ["process", "docker"])
def test_a_runner_that_works_passes_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    tested = runner(name, tmp_path)
    for _ in range(2):
        tested.start_test(tmp_path / "test", ("cpu",))
    assert tested.find() == []


def test_a_missing_nvidia_runtime_fails_the_test_in_words(tmp_path: Path) -> None:
    tested = runner("docker", tmp_path)
    with pytest.raises(StartFailed, match="can't hand out its GPU"):
        tested.start_test(tmp_path / "test", ("GPU-1",))
    assert tested.find() == []


def test_the_program_that_does_nothing_ends_well(tmp_path: Path) -> None:
    program = idle_program(os.uname().machine)
    assert program is not None
    path = tmp_path / "idle"
    path.write_bytes(program)
    path.chmod(0o700)
    assert subprocess.run([path], check=False).returncode == 0
    assert idle_program("mips") is None
