"""How long a drain lasts, and what it waits for meanwhile. Pure. Rules:

1. The agent ends when no run is left: all is handed over and settled.
2. It waits as long as something moves: a run that has its grace, or an upload while the broker is
   there. Once nothing has moved for WAIT_MS it ends all the same: the broker is away, or doesn't
   settle, or the engine lets nothing go. What is finished stays on the disk, and is handed over
   when the agent is started again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sublet_agent.core.records import RunRecord
from sublet_agent.core.run_phases import LIVE, RunPhase
from sublet_contracts.keys import short

WAIT_MS = 60_000


@dataclass
class Drain:
    """The wait of an agent that is to end."""

    moved_ms: int
    """when something moved last"""
    told: tuple[str, ...] = ()

    def is_over(self, runs: Iterable[RunRecord], *, live: bool, now_ms: int) -> bool:
        """Say whether the agent may end."""
        records = list(runs)
        if any(_moves(record, live=live, now_ms=now_ms) for record in records):
            self.moved_ms = now_ms
        return not records or self.left_ms(now_ms) == 0

    def left_ms(self, now_ms: int) -> int:
        """Return how long it waits at most, should nothing move any more."""
        return min(WAIT_MS, max(0, self.moved_ms + WAIT_MS - now_ms))


def _moves(record: RunRecord, *, live: bool, now_ms: int) -> bool:
    if record.phase in LIVE:
        return record.stop is None or now_ms < record.stop.deadline_ms
    return live and record.phase is RunPhase.FINISHING


def waits_for(runs: Iterable[RunRecord], *, live: bool) -> tuple[str, ...]:
    """Return what a drain waits for, a line each."""
    found = [_line(record) for record in runs]
    if found and not live:
        found.append(
            "the broker, which is away: what is finished stays on this disk, and the agent ends "
            f"when nothing has moved for {WAIT_MS // 1000} s"
        )
    return tuple(found)


def _line(record: RunRecord) -> str:
    what = f"job {short(record.job_id)}"
    match record.phase:
        case RunPhase.FINISHING if record.uploading and record.uploading.kind == "checkpoint":
            return f"{what}: its checkpoint of step {record.uploading.step} goes off"
        case RunPhase.FINISHING if record.uploading:
            return f"{what}: its outputs go off"
        case RunPhase.FINISHING:
            return f"{what}: what it has made is handed over"
        case RunPhase.ENDED:
            return f"{what}: its settlement"
        case RunPhase.DISCARDED:
            return f"{what}: its folder and container are removed"
        case _ if record.stop and record.stop.killed:
            return f"{what}: it is being killed"
        case _:
            return f"{what}: it saves and stops"
