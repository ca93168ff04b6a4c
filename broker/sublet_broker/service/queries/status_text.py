"""A job's state in a sentence, and what it waits for its renter to do."""

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import JobFact, LeaseFact, RunFact
from sublet_broker.market.leasing import affords_a_lease
from sublet_broker.market.resuming import PAUSED_WHEN_DURABLE
from sublet_broker.service.unit_of_work.waiting_line import Standing
from sublet_contracts.amounts import format_credits, format_duration
from sublet_contracts.api import NextStep
from sublet_contracts.documents import Job
from sublet_contracts.reasons import MEANINGS, Reason
from sublet_contracts.states import JobState, LeaseState, RunState

_DOING = {
    RunState.ASSIGNED: "the machine has it and begins",
    RunState.PULLING: "the machine pulls the image",
    RunState.RESTORING: "the machine restores the checkpoint",
}


def says(
    job: JobFact,
    lease: LeaseFact | None,
    run: RunFact | None,
    now_ms: int,
    *,
    outputs_kept: bool,
    standing: Standing | None = None,
) -> str:
    """Return what the job is doing, in words. `lease` and `run`: the newest; `standing`: where it
    stands in the line for a machine, if it does."""
    match job.state:
        case JobState.QUEUED:
            if job.reason is None:
                return _waiting(f"waits for a machine{_in_line(standing)}", job, now_ms)
            why = f"{MEANINGS[job.reason].says}{_also(job.detail)}"
            return _waiting(f"{why}; waits for another machine{_in_line(standing)}", job, now_ms)
        case JobState.STARTING:
            doing = _doing(run, lease)
            return doing or "a machine was found and is asked to take it"
        case JobState.RUNNING:
            return _running(job, run, now_ms)
        case JobState.RECOVERING:
            return _recovering(job, lease, run, now_ms, standing)
        case JobState.PAUSED:
            return _paused(job)
        case JobState.SUCCEEDED:
            if job.outputs and not outputs_kept:
                return "finished; its outputs are no longer kept"
            return "finished"
        case JobState.FAILED:
            reason = MEANINGS[job.reason].says if job.reason else "it failed"
            return f"{reason}{_also(job.detail)}"
        case JobState.CANCELLED:
            return MEANINGS[job.reason or Reason.CANCELLED].says


def next_step(job: JobFact, *, outputs_kept: bool, partial_kept: bool) -> NextStep:
    """Return what the job waits for its renter to do. `partial_kept`: partial outputs are."""
    if partial_kept and job.state in (JobState.FAILED, JobState.CANCELLED):
        return NextStep.DOWNLOAD_PARTIAL_OUTPUTS
    if job.state is JobState.SUCCEEDED and job.outputs and outputs_kept:
        return NextStep.DOWNLOAD_OUTPUTS
    if job.state is not JobState.PAUSED:
        return NextStep.NONE
    if _lacks_money(job):
        return NextStep.SIGN_RECEIPTS if _waits_for_signature(job) else NextStep.RAISE_BUDGET
    puzzling = (Reason.NO_PROGRESS, Reason.KILLED_TOO_OFTEN, Reason.STALLED)
    return NextStep.READ_LOGS if job.reason in puzzling else NextStep.RESUME


def _also(detail: str) -> str:
    return f" ({detail})" if detail else ""


def _waiting(what: str, job: JobFact, now_ms: int) -> str:
    if job.not_before_ms > now_ms:
        return f"{what}; next attempt in {format_duration(job.not_before_ms - now_ms)}"
    return what


def _running(job: JobFact, run: RunFact | None, now_ms: int) -> str:
    if job.wanted:
        asked = "cancelled" if job.wanted == "cancel" else "paused"
        return f"is being {asked}: the run saves its state and stops"
    if run is None:
        return "runs"
    if run.state is RunState.UNKNOWN:
        silent = format_duration(now_ms - run.last_seen_ms)
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


def _doing(run: RunFact | None, lease: LeaseFact | None) -> str:
    """Return what a machine does before its run begins; '' if nothing of that."""
    if run is None or lease is None:
        return ""
    if run.state is RunState.RESTORING and lease.start_checkpoint is None:
        return "the machine fetches its inputs"
    return _DOING.get(run.state, "")


def _recovering(
    job: JobFact,
    lease: LeaseFact | None,
    run: RunFact | None,
    now_ms: int,
    standing: Standing | None,
) -> str:
    if lease is not None and lease.state is not LeaseState.CLOSED:
        doing = _doing(run, lease) or ("it begins" if run else "a machine is asked to take it")
        if lease.start_checkpoint is None:
            return f"begins anew elsewhere, for nothing of it was durable: {doing}"
        return f"goes on from step {lease.start_step}: {doing}"
    why = f"{MEANINGS[job.reason].says}{_also(job.detail)}" if job.reason else "its run ended"
    return _waiting(f"{why}; waits for another machine{_in_line(standing)}", job, now_ms)


_LINES = {"gpu": "for a GPU", "cpu": "for a CPU"}


def _in_line(standing: Standing | None) -> str:
    """Return a job's place in the line, as it goes on after the word machine."""
    if standing is None:
        return ""
    place = "next" if standing.number == 1 else f"number {standing.number}"
    return f", {place} in line {_LINES.get(standing.device_kind, '')}".rstrip()


def _paused(job: JobFact) -> str:
    if _lacks_money(job):
        if _waits_for_signature(job):
            return "its charges wait for your signature"
        return f"{format_credits(_left_ucr(job))} of the budget is left"
    if job.reason is Reason.NO_PROGRESS:
        return f"no new checkpoint in {job.detail}"
    if job.reason in PAUSED_WHEN_DURABLE or job.reason is Reason.STALLED:
        return f"{MEANINGS[job.reason].says}{_also(job.detail)}"
    return "by its renter"


def _lacks_money(job: JobFact) -> bool:
    return job.reason is Reason.BUDGET_EXHAUSTED or not affords_a_lease(
        job, accepted(job.envelope, Job)
    )


def _left_ucr(job: JobFact) -> int:
    return max(0, job.budget_ucr - job.settled_ucr)


def _waits_for_signature(job: JobFact) -> bool:
    return job.accept_ucr - job.accepted_ucr < _left_ucr(job)
