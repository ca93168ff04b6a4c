"""Log lines: in order, once, from whoever may write them, and not without end."""

from __future__ import annotations

from sublet_broker.service.broker import Settings
from sublet_contracts.reasons import Reason
from tests.service.world import AgentDouble, RenterDouble, RunDouble, World


def texts(renter: RenterDouble, job: str) -> list[str]:
    return [line.text for line in renter.world.broker.views.logs(renter.party, job)]


def failed_and_gone_on() -> tuple[World, RenterDouble, str, AgentDouble, RunDouble, AgentDouble]:
    """A run of alice's that ended by itself; its job runs on bob's machine now."""
    world = World()
    alice = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    bob = world.agent("bob")
    run = alice.the_run
    assert alice.log(run, 0, "begins") == 1
    alice.exit(run, Reason.RUN_KILLED, 137)
    alice.leave()
    world.pass_ms(5_000)
    assert bob.the_run.job_id == job
    return world, renter, job, alice, run, bob


def test_the_last_lines_of_an_attempt_come_after_the_next_has_begun() -> None:
    world, renter, job, alice, run, bob = failed_and_gone_on()
    bob.log(bob.the_run, 0, "goes on")
    alice.join()
    assert alice.log(run, 1, "Traceback", "CUDA error") == 3
    assert alice.log(run, 1, "Traceback", "CUDA error") == 3  # sent again: nothing is repeated
    bob.log(bob.the_run, 1, "step 1")
    lines = world.broker.views.logs(renter.party, job)
    assert [(line.epoch, line.number, line.text) for line in lines] == [
        (1, 0, "begins"),
        (2, 0, "goes on"),
        (1, 1, "Traceback"),
        (1, 2, "CUDA error"),
        (2, 1, "step 1"),
    ]
    # A reader that was at "goes on" misses nothing: cursors rise in the order of arrival.
    later = world.broker.views.logs(renter.party, job, after=lines[1].cursor)
    assert [line.text for line in later] == ["Traceback", "CUDA error", "step 1"]


def test_late_lines_are_taken_for_a_while_only() -> None:
    world, renter, job, alice, run, _ = failed_and_gone_on()
    alice.join()
    world.pass_ms(world.settings.late_logs_ms, every_ms=3_000)
    assert alice.log(run, 1, "too late") == 2
    assert texts(renter, job) == ["begins"]


def test_a_run_that_was_given_up_adds_nothing() -> None:
    world = World()
    alice = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = alice.the_run
    alice.log(run, 0, "begins")
    alice.die()
    world.pass_ms(30_000)
    world.agent("bob")
    world.settle_down()
    alice.awake = True
    alice.join()
    assert alice.log(run, 1, "I never died") == 2
    assert texts(renter, job) == ["begins"]


def test_nobody_writes_into_anothers_log() -> None:
    world = World()
    alice, mallory = world.agent("alice"), world.agent("mallory", price_ucr_per_device_hour=9**9)
    renter = world.renter()
    job = renter.run()
    assert mallory.log(alice.the_run, 0, "alice is bad") == 1
    assert texts(renter, job) == []


def test_a_log_has_an_end() -> None:
    world = World(Settings(max_job_log_bytes=100))
    alice = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    assert alice.log(alice.the_run, 0, "x" * 60, "y" * 60, "z" * 60) == 3
    assert alice.log(alice.the_run, 3, "more") == 4
    assert texts(renter, job) == ["x" * 60, "y" * 60]
    events = world.broker.views.events(renter.party, job).events
    assert [event.after for event in events if event.kind == "log"] == ["full"]
