"""A job, a run, a charge as their owners see them."""

from sublet_broker.market import ledger
from sublet_broker.market.accepted import accepted
from sublet_broker.market.checkpointing import kept_until_ms, newest_partial_outputs, resume_point
from sublet_broker.market.facts import (
    AccountFact,
    ChainFact,
    CheckpointFact,
    JobFact,
    LeaseFact,
    OfferFact,
    PartyFact,
    RunFact,
    SettlementFact,
)
from sublet_broker.market.running import is_over
from sublet_broker.market.warnings import Watched, about, facts_of, most_lost, unsaved
from sublet_broker.service.queries.status_text import next_step, says
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.api import (
    Charge,
    JobView,
    RunCadenceView,
    RunStallView,
    RunUploadView,
    RunUsageView,
    RunView,
    WarningView,
)
from sublet_contracts.documents import Job, Offer, Settlement
from sublet_contracts.job_warnings import warning_text
from sublet_contracts.reasons import MEANINGS, Fault
from sublet_contracts.rules import charge_ucr
from sublet_contracts.states import CheckpointState, LeaseState, RunState
from sublet_contracts.wire import RunStall

_MILLION = 1_000_000


def job_view(snapshot: UnitOfWork, job: JobFact, *, keep_ended_ms: int) -> JobView:
    """Return the job with all its runs. `keep_ended_ms`: how long content is kept after its end."""
    document = accepted(job.envelope, Job)
    leases = snapshot.find(LeaseFact, {"job": job.id}, order_by="epoch")
    runs = {run.id: run for run in snapshot.find(RunFact, {"job": job.id})}
    settled = {
        fact.lease: accepted(fact.envelope, Settlement)
        for fact in snapshot.find(SettlementFact, {"job": job.id})
    }
    durable = snapshot.find(CheckpointFact, {"job": job.id, "state": CheckpointState.DURABLE})
    views = tuple(
        _run_view(snapshot, lease, runs.get(lease.id), settled.get(lease.id), durable, document)
        for lease in leases
    )
    standing = snapshot.standing(job.id)
    newest = leases[-1] if leases else None
    run = runs.get(newest.id) if newest else None
    shown = next((v for v in reversed(views) if v.step or v.total_steps), None)
    durable_step = max((c.step for c in durable if c.kind == "checkpoint"), default=0)
    resumes_from = resume_point(durable)
    unsaved_ms, unsaved_ucr = 0, 0
    warnings: tuple[WarningView, ...] = ()
    if newest is not None and run is not None and not is_over(run):
        unsaved_ms, unsaved_ucr = unsaved(run, newest, snapshot.now_ms)
        warnings = _warnings(snapshot, run, newest, document)
    live_ucr = sum(v.charge_ucr for v in views if v.lease_state is not LeaseState.CLOSED)
    outputs = next((c for c in durable if c.id == job.outputs), None)
    outputs_kept = outputs is not None and outputs.kept
    partial = newest_partial_outputs(durable)
    return JobView(
        id=job.id,
        name=job.name,
        renter=job.renter,
        state=job.state,
        reason=job.reason,
        says=says(job, newest, run, snapshot.now_ms, outputs_kept=outputs_kept, standing=standing),
        place_in_line=standing.number if standing is not None else None,
        next_step=next_step(job, outputs_kept=outputs_kept, partial_kept=partial is not None),
        image=document.image,
        image_pinned=job.image_pinned,
        command=document.command,
        resources=document.resources,
        max_price_ucr_per_device_hour=document.max_price_ucr_per_device_hour,
        budget_ucr=job.budget_ucr,
        held_ucr=ledger.balance_ucr(snapshot.get(AccountFact, ledger.held(job.id))),
        charged_ucr=job.settled_ucr + live_ucr,
        settled_ucr=job.settled_ucr,
        submitted_ms=job.submitted_ms,
        started_ms=job.started_ms,
        ended_ms=job.ended_ms,
        step=shown.step if shown else durable_step,
        total_steps=shown.total_steps if shown else 0,
        metrics=shown.metrics if shown else {},
        durable_step=durable_step,
        durable_ms=resumes_from.durable_ms if resumes_from else None,
        unsaved_device_ms=unsaved_ms,
        unsaved_ucr=unsaved_ucr,
        warnings=warnings,
        recoveries=_recoveries(settled),
        lost_device_ms=sum(s.lost_device_ms for s in settled.values()),
        outputs=job.outputs,
        outputs_index_digest=outputs.index_digest if outputs else None,
        partial_outputs=partial.id if partial else None,
        partial_outputs_index_digest=partial.index_digest if partial else None,
        kept_until_ms=kept_until_ms(job, keep_ended_ms=keep_ended_ms),
        document=job.envelope,
        runs=views,
    )


def _warnings(
    snapshot: UnitOfWork, run: RunFact, lease: LeaseFact, job: Job
) -> tuple[WarningView, ...]:
    """Return what stands of the run under way, with its facts as they are now."""
    watched = Watched(run, lease, job, snapshot.signs(run.id), snapshot.now_ms)
    views = []
    for code, since_ms in sorted(run.warnings.items(), key=lambda item: (item[1], item[0])):
        facts = facts_of(code, watched)
        views.append(
            WarningView(
                code=code,
                since_ms=since_ms,
                epoch=run.epoch,
                says=warning_text(code, facts),
                facts=facts,
                about=about(code, watched),
            )
        )
    return tuple(views)


def _recoveries(settled: dict[str, Settlement]) -> int:
    """Count the machines that the job has lost."""
    return sum(1 for s in settled.values() if s.fault in (Fault.PROVIDER, Fault.BROKER))


def _run_view(
    snapshot: UnitOfWork,
    lease: LeaseFact,
    run: RunFact | None,
    settled: Settlement | None,
    durable: list[CheckpointFact],
    job: Job,
) -> RunView:
    offer = accepted(snapshot.must(OfferFact, lease.offer).envelope, Offer)
    party = snapshot.get(PartyFact, lease.provider)
    chain = snapshot.get(ChainFact, lease.id)
    reason = lease.reason or (run.reason if run else None)
    if settled is not None:
        cum, payable, charge = (
            settled.cum_device_ms, settled.payable_device_ms, settled.charged_ucr,
        )  # fmt: skip
    else:
        cum = max(run.cum_device_ms if run else 0, chain.cum_device_ms if chain else 0)
        payable = cum
        charge = min(charge_ucr(lease.price_ucr_per_device_hour, cum), lease.hold_ucr)
    own_steps = [c.step for c in durable if c.lease == lease.id and c.kind == "checkpoint"]
    classes = {d.id: d.hardware_class for d in offer.devices}
    return RunView(
        lease=lease.id,
        epoch=lease.epoch,
        offer=lease.offer,
        provider=lease.provider,
        provider_name=offer.name or (party.name if party else ""),
        device_ids=lease.device_ids,
        hardware_class=classes[lease.device_ids[0]],
        price_ucr_per_device_hour=lease.price_ucr_per_device_hour,
        lease_state=lease.state,
        run_state=_run_state(lease, run),
        reason=reason,
        fault=MEANINGS[reason].fault if reason else None,
        detail=lease.detail or (run.detail if run else ""),
        start_step=lease.start_step,
        step=run.step if run else lease.start_step,
        total_steps=run.total_steps if run else 0,
        metrics=run.metrics if run else {},
        durable_step=max(own_steps, default=lease.start_step),
        cum_device_ms=cum,
        payable_device_ms=payable,
        charge_ucr=charge,
        started_ms=lease.active_ms or lease.proposed_ms,
        last_seen_ms=run.last_seen_ms if run else lease.proposed_ms,
        ended_ms=(run.ended_ms if run else None) or lease.closed_ms,
        upload=_upload_view(snapshot, lease.id),
        usage=_usage_view(snapshot, lease.id),
        stall=_stall_view(_stall_of(snapshot, lease.id, run), cum // len(lease.device_ids)),
        cadence=None if run is None else _cadence_view(snapshot, run, lease, job),
    )


def _upload_view(snapshot: UnitOfWork, lease: str) -> RunUploadView | None:
    known = snapshot.upload(lease)
    if known is None:
        return None
    measured_ms, upload = known
    left_bytes = max(0, upload.total_bytes - upload.there_bytes)
    left_ms = left_bytes * 1000 // upload.bytes_per_s if upload.bytes_per_s else None
    figures = upload.model_dump(exclude={"age_ms"})
    return RunUploadView(measured_ms=measured_ms, left_ms=left_ms, **figures)


def _usage_view(snapshot: UnitOfWork, lease: str) -> RunUsageView | None:
    known = snapshot.usage(lease)
    if known is None:
        return None
    measured_ms, usage = known
    return RunUsageView(measured_ms=measured_ms, **usage.model_dump(exclude={"age_ms"}))


def _stall_of(snapshot: UnitOfWork, lease: str, run: RunFact | None) -> RunStall | None:
    """What its newest heartbeat said, or, of a run that has ended, the last one."""
    kept = RunStall(**run.stall) if run is not None and run.stall else None
    return snapshot.stall(lease) or kept


def _stall_view(stall: RunStall | None, took_ms: int) -> RunStallView | None:
    if stall is None or not stall.saves:
        return None
    return RunStallView(
        saves=stall.saves,
        all_stall_ms=stall.all_stall_ms,
        stall_per_save_ms=stall.all_stall_ms // stall.saves,
        stall_share_ppm=min(_MILLION, stall.all_stall_ms * _MILLION // max(1, took_ms)),
        last_stall_ms=stall.stall_ms,
        last_write_ms=stall.write_ms,
    )


def _cadence_view(
    snapshot: UnitOfWork, run: RunFact, lease: LeaseFact, job: Job
) -> RunCadenceView | None:
    signs = snapshot.signs(run.id)
    if signs is None or signs.cadence is None or run.state is not RunState.RUNNING:
        return None
    said = signs.cadence
    most_ms, most_ucr = most_lost(Watched(run, lease, job, signs, snapshot.now_ms))
    return RunCadenceView(
        interval_ms=said.interval_ms,
        auto=not job.checkpoint_interval_ms,
        rests_on=said.rests_on,
        cost_ms=said.cost_ms,
        durable_after_ms=said.durable_after_ms,
        unanswered_ms=said.unanswered_ms,
        most_lost_ms=most_ms,
        most_lost_ucr=most_ucr,
    )


def _run_state(lease: LeaseFact, run: RunFact | None) -> RunState:
    if run is not None:
        return run.state
    return RunState.EXITED if lease.state is LeaseState.CLOSED else RunState.ASSIGNED


def charge_of(snapshot: UnitOfWork, fact: SettlementFact) -> Charge:
    """Return a settlement as a line of a statement."""
    document = accepted(fact.envelope, Settlement)
    lease = snapshot.must(LeaseFact, fact.lease)
    return Charge(
        time_ms=fact.settled_ms,
        lease=fact.lease,
        epoch=document.epoch,
        provider=fact.provider,
        price_ucr_per_device_hour=lease.price_ucr_per_device_hour,
        reason=document.reason,
        fault=document.fault,
        cum_device_ms=document.cum_device_ms,
        payable_device_ms=document.payable_device_ms,
        lost_device_ms=document.lost_device_ms,
        charged_ucr=document.charged_ucr,
        fee_ucr=document.fee_ucr,
        receipt=document.receipt,
        settlement=fact.id,
        accepted_by=document.accepted_by,
    )
