"""Closing a lease: it is settled, the run is over, its devices are free, and the job moves on.

All in one transaction: there is never a moment with two holders, or with work that nobody has paid.
"""

from dataclasses import replace

from sublet_broker.market import ledger
from sublet_broker.market.accepted import accepted
from sublet_broker.market.checkpointing import handed_over
from sublet_broker.market.facts import (
    AgentFact,
    ChainFact,
    CheckpointFact,
    JobFact,
    LeaseFact,
    ReceiptFact,
    RunFact,
    SettlementFact,
)
from sublet_broker.market.leasing import hold_ucr
from sublet_broker.market.resuming import DURABLE_COUNTS, Ending, after
from sublet_broker.market.running import is_at_edge, is_over, judge_exit, lost
from sublet_broker.market.setting_aside import CANT_START, could_not_start
from sublet_broker.market.settling import SettlementDecision
from sublet_broker.market.unattributed import reason_that_counts
from sublet_broker.service.leases.quarantine import distrust_start
from sublet_broker.service.leases.settlement import pending_of, settle
from sublet_broker.service.leases.standby import newest_durable
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.unit_of_work import (
    UnitOfWork,
)
from sublet_contracts.amounts import format_credits
from sublet_contracts.documents import Job, Lease, Receipt
from sublet_contracts.reasons import IMAGE_REASONS, MEANINGS, Fault, Next, Reason
from sublet_contracts.rules import FREE_KILLS_A_RENTER_AND_WEEK, WEEK_MS
from sublet_contracts.states import (
    JOB,
    LEASE,
    ChainState,
    CheckpointState,
    LeaseState,
    RunState,
    is_terminal,
    step,
)
from sublet_contracts.wire import Order


def due(
    context: Context, work: UnitOfWork, lease: LeaseFact, run: RunFact
) -> tuple[Reason, str] | None:
    """Return why a run that has exited can be closed now; None: something is still awaited.

    Awaited are the final receipt, and, where the job wants outputs, their verification. Each only
    for so long, because an agent can fall silent at any moment.
    """
    if run.state is not RunState.EXITED or run.reason is None:
        return None
    job = accepted(work.must(JobFact, lease.job).envelope, Job)
    since_ms = max(run.ended_ms or 0, context.started_ms)
    reason, detail = _that_counts(work, lease, run.reason), run.detail
    if reason is Reason.SUCCEEDED and job.outputs:
        outputs = work.find(CheckpointFact, {"lease": lease.id, "kind": "outputs"})
        states = {output.state for output in outputs}
        if CheckpointState.DURABLE not in states:
            if CheckpointState.UPLOADED in states:
                return None
            if not states and work.now_ms < since_ms + job.patience_ms:
                return None
            why = outputs[-1].detail if outputs else "they never came"
            reason, detail = Reason.RUN_VANISHED, f"the outputs are not here: {why}"
    chain = work.must(ChainFact, lease.id)
    if chain.state is not ChainState.OPEN:
        return reason, detail
    at_once = MEANINGS[reason].next is Next.RETRY and MEANINGS[reason].fault is Fault.PROVIDER
    wait_ms = context.settings.final_receipt_ms if at_once else job.patience_ms
    return (reason, detail) if work.now_ms >= since_ms + wait_ms else None


def _that_counts(work: UnitOfWork, lease: LeaseFact, reason: Reason) -> Reason:
    """Return the reason by which the lease is settled, for the one that its agent gives."""
    if reason is not Reason.KILLED_UNATTRIBUTED:
        return reason
    of_renter = work.find(
        SettlementFact,
        {"renter": lease.renter, "reason": reason},
        order_by="settled_ms",
        descending=True,
        limit=FREE_KILLS_A_RENTER_AND_WEEK,
    )
    return reason_that_counts(
        reason,
        of_job=work.tx.count(SettlementFact, {"job": lease.job, "reason": reason}),
        of_renter_this_week=sum(work.now_ms - s.settled_ms < WEEK_MS for s in of_renter),
    )


def close_if_due(
    context: Context, work: UnitOfWork, lease: LeaseFact, decision: SettlementDecision | None = None
) -> bool:
    """Close the lease if its run has ended and nothing more is awaited."""
    run = work.get(RunFact, lease.id)
    if run is None or lease.state is not LeaseState.ACTIVE:
        return False
    why = due(context, work, lease, run)
    if why is None:
        return False
    close(context, work, lease, why[0], why[1], decision)
    return True


def give_up(
    context: Context, work: UnitOfWork, lease: LeaseFact, reason: Reason, detail: str
) -> None:
    """Close a lost run's lease. A final receipt that came before counts as its word."""
    run = work.must(RunFact, lease.id)
    chain = work.must(ChainFact, lease.id)
    if chain.state is ChainState.SEALED and chain.head is not None and not is_over(run):
        head = accepted(work.must(ReceiptFact, chain.head).envelope, Receipt)
        document = accepted(work.must(JobFact, lease.job).envelope, Job)
        at_edge = is_at_edge(
            lease,
            head.cum_device_ms,
            stop_grace_ms=document.stop_grace_ms,
            margin_ms=context.settings.drain_margin_ms,
        )
        said = judge_exit(run, head.reason or reason, at_edge=at_edge)
        whole = not document.outputs or outputs_of(work, lease) is not None
        if said is not Reason.SUCCEEDED or whole:
            said = _that_counts(work, lease, said)
            reason, detail = said, "its final receipt came before it fell silent"
    close(context, work, lease, reason, detail)


def close(
    context: Context,
    work: UnitOfWork,
    lease: LeaseFact,
    reason: Reason,
    detail: str,
    decision: SettlementDecision | None = None,
) -> None:
    """Close a lease for good: settle it (or void its hold), end the run, move the job on."""
    job = work.must(JobFact, lease.job)
    run = work.get(RunFact, lease.id)
    successor = run.successor if run else ""
    charged_ucr = 0
    if lease.active_ms is None:
        work.resolve(pending_of(lease.id), ())
    else:
        job, charged_ucr = settle(context, work, job, lease, reason, decision)
    closed = replace(
        lease,
        state=step(LEASE, lease.state, LeaseState.CLOSED),
        closed_ms=work.now_ms,
        reason=reason,
        detail=detail[:1024],
    )
    work.put(closed)
    work.event(
        "lease",
        lease.job,
        lease=lease.id,
        epoch=lease.epoch,
        before=lease.state,
        after=closed.state,
        reason=reason,
        detail=closed.detail,
    )
    if run is None or not is_over(run):
        if run is not None:
            work.put_run(run, lost(run, reason, detail, work.now_ms))
        send_stop(work, lease, reason)
    elif run.successor:
        work.put(replace(run, successor=""))
    if reason is Reason.RESTORE_FAILED:
        distrust_start(context, work, lease)
    if reason in CANT_START and (run is None or run.running_ms is None):
        _set_aside(work, lease)
    of_image = reason in IMAGE_REASONS
    ending = Ending(
        reason=reason,
        detail=detail,
        provider=lease.provider,
        signed=lease.active_ms is not None,
        progressed=_progressed(work, lease),
        ran=run is not None and run.running_ms is not None,
        successor=successor,
        has_durable=reason in DURABLE_COUNTS and newest_durable(work, lease.job) is not None,
        image_named=of_image and bool(accepted(lease.envelope, Lease).image),
        topped_up=hold_ucr(job) > lease.hold_ucr - charged_ucr,
    )
    if reason is Reason.SUCCEEDED:
        job = replace(job, outputs=outputs_of(work, lease))
    before = work.must(JobFact, lease.job)
    moved = after(job, ending, context.settings.patience, work.now_ms)
    work.put_job(before, moved, lease=lease.id)
    release_if_ended(work, moved)
    work.touch_offer(lease.provider)
    if successor:
        work.touch_offer(successor)


def outputs_of(work: UnitOfWork, lease: LeaseFact) -> str | None:
    """Return the newest outputs that a lease has handed over."""
    found = handed_over(work.find(CheckpointFact, {"lease": lease.id, "kind": "outputs"}))
    return None if found is None else found.id


def _set_aside(work: UnitOfWork, lease: LeaseFact) -> None:
    """Lease nothing on a machine for a while that could not start a run."""
    agent = work.get(AgentFact, lease.provider)
    if agent is None:
        return
    after_failure = could_not_start(agent, lease.job, work.now_ms)
    work.put(after_failure, before=agent)
    work.set_aside(agent.id, after_failure.set_aside_until_ms)


def send_stop(work: UnitOfWork, lease: LeaseFact, reason: Reason) -> None:
    """Tell an agent to stop a run that is no longer wanted there."""
    work.send(
        lease.provider,
        Order(lease=lease.id, epoch=lease.epoch, desired="stop", reason=reason, grace_ms=0),
    )


def release_if_ended(work: UnitOfWork, job: JobFact) -> None:
    """Give back what is left of a job's hold once the job has ended."""
    if not is_terminal(JOB, job.state):
        return
    left = ledger.balance_ucr(work.accounts.account(ledger.held(job.id)))
    if left:
        work.post(
            [
                ledger.Move(
                    ledger.transfer_id("release", job.id),
                    ledger.held(job.id),
                    ledger.available(job.renter),
                    left,
                    job.id,
                    f"job {job.state}: hold released",
                )
            ]
        )
        detail = f"{format_credits(left)} back to the renter"
        work.event("money", job.id, after="released", detail=detail)


def _progressed(work: UnitOfWork, lease: LeaseFact) -> bool:
    durable = work.find(
        CheckpointFact,
        {"lease": lease.id, "kind": "checkpoint", "state": CheckpointState.DURABLE},
    )
    return any(c.step > lease.start_step for c in durable)
