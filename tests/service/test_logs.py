"""Log lines: in order, once, from whoever may write them, and not without end."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from sublet_broker.service.broker import Settings
from sublet_broker.service.errors import Refusal
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import DeviceUsage, Heartbeat, LogState, LogStates, RunStall, RunUsage
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


# -- where to begin --------------------------------------------------------------------------------


def a_log_of_two_runs() -> tuple[World, RenterDouble, str]:
    """Run 1 wrote a0..a3, run 2 b0..b2, and of run 1 a4 came late; a second lies between lines."""
    world, renter, job, alice, run, bob = failed_and_gone_on()
    for number in range(3):
        world.pass_ms(1_000)
        bob.log(bob.the_run, number, f"b{number}")
    alice.join()
    alice.log(run, 1, "late")
    return world, renter, job


def shown(renter: RenterDouble, job: str, **where: int) -> list[str]:
    views, run = renter.world.broker.views, where.get("epoch")
    after = views.log_start(renter.party, job, **where)
    return [line.text for line in views.logs(renter.party, job, after, epoch=run)]


def test_where_a_reader_begins() -> None:
    world, renter, job = a_log_of_two_runs()
    lines = {line.text: line for line in world.broker.views.logs(renter.party, job)}
    assert list(lines) == ["begins", "b0", "b1", "b2", "late"]
    assert shown(renter, job, tail=2) == ["b2", "late"]
    assert shown(renter, job, tail=0) == []
    assert shown(renter, job, tail=99) == list(lines)
    assert shown(renter, job, epoch=2) == ["b0", "b1", "b2"]
    assert shown(renter, job, epoch=1) == ["begins", "late"]
    assert shown(renter, job, epoch=1, tail=1) == ["late"]
    assert shown(renter, job, epoch=2, tail=2) == ["b1", "b2"]
    assert shown(renter, job, epoch=2, tail=0) == []
    assert shown(renter, job, since_ms=lines["b1"].time_ms) == ["b1", "b2", "late"]
    assert shown(renter, job, since_ms=lines["b1"].time_ms + 1) == ["b2", "late"]
    assert shown(renter, job, since_ms=0) == list(lines)
    assert shown(renter, job, since_ms=world.now_ms + 1) == []
    assert shown(renter, job, since_ms=lines["b0"].time_ms, tail=1) == ["late"]
    assert shown(renter, job, since_ms=lines["b2"].time_ms, tail=4) == ["b2", "late"]
    # Of one run a reader goes on at its own line, or at any other.
    views = world.broker.views
    for cursor, rest in (("b0", ["b1", "b2"]), ("begins", ["b0", "b1", "b2"]), ("late", [])):
        found = views.logs(renter.party, job, lines[cursor].cursor, epoch=2)
        assert [line.text for line in found] == rest


def test_a_run_that_the_job_never_had() -> None:
    world, renter, job = a_log_of_two_runs()
    for ask in (
        lambda: world.broker.views.log_start(renter.party, job, epoch=3),
        lambda: world.broker.views.logs(renter.party, job, epoch=3),
    ):
        with pytest.raises(Refusal, match="no run 3; it has had 2") as refused:
            ask()
        assert refused.value.field == "run"


# -- unfinished lines ------------------------------------------------------------------------------


def state(number: int, text: str, stream: Literal["stdout", "stderr"] = "stdout") -> LogState:
    return LogState(number=number, time_ms=7, stream=stream, text=text)


def test_an_unfinished_line_is_shown_as_it_stands_until_it_is_finished() -> None:
    world = World()
    alice, mallory = world.agent("alice"), world.agent("mallory", price_ucr_per_device_hour=9**9)
    renter = world.renter()
    job = renter.run()
    run = alice.the_run

    def stands() -> list[tuple[str, str, int]]:
        found = world.broker.views.unfinished(job, after=5)
        assert all(line.unfinished and line.cursor == 5 for line in found)
        return [(line.stream, line.text, line.epoch) for line in found]

    def says(agent: AgentDouble, *states: LogState, epoch: int = 1) -> None:
        agent.tell(LogStates(lease=run.id, epoch=epoch, states=states))

    assert stands() == []
    alice.log(run, 0, "begins")
    says(alice, state(1, "40%"), state(1, "?", "stderr"))
    assert stands() == [("stdout", "40%", 1), ("stderr", "?", 1)]
    says(alice, state(1, "41%"), state(1, "?", "stderr"))
    assert stands() == [("stdout", "41%", 1), ("stderr", "?", 1)]
    # Nobody else says how it stands, and not under another epoch.
    says(mallory, state(1, "alice is bad"))
    says(alice, state(1, "a zombie"), epoch=2)
    assert stands() == [("stdout", "41%", 1), ("stderr", "?", 1)]
    # The finished line takes its place, whichever comes first; the other stream's stays.
    alice.log(run, 1, "100%")
    assert stands() == [("stderr", "?", 1)]
    says(alice, state(2, "next"), state(1, "?", "stderr"))
    alice.log(run, 1, "100%")  # sent again
    assert stands() == [("stdout", "next", 1), ("stderr", "?", 1)]
    # Nothing of it is kept, and with its run it is over.
    assert texts(renter, job) == ["begins", "100%"]
    alice.exit(run, Reason.JOB_FAILED, 1)
    world.settle_down()
    assert stands() == []
    says(alice, state(2, "I never died"))
    assert stands() == []


# -- what a run uses -------------------------------------------------------------------------------


def test_what_a_run_uses_is_shown_while_it_runs() -> None:
    world = World()
    alice = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = alice.the_run
    gpu = DeviceUsage(id=run.lease.device_ids[0], utilization_percent=97, memory_used_bytes=5)

    def reports(**figures: Any) -> None:
        usage = RunUsage(age_ms=900, devices=(gpu,), **figures)
        report = alice.report(run).model_copy(update={"usage": usage})
        alice.tell(Heartbeat(runs=(report,)))

    assert renter.view(job).runs[-1].usage is None
    for memory in (10, 20, 30):  # by a transaction, and in memory
        reports(memory_bytes=memory, peak_memory_bytes=30)
        seen = renter.view(job).runs[-1].usage
        assert seen is not None
        assert (seen.memory_bytes, seen.peak_memory_bytes, seen.cpu_millis) == (memory, 30, None)
        assert seen.devices[0].utilization_percent == 97
        assert seen.measured_ms == world.now_ms - 900
    alice.exit(run, Reason.JOB_FAILED, 1)
    world.settle_down()
    assert renter.view(job).runs[-1].usage is None


def test_for_how_long_saving_holds_a_run_is_shown_with_its_share_of_the_time() -> None:
    world = World()
    alice = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = alice.the_run
    assert renter.view(job).runs[-1].stall is None
    world.pass_ms(60_000)
    for saves in (3, 4):  # by a transaction, and in memory
        said = RunStall(saves=saves, all_stall_ms=600, stall_ms=100, write_ms=4_000)
        report = alice.report(run).model_copy(update={"stall": said})
        alice.tell(Heartbeat(runs=(report,)))
        stall = renter.view(job).runs[-1].stall
        assert stall is not None
        assert (stall.saves, stall.stall_per_save_ms) == (saves, 600 // saves)
        assert (stall.all_stall_ms, stall.last_stall_ms, stall.last_write_ms) == (600, 100, 4_000)
        assert stall.stall_share_ppm == 600 * 1_000_000 // report.cum_device_ms
    alice.exit(run, Reason.JOB_FAILED, 1)
    world.settle_down()
    kept = renter.view(job).runs[-1].stall
    assert kept is not None
    assert (kept.saves, kept.all_stall_ms) == (4, 600)
