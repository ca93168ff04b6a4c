"""Partial outputs: what a run had written that ended otherwise than by finishing, brought back.

Rules:
1. Whatever the end, its folder is handed over before the end is told: who learns of the end finds
   what there is, and the broker takes it from the job's holder alone, as all else. No machine
   without the epoch writes anything.
2. Checkpoints go first: they are paid progress, these are not.
3. It is bounded, because the devices are kept and nobody pays for that: by the job's own grace,
   10 s at the least. Where the job goes on elsewhere its successor waits: 10 s are the most.
4. Whoever was asked to stop by a deadline has until then, or 10 s from its exit where that is more:
   so a run that was killed at its deadline gives something back, and no order counts as disobeyed
   (the broker waits 30 s more).
5. What is there by then is handed over, the rest is listed as left out. What is under way
   GIVE_UP_MS later is given up.
6. A run that is lost, quarantined or gone to another machine hands over nothing.
"""

from sublet_agent.core.records import RunRecord
from sublet_contracts.reasons import MEANINGS, Next

LEAST_MS = 10_000
GIVE_UP_MS = 5_000


def until_ms(record: RunRecord) -> int:
    """Return until when (the agent's clock) partial outputs of a run that has exited may go off."""
    assert record.reason is not None
    grace_ms = max(LEAST_MS, record.job.stop_grace_ms)
    if MEANINGS[record.reason].next is Next.RETRY:
        grace_ms = LEAST_MS
    until = record.exited_ms + grace_ms
    if record.stop is not None:
        until = min(until, max(record.stop.deadline_ms, record.exited_ms + LEAST_MS))
    return until
