"""Warnings: what a running job's renter is told before it hurts, and when a job has stalled.

Rules:
- One table: each code has one rule, which says when it begins and when it is over. In between it
  stands. The words are in sublet_contracts/job_warnings.py.
- A warning begins only while the run runs and nobody has asked it to stop; whatever began is over
  with its run at the latest.
- What is not known begins nothing and ends nothing: after a restart of the broker a warning goes
  on, without being told again, until there is a sign that it is over.
- A job stalls when for its own `stall_ms` there was no sign of life (signs_of_life.py). A job that
  names no such time never stalls.
- What a warning says is at risk is the run's device time since its newest durable checkpoint, at
  the lease's price. Where the machine is at fault that costs nothing; the time is lost all the
  same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sublet_broker.market.facts import LeaseFact, RunFact
from sublet_broker.market.signs_of_life import Signs, judged_by_steps, still_ms
from sublet_contracts.documents import (
    AUTO_FIRST_INTERVAL_MS,
    AUTO_LEAST_INTERVAL_MS,
    AUTO_MOST_INTERVAL_MS,
    Job,
)
from sublet_contracts.job_warnings import WarningCode
from sublet_contracts.rules import charge_ucr
from sublet_contracts.states import Desired, RunState

SAVING_MS = 30_000
"""What the first checkpoint may take from being asked for to being durable."""
MOST_TOLD_MS = 7 * 86_400_000
"""No more than that is believed of what an agent says a loss would cost."""
STALE_MS = 300_000
STALE_INTERVALS = 3
UNANSWERED_INTERVALS_X2 = 3
"""For one and a half intervals a checkpoint may be waited for, so that its renter is told within
two. A job that saves at times of its own may take as long as it took before."""
UNREAD_MS = 60_000
UNREAD_AND_NO_WORK_MS = 900_000
"""So long a script may import, load its model and compile before it opens its checkpoint."""
BEHIND_MS = 30_000
STILL_MS = 600_000
STILL_STEPS = 3
"""A step may take so many times as long as the longest one before."""
IDLE_MS = 600_000


@dataclass(frozen=True)
class Watched:
    """A run with all that its warnings rest on."""

    run: RunFact
    lease: LeaseFact
    job: Job
    signs: Signs | None
    """None: nothing is known of it yet, since the broker started."""
    now_ms: int

    @property
    def ran_ms(self) -> int:
        """How long it has run, by the broker's clock."""
        return 0 if self.run.running_ms is None else self.now_ms - self.run.running_ms

    @property
    def still_ms(self) -> int:
        """For how long there has been no sign of life."""
        return 0 if self.signs is None else still_ms(self.signs, len(self.lease.device_ids))

    @property
    def resumable(self) -> bool:
        """Whether a loss would not set it back to the start."""
        return self.run.durable_ms is not None or self.lease.start_checkpoint is not None


@dataclass(frozen=True)
class _Rule:
    begins: Callable[[Watched], bool]
    is_over: Callable[[Watched, int], bool]
    """By the time when it began."""
    facts: Callable[[Watched], dict[str, int]]


def unsaved(run: RunFact, lease: LeaseFact, now_ms: int) -> tuple[int, int]:
    """Return the run's device time since its newest durable checkpoint, and what that costs (ucr)
    as long as the machine isn't at fault. Never more than has passed by the broker's clock."""
    ran_ms = 0 if run.running_ms is None else max(0, now_ms - run.running_ms)
    used_ms = min(run.cum_device_ms, ran_ms * len(lease.device_ids))
    durable_ms = min(run.durable_device_ms, used_ms)
    price = lease.price_ucr_per_device_hour
    charged_ucr = min(charge_ucr(price, used_ms), lease.hold_ucr)
    return used_ms - durable_ms, max(0, charged_ucr - charge_ucr(price, durable_ms))


def most_lost(w: Watched) -> tuple[int, int]:
    """Return the most work that a loss of the machine costs the run, in time, and in ucr as long as
    the machine isn't at fault: by what its agent has measured, and never less than is lost now."""
    devices = max(1, len(w.lease.device_ids))
    device_ms, ucr = unsaved(w.run, w.lease, w.now_ms)
    cadence = w.signs.cadence if w.signs else None
    told_ms = min(cadence.most_lost_ms, MOST_TOLD_MS) if cadence else 0
    charged_ucr = charge_ucr(w.lease.price_ucr_per_device_hour, told_ms * devices)
    return max(told_ms, device_ms // devices), max(min(charged_ucr, w.lease.hold_ucr), ucr)


def _interval_ms(w: Watched) -> int:
    """Return how often the job is asked for a checkpoint."""
    if w.job.checkpoint_interval_ms:
        return w.job.checkpoint_interval_ms
    cadence = w.signs.cadence if w.signs else None
    if cadence is None:
        return AUTO_FIRST_INTERVAL_MS
    return min(max(cadence.interval_ms, AUTO_LEAST_INTERVAL_MS), AUTO_MOST_INTERVAL_MS)


def _unanswered_ms(w: Watched) -> int:
    """Return for how long a checkpoint has been asked for and none came. One may be durable before
    the agent's next word says that it was found: time counts from there at the soonest."""
    if w.signs is None or w.signs.cadence is None:
        return 0
    since_ms = max(w.run.running_ms or w.now_ms, w.run.durable_ms or 0)
    return max(0, min(w.signs.cadence.unanswered_ms, w.signs.heard.ms - since_ms))


def _unanswered(w: Watched) -> bool:
    if not w.resumable or w.signs is None or w.signs.cadence is None:
        return False  # where nothing was saved yet, that is what is told
    usual_ms = max(_interval_ms(w), w.signs.cadence.spacing_ms)
    return _unanswered_ms(w) >= max(SAVING_MS, UNANSWERED_INTERVALS_X2 * usual_ms // 2)


def _at_risk(w: Watched) -> dict[str, int]:
    device_ms, ucr = unsaved(w.run, w.lease, w.now_ms)
    return {"at_risk_ms": device_ms // max(1, len(w.lease.device_ids)), "at_risk_ucr": ucr}


def _durable_step(w: Watched) -> int:
    return w.lease.start_step if w.run.durable_ms is None else w.run.durable_step


def _has_worked(w: Watched) -> bool:
    """Whether the run has told another step than it began with, or made something durable: only
    then a script that has not opened what it was restored from goes on without it."""
    if w.run.durable_ms is not None:
        return True
    return w.signs is not None and (
        w.signs.step != w.lease.start_step or w.signs.moved.ms > w.signs.first_ms
    )


def _saves_stopped(w: Watched) -> bool:
    if not w.resumable or w.run.running_ms is None:
        return False
    last_ms = max(w.run.running_ms, w.run.durable_ms or 0)
    late = w.now_ms - last_ms >= max(STALE_MS, STALE_INTERVALS * _interval_ms(w))
    goes_on = w.signs is not None and (not w.signs.tells_steps or w.signs.moved.ms > last_ms)
    return late and goes_on


def _stands_still(w: Watched) -> bool:
    if w.signs is None or not judged_by_steps(w.signs):
        return False
    most_ms = max(STILL_MS, STILL_STEPS * w.signs.longest_step_ms)
    if w.job.stall_ms:
        most_ms = min(most_ms, w.job.stall_ms // 2)
    return w.still_ms >= most_ms


def _silent(w: Watched) -> bool:
    if w.signs is None or judged_by_steps(w.signs) or not w.job.stall_ms:
        return False
    return w.still_ms >= w.job.stall_ms // 2


def _idle_ms(w: Watched) -> int:
    since_ms = w.signs.idle_since_ms if w.signs else None
    return 0 if since_ms is None or w.signs is None else w.signs.heard.ms - since_ms


def _since(mark_ms: int, w: Watched, since_ms: int) -> bool:
    """Whether there was a sign since then: the first report is none, it only begins the count."""
    return w.signs is not None and mark_ms > max(since_ms, w.signs.first_ms)


def _step(w: Watched) -> int:
    return w.run.step if w.signs is None else w.signs.step


_RULES: Mapping[WarningCode, _Rule] = {
    WarningCode.NOTHING_SAVED: _Rule(
        lambda w: not w.resumable and w.ran_ms >= _interval_ms(w) + SAVING_MS,
        lambda w, since_ms: w.resumable,
        _at_risk,
    ),
    WarningCode.SAVES_STOPPED: _Rule(
        _saves_stopped,
        lambda w, since_ms: (w.run.durable_ms or 0) > since_ms,
        lambda w: {"durable_step": _durable_step(w), **_at_risk(w)},
    ),
    WarningCode.SAVE_UNANSWERED: _Rule(
        _unanswered,
        lambda w, since_ms: (
            w.signs is not None
            and w.signs.cadence is not None
            and w.signs.cadence.unanswered_ms == 0
        ),
        lambda w: {"unanswered_ms": _unanswered_ms(w), **_at_risk(w)},
    ),
    WarningCode.CHECKPOINT_UNREAD: _Rule(
        lambda w: (
            w.lease.start_checkpoint is not None
            and w.ran_ms >= (UNREAD_MS if _has_worked(w) else UNREAD_AND_NO_WORK_MS)
            and w.signs is not None
            and w.signs.opened is False
        ),
        lambda w, since_ms: w.signs is not None and w.signs.opened is True,
        lambda w: {"start_step": w.lease.start_step},
    ),
    WarningCode.BEGAN_AGAIN: _Rule(
        lambda w: (
            w.signs is not None
            and not w.signs.was_behind
            and w.signs.behind_since_ms is not None
            and w.signs.heard.ms - w.signs.behind_since_ms >= BEHIND_MS
        ),
        lambda w, since_ms: w.signs is not None and w.signs.was_behind,
        lambda w: {"start_step": w.lease.start_step, "step": _step(w)},
    ),
    WarningCode.STANDS_STILL: _Rule(
        _stands_still,
        lambda w, since_ms: w.signs is not None and _since(w.signs.moved.ms, w, since_ms),
        lambda w: {"step": _step(w), "still_ms": w.still_ms, "stall_ms": w.job.stall_ms},
    ),
    WarningCode.SILENT: _Rule(
        _silent,
        lambda w, since_ms: w.signs is not None and _since(w.signs.alive.ms, w, since_ms),
        lambda w: {"still_ms": w.still_ms, "stall_ms": w.job.stall_ms},
    ),
    WarningCode.DEVICES_IDLE: _Rule(
        lambda w: _idle_ms(w) >= IDLE_MS,
        lambda w, since_ms: w.signs is not None and w.signs.idle is False,
        lambda w: {"idle_ms": _idle_ms(w)},
    ),
}


def warnings_now(w: Watched) -> dict[str, int]:
    """Return the warnings that stand now, and since when: those of the run, less what is over, and
    what has begun."""
    kept = {
        code: since_ms
        for code, since_ms in w.run.warnings.items()
        if code in _RULES and not _RULES[WarningCode(code)].is_over(w, since_ms)
    }
    if w.run.state is not RunState.RUNNING or w.run.desired is not Desired.RUN:
        return kept
    begun = {str(code): w.now_ms for code, rule in _RULES.items() if rule.begins(w)}
    return {**begun, **kept}


def facts_of(code: str, w: Watched) -> dict[str, int]:
    """Return what a warning rests on at this moment."""
    return _RULES[WarningCode(code)].facts(w)


def about(code: str, w: Watched) -> str:
    """Return what a warning is about, as the job sees it; '' where that isn't known."""
    return w.signs.saved_file if w.signs and code == WarningCode.NOTHING_SAVED else ""


def stalled(w: Watched) -> bool:
    """Say whether the job has shown no sign of life for as long as it is to be waited for."""
    return (
        w.job.stall_ms > 0
        and w.run.state is RunState.RUNNING
        and w.run.desired is Desired.RUN
        and w.still_ms >= w.job.stall_ms
    )
