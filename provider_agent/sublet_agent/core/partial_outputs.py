"""What a run has written is brought back, however it ended: for how long, and which of its files.

What did not finish is called partial outputs. Rules:
1. Whatever the end, its folder is handed over before the end is told: who learns of the end finds
   what there is, and the broker takes it from the job's holder alone, as all else. No machine
   without the epoch writes anything.
2. Checkpoints go first: they are paid progress, these are not.
3. It is bounded, because the devices are kept and nobody pays for that: by the job's own grace,
   10 s at the least. Where the job goes on elsewhere its successor waits: 10 s are the most. Only
   the outputs of a run that finished, which its job has named, take as long as it takes.
4. Whoever was asked to stop by a deadline has until then, or 10 s from its exit where that is more:
   so a run that was killed at its deadline gives something back, and no order counts as disobeyed
   (the broker waits 30 s more).
5. What is there by then is handed over, the rest is listed as left out. What is under way
   GIVE_UP_MS later is given up.
6. A run that is lost, quarantined or gone to another machine hands over nothing.
7. Where the job named no folder, its outputs are what it has written in its working folder since it
   was started, and what it had written in runs before and saved with its --checkpoint folders:
   FOUND_OUTPUTS_BYTES of it, not what the image or the agent had put there, no caches.
   That nothing is there, or that it can't be brought back, changes nothing about how the run ended.
"""

from sublet_agent.core.layout import RunFolders
from sublet_agent.core.records import RunRecord
from sublet_contracts.reasons import MEANINGS, Next

LEAST_MS = 10_000
GIVE_UP_MS = 5_000
FOUND_OUTPUTS_BYTES = 2**30
CLOCK_STEP_MS = 10
"""by so much a file's time may be behind the clock when it is written"""
CACHES = frozenset({"__pycache__", ".ipynb_checkpoints"})
HOME_CACHES = frozenset({".cache", ".config", ".local", ".npm", ".nv", ".triton", ".keras"})
"""what programs leave in HOME, where the working folder is that"""


def until_ms(record: RunRecord) -> int:
    """Return until when (the agent's clock) what a run has written that has exited may go off."""
    assert record.reason is not None
    grace_ms = max(LEAST_MS, record.job.stop_grace_ms)
    if MEANINGS[record.reason].next is Next.RETRY:
        grace_ms = LEAST_MS
    until = record.exited_ms + grace_ms
    if record.stop is not None:
        until = min(until, max(record.stop.deadline_ms, record.exited_ms + LEAST_MS))
    return until


class FoundOutputs:
    """Which files of its working folder are the outputs of a job that named no folder."""

    def __init__(
        self, started_ms: int, folders: RunFolders, written_before: frozenset[str] = frozenset()
    ) -> None:
        self._written_before = written_before
        self._since_ms = started_ms - CLOCK_STEP_MS
        work, home = folders.layout.work_path, folders.layout.home_path
        self._is_home = home == work

    def wants(self, path: str, changed_ms: int) -> bool:
        """Say of a file, by its path in the folder and when it was last changed (ctime, which a job
        can't set), whether it is one."""
        above = path.split("/")[:-1]
        if CACHES.intersection(above) or (self._is_home and HOME_CACHES.intersection(above[:1])):
            return False
        return changed_ms >= self._since_ms or path in self._written_before
