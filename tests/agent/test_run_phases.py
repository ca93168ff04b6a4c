"""The table of a run's phases: every pair of it through the real core, and the README's diagram."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest

from sublet_agent.adapters.session.journal import Journal
from sublet_agent.adapters.shell import UNEXPECTED, Shell
from sublet_agent.core import effects, events
from sublet_agent.core.exit_reasons import ExitEvidence
from sublet_agent.core.run import WIRE_STATES
from sublet_agent.core.run_phases import (
    LATE,
    LIVE,
    TABLE,
    RunPhase,
    Trigger,
    UnexpectedTrigger,
    is_final,
    next_phase,
    to_mermaid,
)
from sublet_agent.core.runner_port import Measure
from sublet_agent.core.uploads import Moved
from sublet_contracts import states
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import CheckpointVerdict, Order
from tests.agent.test_core import NOW, World, wanted
from tests.contracts.samples import INDEX

README = Path(__file__).parents[2] / "provider_agent" / "README.md"
ORDER = list(RunPhase)
FROM_WITHIN = {Trigger.EXITED, Trigger.HANDED_OVER}
"""What the core concludes by itself: it can't be posted."""
ASKS_TO_STOP = {Trigger.DISK_FULL, Trigger.RULES_BROKEN}
"""What is taken and then asks to stop, within one event."""


def a_run_in(phase: RunPhase, world: World) -> str:
    """Bring a run that has outputs to save into this phase; return its lease."""
    lease_id, _ = world.assign(world.job(outputs="/out"))
    stop = Order(lease=lease_id, epoch=1, desired="drain", reason=Reason.RECLAIMED, grace_ms=9_000)
    failed = events.PreparationFailed(lease_id, Reason.START_FAILED, "no")
    path: dict[RunPhase, tuple[events.Event, ...]] = {
        RunPhase.PULLING: (),
        RunPhase.RESTORING: (events.ImageReady(lease_id),),
        RunPhase.STARTING: (events.ImageReady(lease_id), events.Restored(lease_id)),
        RunPhase.ENDED: (failed,),
        RunPhase.DISCARDED: (events.UploadFailed(lease_id, "checkpoint", 0, "gone", stale=True),),
    }
    path[RunPhase.RUNNING] = (*path[RunPhase.STARTING], observed(lease_id))
    path[RunPhase.DRAINING] = (*path[RunPhase.RUNNING], events.MessageArrived(stop))
    path[RunPhase.FINISHING] = (*path[RunPhase.RUNNING], observed(lease_id, exit_code=0))
    for event in path[phase]:
        world.do(event)
    assert world.core.saved.runs[lease_id].phase is phase
    return lease_id


def observed(lease_id: str, exit_code: int | None = None) -> events.Observed:
    end = None if exit_code is None else ExitEvidence(exit_code)
    return events.Observed(lease_id, running=end is None, started_ms=NOW, ran_ms=1_000, end=end)


def event_of(trigger: Trigger, lease_id: str) -> events.Event:
    """Return what the outside reports, or asks for."""
    verdict = CheckpointVerdict(
        lease=lease_id, epoch=1, checkpoint="c" * 64, kind="checkpoint", step=5, durable=True
    )
    stop = Order(lease=lease_id, epoch=1, desired="stop", reason=Reason.CANCELLED, grace_ms=9_000)
    reports: dict[Trigger, events.Event] = {
        Trigger.IMAGE_READY: events.ImageReady(lease_id),
        Trigger.RESTORED: events.Restored(lease_id),
        Trigger.PREPARATION_FAILED: events.PreparationFailed(lease_id, Reason.START_FAILED, "no"),
        Trigger.OBSERVED: observed(lease_id),
        Trigger.VANISHED: events.Vanished(lease_id),
        Trigger.CHECKPOINT_FOUND: events.CheckpointFound(lease_id, 5),
        Trigger.PROGRESSED: events.Progressed(lease_id, 5, 10),
        Trigger.DISK_USED: events.DiskUsed(lease_id, 1),
        Trigger.MEASURED: events.Measured(lease_id, Measure(NOW, memory_bytes=1)),
        Trigger.DISK_FULL: events.DiskFull(lease_id, "0 bytes are free"),
        Trigger.RULES_BROKEN: events.RulesBroken(lease_id, Reason.CHECKPOINT_INVALID, "too many"),
        Trigger.QUARANTINED: events.Quarantined(lease_id, "ValueError: odd"),
        Trigger.FOLDER_SCANNED: events.FolderScanned(lease_id, ()),
        Trigger.UPLOAD_MOVED: events.UploadMoved(lease_id, "checkpoint", 5, Moved(10, 5, 5)),
        Trigger.UPLOADED: events.Uploaded(lease_id, "checkpoint", 5, INDEX, 10),
        Trigger.UPLOAD_FAILED: events.UploadFailed(lease_id, "checkpoint", 5, "torn"),
        Trigger.VERDICT: events.MessageArrived(verdict),
        Trigger.STOP_ASKED: events.MessageArrived(stop),
        Trigger.LEASE_GONE: events.UploadFailed(lease_id, "checkpoint", 5, "gone", stale=True),
    }
    return reports[trigger]


PAIRS = [pair for pair in product(RunPhase, Trigger) if pair[1] not in FROM_WITHIN]


@pytest.mark.parametrize(("phase", "trigger"), PAIRS)
def test_the_core_does_what_the_table_says(phase: RunPhase, trigger: Trigger) -> None:
    world = World()
    lease_id = a_run_in(phase, world)
    before = world.core.saved.runs[lease_id].model_dump_json()
    step = world.core.handle(event_of(trigger, lease_id), world.now)
    record = world.core.saved.runs[lease_id]
    if trigger not in TABLE[phase]:
        [unexpected] = step.effects
        assert isinstance(unexpected, effects.Unexpected)
        assert unexpected.lease_id == lease_id
        assert trigger in unexpected.text
        assert phase in unexpected.text
        assert step.save.empty
        assert record.model_dump_json() == before
        return
    # A quarantine is told, whatever brought it about: also that of a run which had just ended.
    told = trigger is Trigger.QUARANTINED and phase is not RunPhase.DISCARDED
    assert len(wanted(step, effects.Unexpected)) == told
    after = next_phase(phase, trigger)
    if after is LATE:
        assert step.empty
        assert record.model_dump_json() == before
        return
    if trigger in ASKS_TO_STOP:
        after = next_phase(after, Trigger.STOP_ASKED)
    assert record.phase is after


@pytest.mark.parametrize("phase", sorted(LIVE))
def test_an_exit_is_finishing_and_then_handed_over(phase: RunPhase) -> None:
    """Also where the container's exit is the first that is seen of it."""
    world = World()
    lease_id = a_run_in(phase, world)
    world.do(observed(lease_id, exit_code=1))
    assert world.core.saved.runs[lease_id].phase is RunPhase.FINISHING
    world.do(events.FolderScanned(lease_id, ()))
    world.do(events.UploadFailed(lease_id, "partial-outputs", 0, "", nothing=True))
    assert world.core.saved.runs[lease_id].phase is RunPhase.ENDED


@pytest.mark.parametrize("trigger", sorted(FROM_WITHIN))
def test_what_the_core_concludes_has_no_row_elsewhere(trigger: Trigger) -> None:
    rows = {phase: row[trigger] for phase, row in TABLE.items() if trigger in row}
    assert rows == (
        dict.fromkeys((RunPhase.RUNNING, RunPhase.DRAINING), RunPhase.FINISHING)
        if trigger is Trigger.EXITED
        else {RunPhase.FINISHING: RunPhase.ENDED}
    )
    for phase in TABLE.keys() - rows.keys():
        with pytest.raises(UnexpectedTrigger, match=trigger):
            next_phase(phase, trigger)


def test_every_phase_is_reached_and_every_trigger_has_a_row() -> None:
    assert list(TABLE) == ORDER
    reached, waiting = {RunPhase.PULLING}, [RunPhase.PULLING]
    while waiting:
        found = {after for after in TABLE[waiting.pop()].values() if after is not LATE} - reached
        reached |= found
        waiting += found
    assert reached == set(RunPhase)
    assert {trigger for row in TABLE.values() for trigger in row} == set(Trigger)


def test_phases_only_go_forward_and_the_last_is_final() -> None:
    for phase, row in TABLE.items():
        for after in row.values():
            assert after is LATE or ORDER.index(after) >= ORDER.index(phase)
    assert [phase for phase in RunPhase if is_final(phase)] == [RunPhase.DISCARDED]


def test_the_broker_takes_every_change_that_it_is_told_of() -> None:
    """What a phase is called on the wire goes through the broker's own table, run by run."""
    for phase, row in TABLE.items():
        for after in {*row.values()} - {LATE, phase, RunPhase.DISCARDED}:
            assert after is not LATE
            before, told = WIRE_STATES[phase], WIRE_STATES[after]
            assert before == told or states.step(
                states.RUN, states.RunState(before), states.RunState(told)
            )


def test_an_unexpected_event_is_a_line_in_the_owners_log(tmp_path: Path) -> None:
    """In production the agent goes on, and so does the run."""
    said: list[str] = []
    world = World()
    lease_id = a_run_in(RunPhase.PULLING, world)
    journal = Journal(tmp_path / "state")
    unused = cast(Any, None)
    shell = Shell(
        state=tmp_path / "state",
        core=world.core,
        journal=journal,
        spool=unused,
        runner=unused,
        transfer=unused,
        helper=tmp_path,
        now_ms=lambda: NOW,
        say=said.append,
    )
    shell.post(events.Restored(lease_id))
    [line] = said
    assert line.startswith(UNEXPECTED)
    assert UNEXPECTED in README.read_text()
    assert "restored does not happen to a run that is pulling" in line
    assert shell.failed is None
    assert world.core.saved.runs[lease_id].phase is RunPhase.PULLING
    shell.close()
    journal.close()


def test_the_diagram_in_the_readme_is_drawn_from_the_table() -> None:
    assert f"```mermaid\n{to_mermaid()}\n```" in README.read_text(), (
        "provider_agent/README.md: replace the diagram by what this prints: "
        "python -m sublet_agent.core.run_phases"
    )
