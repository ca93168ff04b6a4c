"""The phases of a run on this machine: one table. Rules:

1. A phase changes only by a row of this table, and only forward: what is behind never comes back.
2. A trigger is what happens to the run, whoever reports it. Where a row names the phase itself,
   the run takes it without moving on. Where it is LATE, it answers what an earlier phase asked
   for, or asks for what is over: that is expected, and nothing is done.
3. A pair without a row can't happen. If it does, the mistake is ours: the core leaves the run as
   it is and says so (`effects.Unexpected`), which is a line in the owner's log, and an error in
   tests and in the simulator.
4. Discarded is final: the run is being removed, and nothing is told of it any more.

Time is no trigger. What comes due is one: a deadline kills, and `exited` follows; the end of the
budget asks to stop; a wait for the broker's verdict that is over makes the run handed over.
"""

from collections.abc import Mapping
from enum import StrEnum


class RunPhase(StrEnum):
    """Where a run stands.

    finishing: the container has exited, its last checkpoint and outputs are moved off.
    ended: exited and the final receipt are said; the settlement is awaited.
    discarded: settled, or gone elsewhere: the run is being removed.
    """

    PULLING = "pulling"
    RESTORING = "restoring"
    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    FINISHING = "finishing"
    ENDED = "ended"
    DISCARDED = "discarded"


LIVE = frozenset({RunPhase.STARTING, RunPhase.RUNNING, RunPhase.DRAINING})
"""Phases in which a container may run."""


class Trigger(StrEnum):
    """What can happen to a run."""

    IMAGE_READY = "image ready"
    RESTORED = "restored"
    PREPARATION_FAILED = "preparation failed"
    """Pulling, restoring or starting failed for good."""
    OBSERVED = "observed"
    """The runner has the run: it runs, or has run."""
    EXITED = "exited"
    VANISHED = "vanished"
    """The runner knows nothing of it."""
    CHECKPOINT_FOUND = "checkpoint found"
    PROGRESSED = "progressed"
    DISK_USED = "disk used"
    MEASURED = "measured"
    """What it uses of the machine: only told on."""
    DISK_FULL = "disk full"
    RULES_BROKEN = "rules broken"
    """The job has filled its folders with what nobody can be made to read."""
    FOLDER_SCANNED = "folder scanned"
    """What lies in the folder of a run that has exited is known."""
    UPLOAD_MOVED = "upload moved"
    """Some of what is uploaded has reached the broker."""
    UPLOADED = "uploaded"
    UPLOAD_FAILED = "upload failed"
    VERDICT = "verdict"
    """The broker's word on an upload."""
    HANDED_OVER = "handed over"
    """All that was to come off this machine is at the broker, or was waited for long enough."""
    STOP_ASKED = "stop asked"
    """By the broker, by the owner, or by a limit of the job: to drain, or to stop."""
    LEASE_GONE = "lease gone"
    """The lease is settled, or has gone elsewhere."""
    QUARANTINED = "quarantined"
    """Handling the run brought an unexpected error: it ends here, wherever it stands."""


LATE = None
"""The trigger is expected in this phase, and nothing is done."""


def _stays(phase: RunPhase, *triggers: Trigger) -> dict[Trigger, RunPhase | None]:
    return dict.fromkeys(triggers, phase)


def _late(*triggers: Trigger) -> dict[Trigger, RunPhase | None]:
    return dict.fromkeys(triggers, LATE)


_PREPARED = (Trigger.IMAGE_READY, Trigger.RESTORED, Trigger.PREPARATION_FAILED)
_SEEN = (
    Trigger.OBSERVED,
    Trigger.VANISHED,
    Trigger.CHECKPOINT_FOUND,
    Trigger.PROGRESSED,
    Trigger.DISK_USED,
    Trigger.MEASURED,
    Trigger.DISK_FULL,
    Trigger.RULES_BROKEN,
)
_MOVED = (
    Trigger.CHECKPOINT_FOUND,
    Trigger.UPLOAD_MOVED,
    Trigger.UPLOADED,
    Trigger.UPLOAD_FAILED,
    Trigger.VERDICT,
)
_MEASURED = (
    Trigger.PROGRESSED,
    Trigger.DISK_USED,
    Trigger.MEASURED,
    Trigger.DISK_FULL,
    Trigger.RULES_BROKEN,
)

TABLE: Mapping[RunPhase, Mapping[Trigger, RunPhase | None]] = {
    RunPhase.PULLING: {
        Trigger.IMAGE_READY: RunPhase.RESTORING,
        Trigger.PREPARATION_FAILED: RunPhase.ENDED,
        Trigger.STOP_ASKED: RunPhase.ENDED,
        Trigger.QUARANTINED: RunPhase.ENDED,
        Trigger.LEASE_GONE: RunPhase.DISCARDED,
    },
    RunPhase.RESTORING: {
        Trigger.RESTORED: RunPhase.STARTING,
        Trigger.PREPARATION_FAILED: RunPhase.ENDED,
        Trigger.STOP_ASKED: RunPhase.ENDED,
        Trigger.QUARANTINED: RunPhase.ENDED,
        Trigger.LEASE_GONE: RunPhase.DISCARDED,
    },
    RunPhase.STARTING: {
        Trigger.OBSERVED: RunPhase.RUNNING,
        Trigger.PREPARATION_FAILED: RunPhase.ENDED,
        Trigger.QUARANTINED: RunPhase.ENDED,
        Trigger.LEASE_GONE: RunPhase.DISCARDED,
        # It is kept in mind until the container is there to be asked.
        **_stays(RunPhase.STARTING, Trigger.STOP_ASKED),
        # The machine was started anew meanwhile: its folders were placed once more.
        **_stays(RunPhase.STARTING, Trigger.RESTORED),
        # The agent died before it had started the container: it is started again.
        **_stays(RunPhase.STARTING, Trigger.VANISHED),
        # What an adopted container did while no agent looked is told before its state.
        **_stays(RunPhase.STARTING, *_MOVED, *_MEASURED),
    },
    RunPhase.RUNNING: {
        Trigger.STOP_ASKED: RunPhase.DRAINING,
        Trigger.EXITED: RunPhase.FINISHING,
        Trigger.VANISHED: RunPhase.FINISHING,
        Trigger.QUARANTINED: RunPhase.ENDED,
        Trigger.LEASE_GONE: RunPhase.DISCARDED,
        **_stays(RunPhase.RUNNING, Trigger.OBSERVED, *_MOVED, *_MEASURED),
        # An adopted run is started once more, to be sure: that this fails doesn't matter to it.
        **_late(Trigger.PREPARATION_FAILED),
    },
    RunPhase.DRAINING: {
        Trigger.EXITED: RunPhase.FINISHING,
        Trigger.VANISHED: RunPhase.FINISHING,
        Trigger.QUARANTINED: RunPhase.ENDED,
        Trigger.LEASE_GONE: RunPhase.DISCARDED,
        # A stop only hardens.
        **_stays(RunPhase.DRAINING, Trigger.STOP_ASKED),
        **_stays(RunPhase.DRAINING, Trigger.OBSERVED, *_MOVED, *_MEASURED),
        **_late(Trigger.PREPARATION_FAILED),
    },
    RunPhase.FINISHING: {
        Trigger.HANDED_OVER: RunPhase.ENDED,
        Trigger.QUARANTINED: RunPhase.ENDED,
        Trigger.LEASE_GONE: RunPhase.DISCARDED,
        **_stays(RunPhase.FINISHING, Trigger.FOLDER_SCANNED, Trigger.PROGRESSED, *_MOVED),
        # It has come to its end by itself, on whatever disk it found.
        **_late(Trigger.STOP_ASKED, Trigger.DISK_USED, Trigger.DISK_FULL, Trigger.RULES_BROKEN),
        **_late(Trigger.MEASURED),
        **_late(Trigger.PREPARATION_FAILED, Trigger.OBSERVED, Trigger.VANISHED),
    },
    RunPhase.ENDED: {
        Trigger.LEASE_GONE: RunPhase.DISCARDED,
        # Nobody waits for the verdict on outputs; where it is bad they are sent once more.
        **_stays(RunPhase.ENDED, Trigger.VERDICT, Trigger.UPLOADED, Trigger.UPLOAD_FAILED),
        # Its end was told and stands; its folder is kept, and nothing more is tried with it.
        **_stays(RunPhase.ENDED, Trigger.QUARANTINED),
        **_late(Trigger.STOP_ASKED, Trigger.UPLOAD_MOVED, *_PREPARED, *_SEEN),
    },
    RunPhase.DISCARDED: {
        **_late(Trigger.LEASE_GONE, Trigger.STOP_ASKED, Trigger.QUARANTINED, *_PREPARED, *_SEEN),
        **_late(
            Trigger.FOLDER_SCANNED, Trigger.UPLOAD_MOVED, Trigger.UPLOADED, Trigger.UPLOAD_FAILED
        ),
        # It is noted, and the job may hear of it while it is still there; no message comes of it.
        **_stays(RunPhase.DISCARDED, Trigger.VERDICT),
    },
}


class UnexpectedTrigger(ValueError):
    """A pair that no row of the table has."""


def next_phase(phase: RunPhase, trigger: Trigger) -> RunPhase | None:
    """Return the phase that follows; LATE: nothing is to be done. Raises UnexpectedTrigger."""
    try:
        return TABLE[phase][trigger]
    except KeyError:
        raise UnexpectedTrigger(f"{trigger} does not happen to a run that is {phase}") from None


def is_final(phase: RunPhase) -> bool:
    """Say whether no phase follows this one."""
    return all(after in (phase, LATE) for after in TABLE[phase].values())


def to_mermaid() -> str:
    """Return the changes of phase as a Mermaid state diagram: the README's is drawn from here."""
    lines = ["stateDiagram-v2", f"    [*] --> {RunPhase.PULLING}: lease signed"]
    for phase, row in TABLE.items():
        ways: dict[RunPhase, list[Trigger]] = {}
        for trigger, after in row.items():
            if after is not LATE and after is not phase:
                ways.setdefault(after, []).append(trigger)
        lines += [f"    {phase} --> {after}: {', '.join(why)}" for after, why in ways.items()]
        if is_final(phase):
            lines.append(f"    {phase} --> [*]")
    return "\n".join(lines)


if __name__ == "__main__":
    print(to_mermaid())
