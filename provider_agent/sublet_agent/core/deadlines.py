"""When a run must be gone if nobody looks after it any more: no container outlives its lease or its
budget. Pure.

While the agent lives it renews each run's deadline; the watchdog, another process, ends the run
whose deadline passes. Two ends are near, and the nearer one counts:

1. Silence. After the job's patience without a heartbeat the broker takes the machine for lost and
   gives the job away. An agent that comes back within that time takes the run up and renews; a
   little longer than patience is left for that.
2. The budget. The lease's hold pays for so much time, then for the time that the job may take to
   stop; beyond that nothing is paid by anybody.
"""

from dataclasses import dataclass
from typing import Literal

from sublet_agent.core import metering
from sublet_agent.core.records import RunRecord

RENEW_EVERY_MS = 2_000
MARGIN_MS = 10_000

Over = Literal["silence", "budget"]
"""what a deadline is the end of"""


@dataclass(frozen=True)
class Deadline:
    """In how many ms from now, and what is over then."""

    in_ms: int
    over: Over


def deadline_of(record: RunRecord) -> Deadline:
    """Return when a run is to be ended unless its deadline is renewed."""
    silence_ms = record.job.patience_ms + MARGIN_MS
    paid_ms = metering.wall_ms_left(record)
    if paid_ms is not None and paid_ms + record.job.stop_grace_ms < silence_ms:
        return Deadline(paid_ms + record.job.stop_grace_ms, "budget")
    return Deadline(silence_ms, "silence")


def deadline_text(over: Over) -> str:
    """Return what is said of a run that the watchdog ended."""
    if over == "budget":
        return "killed by the watchdog: the lease's hold and the time to stop were used up"
    return "killed by the watchdog: the agent had not been there for too long"
