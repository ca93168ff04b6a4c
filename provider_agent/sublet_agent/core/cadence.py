"""How often a run is asked for a checkpoint, and the most work that a loss of its machine costs.
Pure. Rules:

1. What the renter has said holds. Where he left it to us (`checkpoint_interval_ms` 0), a run is
   asked early for its first checkpoint: only then is it known what one costs.
2. From then on it is asked as often as makes the time lost to saving and the time lost with
   machines the least together: J. W. Young, "A first order approximation to the optimum checkpoint
   interval", CACM 17(9), 1974: sqrt(2 C M); with the higher order terms of J. T. Daly, "A higher
   order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006, which
   matter where C is not far below M.
3. C, what a checkpoint costs, is how long it held the job's loop, by the job's word, and a small
   part of the time until it is durable: it is read and sent from the machine that also computes.
   Medians of the last few, so that one slow save changes little.
4. M, how long a machine lasts, is what the market has seen; a hint, and bounded as a stranger's.
5. It is never asked sooner than the one before takes to be durable: saves would only pile up. One
   that is under way for longer already counts as such a one.
6. A loss costs what lies between two checkpoints and the time until the newer is durable. What is
   told is the longest of the last few of each, and of the first the interval at the least.
7. All is measured by the run's own time, so that no clock that is set and no machine that holds the
   run still counts.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sublet_agent.core.records import RunRecord, SavesMeasured
from sublet_contracts.documents import (
    AUTO_FIRST_INTERVAL_MS,
    AUTO_LEAST_INTERVAL_MS,
    AUTO_MOST_INTERVAL_MS,
)
from sublet_contracts.encoding import MAX_INTEGER
from sublet_contracts.wire import IntervalRests, RunCadence

KEEP_LAST = 5
UNTOLD_COST_MS = 1_000
"""What a checkpoint is taken to cost whose job doesn't say."""
LEAST_COST_MS = 50
SENDING_PART = 50
"""So small a part of the time until it is durable counts as the job's own."""
STILL_TO_COME_MS = 15_000
"""What one that is still under way is thought to take from now on."""
LOSS_EVERY_MS = 86_400_000
"""Where the market has not said how long a machine lasts: a day."""
LEAST_LOSS_EVERY_MS = 600_000
MOST_LOSS_EVERY_MS = 90 * 86_400_000


@dataclass(frozen=True)
class Interval:
    """How often a run is asked, and what that rests on."""

    ms: int
    rests_on: IntervalRests


def best_interval_ms(cost_ms: int, loss_every_ms: int) -> int:
    """Return the time from one checkpoint to the next that loses the least."""
    ratio = cost_ms / (2 * loss_every_ms)
    if ratio >= 1:  # Daly: nothing is won by saving more often than machines are lost
        return loss_every_ms
    young_ms = math.sqrt(2 * cost_ms * loss_every_ms)
    return max(0, int(young_ms * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_ms))


def cost_ms(measured: SavesMeasured) -> int:
    """Return what a checkpoint costs the run; 0: it has made none that is durable."""
    if not measured.durable_after_ms:
        return 0
    stall_ms = median(measured.stalls_ms) if measured.stalls_ms else UNTOLD_COST_MS
    return max(LEAST_COST_MS, stall_ms + median(measured.durable_after_ms) // SENDING_PART)


def interval(record: RunRecord) -> Interval:
    """Return how often the run is asked for a checkpoint."""
    if record.job.checkpoint_interval_ms:
        return Interval(record.job.checkpoint_interval_ms, "job")
    measured = record.saves
    cost = cost_ms(measured)
    link_ms = median(measured.durable_after_ms)
    under_way_ms = _under_way_ms(record)
    if under_way_ms:
        link_ms = max(link_ms, under_way_ms + STILL_TO_COME_MS)
    best_ms = AUTO_FIRST_INTERVAL_MS
    if cost:
        best_ms = best_interval_ms(cost, _bounded_loss_every_ms(record.loss_every_ms))
    found: Interval = Interval(best_ms, "measured" if cost else "first")
    if found.ms < AUTO_LEAST_INTERVAL_MS:
        found = Interval(AUTO_LEAST_INTERVAL_MS, "least")
    if found.ms < link_ms:
        found = Interval(link_ms, "link")
    if found.ms > AUTO_MOST_INTERVAL_MS:
        found = Interval(AUTO_MOST_INTERVAL_MS, "most")
    return found


def told(record: RunRecord) -> RunCadence | None:
    """Return what the broker is told of it; None: the run has not started."""
    if record.started_ms is None:
        return None
    measured, now = record.saves, interval(record)
    spacing_ms = max(measured.spacings_ms, default=0)
    durable_ms = max(_under_way_ms(record), max(measured.durable_after_ms, default=0))
    return RunCadence(
        interval_ms=now.ms,
        rests_on=now.rests_on,
        cost_ms=min(cost_ms(measured), MAX_INTEGER),
        durable_after_ms=min(durable_ms, MAX_INTEGER),
        most_lost_ms=min(max(now.ms, spacing_ms) + durable_ms, MAX_INTEGER),
        spacing_ms=min(spacing_ms, MAX_INTEGER),
        unanswered_ms=min(_unanswered_ms(record), MAX_INTEGER),
    )


def asked(record: RunRecord) -> None:
    """The run has been asked for a checkpoint."""
    if record.saves.asked_device_ms is None:
        record.saves.asked_device_ms = record.cum_device_ms


def found(record: RunRecord, worth_device_ms: int) -> None:
    """A checkpoint was found that holds what the run had done up to then."""
    measured = record.saves
    before_ms = max(measured.saved_device_ms, record.pull_device_ms)
    measured.asked_device_ms = None
    measured.saved_device_ms = max(before_ms, worth_device_ms)
    _note(measured.spacings_ms, (worth_device_ms - before_ms) // record.devices)


def durable(record: RunRecord, worth_device_ms: int) -> None:
    """A checkpoint of it is durable."""
    _note(record.saves.durable_after_ms, _age_ms(record, worth_device_ms))


def held(record: RunRecord, saves: int, stall_ms: int) -> None:
    """Its job says how long the newest of so many saves has held its loop."""
    measured = record.saves
    if saves != measured.saves_told:
        measured.saves_told = saves
        _note(measured.stalls_ms, stall_ms)


def median(values: Sequence[int]) -> int:
    """Return the middle one; of an even number the larger of the two; 0 of none."""
    return sorted(values)[len(values) // 2] if values else 0


def _under_way_ms(record: RunRecord) -> int:
    """Return how old the oldest checkpoint is by now that is on its way, or not judged yet."""
    ways: Iterable[int] = (
        way.cum_device_ms
        for way in (record.uploading, *record.awaiting_verdict.values())
        if way is not None and way.kind == "checkpoint"
    )
    return max((_age_ms(record, worth) for worth in ways), default=0)


def _age_ms(record: RunRecord, worth_device_ms: int) -> int:
    return max(0, record.cum_device_ms - worth_device_ms) // record.devices


def _unanswered_ms(record: RunRecord) -> int:
    since = record.saves.asked_device_ms
    return 0 if since is None else _age_ms(record, since)


def _bounded_loss_every_ms(told_ms: int) -> int:
    return min(max(told_ms or LOSS_EVERY_MS, LEAST_LOSS_EVERY_MS), MOST_LOSS_EVERY_MS)


def _note(values: list[int], value: int) -> None:
    values.append(min(max(0, value), MAX_INTEGER))
    del values[:-KEEP_LAST]
