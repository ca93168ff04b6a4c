"""Running: what the agent reports, what the broker wants, and what silence means.

Rules:
- Observed states are the agent's to write, while it holds the epoch. A report that would go back
  (an old heartbeat that overtook a newer message) proves that the agent lives and says no more.
- A run is heard from when a heartbeat or a message names it. An agent that lives but no longer
  names a run has lost it: to its job that is the same silence.
- Silent for a while: unknown, and its successor is prepared; silent for the job's patience: lost.
  Unknown comes back as if nothing had been; lost is final.
- What the broker wants only hardens: run, drain, stop. A drain that outlives its grace becomes a
  stop; a stop that isn't obeyed in time makes the run count as lost.
- An agent may not end a run for a reason that is the broker's or the renter's to give, unless that
  was ordered. At the budget's edge it may, by the time it has reported: there it stops by itself
  when it can't hear the broker.
- The drain at the budget's edge begins early enough for the job to save its state: its own grace
  and a margin before the hold is used up, but never in the first half of a lease.
- Log lines are taken from the holder of the epoch, and for a while from a run that ended by itself;
  from one that was given up, never.
"""

from dataclasses import replace

from sublet_broker.market.facts import JobFact, LeaseFact, RunFact
from sublet_contracts.reasons import Reason
from sublet_contracts.rules import device_ms_within
from sublet_contracts.states import DESIRED, RUN, Desired, RunState, is_terminal, step

_ORDER = (
    RunState.ASSIGNED,
    RunState.PULLING,
    RunState.RESTORING,
    RunState.RUNNING,
    RunState.DRAINING,
    RunState.EXITED,
)

PREPARING = frozenset({RunState.ASSIGNED, RunState.PULLING, RunState.RESTORING})
"""The command has not begun."""
_ONLY_ORDERED = frozenset(
    {Reason.CANCELLED, Reason.PAUSED_BY_RENTER, Reason.BUDGET_EXHAUSTED, Reason.STALLED}
)
_NEVER_THE_AGENTS = frozenset(
    {
        Reason.JOB_EXPIRED,
        Reason.IMAGE_UNAVAILABLE,
        Reason.KILLED_TOO_OFTEN,
        Reason.NO_PROGRESS,
        Reason.PROVIDER_LOST,
        Reason.LEASE_UNANSWERED,
        Reason.EVIDENCE_OF_FRAUD,
    }
)


def is_over(run: RunFact) -> bool:
    """Say whether the run has ended, by its agent's word or by silence."""
    return is_terminal(RUN, run.state)


def heard(run: RunFact, state: RunState, now_ms: int) -> RunFact:
    """Return the run after its agent reported `state` (not exited; see `exited`)."""
    if is_over(run):
        return run
    before = run.known_state if run.state is RunState.UNKNOWN else run.state
    after = max(before, state, key=_ORDER.index)
    moved = after if after is run.state else step(RUN, run.state, after)
    running = after in (RunState.RUNNING, RunState.DRAINING) and state is RunState.RUNNING
    return replace(
        run,
        state=moved,
        known_state=after,
        last_seen_ms=max(now_ms, run.last_seen_ms),
        successor="",
        running_ms=now_ms if running and run.running_ms is None else run.running_ms,
    )


def exited(
    run: RunFact,
    reason: Reason,
    exit_code: int | None,
    detail: str,
    now_ms: int,
    *,
    at_edge: bool = False,
) -> RunFact:
    """Return the run after its agent reported that it ended. `at_edge`: its budget's."""
    if is_over(run):
        return run
    judged = judge_exit(run, reason, at_edge=at_edge)
    return replace(
        run,
        state=step(RUN, run.state, RunState.EXITED),
        known_state=RunState.EXITED,
        reason=judged,
        exit_code=exit_code,
        detail=detail if judged is reason else f"the agent said {reason}, which nobody ordered",
        last_seen_ms=max(now_ms, run.last_seen_ms),
        ended_ms=now_ms,
        successor="",
    )


def judge_exit(run: RunFact, reason: Reason, *, at_edge: bool) -> Reason:
    """Return the reason that counts when the agent says `reason`."""
    if reason in _NEVER_THE_AGENTS:
        return Reason.RUN_KILLED
    if reason is Reason.BUDGET_EXHAUSTED and at_edge:
        return reason
    if reason in _ONLY_ORDERED and run.order_reason is not reason:
        return Reason.RUN_KILLED
    return reason


def fell_silent(run: RunFact, now_ms: int) -> RunFact:
    """Return the run as unknown."""
    if is_over(run) or run.state is RunState.UNKNOWN:
        return run
    return replace(run, state=step(RUN, run.state, RunState.UNKNOWN), known_state=run.state)


def lost(run: RunFact, reason: Reason, detail: str, now_ms: int) -> RunFact:
    """Return the run as lost: the broker gives it up."""
    if is_over(run):
        return run
    return replace(
        run,
        state=step(RUN, run.state, RunState.LOST),
        reason=reason,
        detail=detail,
        ended_ms=now_ms,
        successor="",
    )


def takes_logs(
    lease: LeaseFact, job: JobFact, run: RunFact | None, *, now_ms: int, late_ms: int
) -> bool:
    """Say whether lines of this lease's run still belong to the job's log.

    A run that ended by itself hands in its last lines even when the job has gone on elsewhere: the
    end of a failed attempt is what its renter looks for, and nothing is paid by it. A run that was
    given up is refused: it may still be running beside its successor.
    """
    if run is None or run.state is RunState.LOST:
        return False
    if lease.closed_ms is None:
        return lease.epoch == job.epoch
    return run.state is RunState.EXITED and now_ms < lease.closed_ms + late_ms


def silence_of(
    run: RunFact, *, now_ms: int, unknown_after_ms: int, patience_ms: int
) -> RunState | None:
    """Return UNKNOWN or LOST where silence has made it that; None: nothing changes."""
    if is_over(run):
        return None
    silent_ms = now_ms - run.last_seen_ms
    if silent_ms >= patience_ms:
        return RunState.LOST
    if silent_ms >= min(unknown_after_ms, patience_ms) and run.state is not RunState.UNKNOWN:
        return RunState.UNKNOWN
    return None


def ordered(
    run: RunFact, desired: Desired, reason: Reason, grace_ms: int, now_ms: int
) -> RunFact | None:
    """Return the run with a harder order; None where it changes nothing."""
    if is_over(run) or desired not in DESIRED[run.desired]:
        return None
    return replace(
        run,
        desired=step(DESIRED, run.desired, desired),
        order_reason=reason,
        order_until_ms=now_ms + grace_ms,
    )


def is_overdue(run: RunFact, now_ms: int) -> bool:
    """Say whether a drain's grace is over and it must become a stop."""
    return (
        not is_over(run)
        and run.desired is Desired.DRAIN
        and run.order_until_ms is not None
        and now_ms >= run.order_until_ms
    )


def disobeys(run: RunFact, now_ms: int, stop_overdue_ms: int) -> bool:
    """Say whether a run that was to stop is still there far too late."""
    return (
        not is_over(run)
        and run.desired is Desired.STOP
        and run.order_until_ms is not None
        and now_ms >= run.order_until_ms + stop_overdue_ms
    )


def nears_the_edge(
    run: RunFact, lease: LeaseFact, *, now_ms: int, stop_grace_ms: int, margin_ms: int
) -> bool:
    """Say whether the run must begin to drain for its hold to last until it has stopped."""
    most_ms = device_ms_within(lease.price_ucr_per_device_hour, lease.hold_ucr)
    if most_ms is None or is_over(run) or run.running_ms is None:
        return False
    devices = len(lease.device_ids)
    # Since the last report it has gone on, as far as we know.
    used_ms = run.cum_device_ms + max(0, now_ms - run.last_seen_ms) * devices
    reserve_ms = min((stop_grace_ms + margin_ms) * devices, most_ms // 2)
    return used_ms + reserve_ms >= most_ms


def is_at_edge(lease: LeaseFact, cum_device_ms: int, *, stop_grace_ms: int, margin_ms: int) -> bool:
    """Say whether a run that has used so much had come to where its hold ends: `nears_the_edge`,
    by the time that was reported alone."""
    most_ms = device_ms_within(lease.price_ucr_per_device_hour, lease.hold_ucr)
    if most_ms is None:
        return False
    reserve_ms = (stop_grace_ms + margin_ms) * len(lease.device_ids)
    return cum_device_ms + min(reserve_ms, most_ms // 2) >= most_ms
