"""A job's state in a sentence, with what to do next."""

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import JobFact, LeaseFact, RunFact
from sublet_broker.market.leasing import affords_a_lease
from sublet_contracts.amounts import credits_of, span_of
from sublet_contracts.documents import Job
from sublet_contracts.reasons import MEANINGS, Reason
from sublet_contracts.states import JobState, LeaseState, RunState

_DOING = {
    RunState.ASSIGNED: "the machine has it and begins",
    RunState.PULLING: "the machine pulls the image",
    RunState.RESTORING: "the machine restores the checkpoint",
}


def says(
    job: JobFact, lease: LeaseFact | None, run: RunFact | None, now_ms: int, *, outputs_kept: bool
) -> str:
    """Return what the job is doing, in words. `lease` and `run`: the newest."""
    match job.state:
        case JobState.QUEUED:
            return _waiting("waits for a machine", job, now_ms)
        case JobState.STARTING:
            if run is not None and run.state in _DOING:
                return f"{_DOING[run.state]}"
            return "a machine was found and is asked to take it"
        case JobState.RUNNING:
            return _running(job, run, now_ms)
        case JobState.RECOVERING:
            return _recovering(job, lease, run, now_ms)
        case JobState.PAUSED:
            return _paused(job)
        case JobState.SUCCEEDED:
            if not job.outputs:
                return "finished"
            if not outputs_kept:
                return "finished; its outputs are no longer kept"
            return "finished; sublet download brings the outputs"
        case JobState.FAILED:
            reason = MEANINGS[job.reason].says if job.reason else "it failed"
            return f"{reason}{_also(job.detail)}"
        case JobState.CANCELLED:
            return MEANINGS[job.reason or Reason.CANCELLED].says


def _also(detail: str) -> str:
    return f" ({detail})" if detail else ""


def _waiting(what: str, job: JobFact, now_ms: int) -> str:
    if job.not_before_ms > now_ms:
        return f"{what}; next attempt in {span_of(job.not_before_ms - now_ms)}"
    return what


def _running(job: JobFact, run: RunFact | None, now_ms: int) -> str:
    if job.wanted:
        asked = "cancelled" if job.wanted == "cancel" else "paused"
        return f"is being {asked}: the run saves its state and stops"
    if run is None:
        return "runs"
    if run.state is RunState.UNKNOWN:
        silent = span_of(now_ms - run.last_seen_ms)
        ready = "; another machine prepares to take over" if run.successor else ""
        return f"the machine has been silent for {silent}{ready}"
    if run.state is RunState.DRAINING:
        why = MEANINGS[run.order_reason].says if run.order_reason else run.detail
        return f"saves its state and stops{_also(why)}"
    if run.state is RunState.EXITED:
        return "has ended; the last receipt and the outputs are awaited"
    if run.total_steps:
        return f"runs, step {run.step} of {run.total_steps}"
    return f"runs, step {run.step}" if run.step else "runs"


def _recovering(job: JobFact, lease: LeaseFact | None, run: RunFact | None, now_ms: int) -> str:
    if lease is not None and lease.state is not LeaseState.CLOSED:
        doing = _DOING.get(run.state, "it begins") if run else "a machine is asked to take it"
        return f"goes on from step {lease.start_step}: {doing}"
    why = MEANINGS[job.reason].says if job.reason else "its run ended"
    return _waiting(f"{why}; waits for another machine", job, now_ms)


def _paused(job: JobFact) -> str:
    if job.reason is Reason.BUDGET_EXHAUSTED or not affords_a_lease(
        job, accepted(job.envelope, Job)
    ):
        left = max(0, job.budget_ucr - job.settled_ucr)
        if job.accept_ucr - job.accepted_ucr < left:
            return (
                "paused: its charges wait for your signature; "
                "sublet logs -f signs receipts, then sublet resume"
            )
        return (
            f"paused: {credits_of(left)} of the budget are left; "
            "sublet resume --budget TOTAL raises it and goes on"
        )
    if job.reason is Reason.NO_PROGRESS:
        return f"paused: no new checkpoint in {job.detail}; look at sublet logs, then sublet resume"
    return "paused; sublet resume goes on from the last checkpoint"
