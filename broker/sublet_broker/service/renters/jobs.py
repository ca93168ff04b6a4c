"""Jobs come in; their renter cancels, pauses and resumes them.

A job is checked from the cheapest question to the dearest, and refused before anything is written:
signature and time, image, budget, what the market has, inputs, balance. Then the whole budget is
held. The same job sent twice is the same job.
"""

from dataclasses import replace

from sublet_broker.market import ledger
from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import (
    AmendmentFact,
    BlobFact,
    JobFact,
    LeaseFact,
    PartyFact,
    RunFact,
)
from sublet_broker.market.leasing import affords_a_lease
from sublet_broker.market.matching import requirements_of
from sublet_broker.market.resuming import ended_by_renter, resumed
from sublet_broker.service.content.claims import claim_all, lies
from sublet_broker.service.content.packs import Packs
from sublet_broker.service.errors import Refusal
from sublet_broker.service.leases.candidates import LIVE_LEASE
from sublet_broker.service.leases.closing import close, release_if_ended
from sublet_broker.service.leases.open_offers import OpenOffers
from sublet_broker.service.leases.orders import give_order
from sublet_broker.service.queries.views import Views
from sublet_broker.service.renters.inputs import Inputs
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.job_lookup import own_job
from sublet_broker.service.unit_of_work.signed_input import (
    as_refusal,
    check_fresh,
    receive_document,
)
from sublet_broker.service.unit_of_work.tallies import LIVE_JOBS
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.amounts import format_credits
from sublet_contracts.api import JobView
from sublet_contracts.documents import (
    Amendment,
    DocumentRefused,
    Job,
    Signed,
)
from sublet_contracts.envelope import Envelope
from sublet_contracts.keys import short
from sublet_contracts.problems import ProblemCode
from sublet_contracts.reasons import Reason
from sublet_contracts.requirements import Constraint, is_pinned
from sublet_contracts.rules import minimum_budget_ucr
from sublet_contracts.states import JOB, Desired, JobState, LeaseState, is_terminal


class Jobs:
    """Jobs: submitted, cancelled, paused, resumed."""

    def __init__(
        self, context: Context, views: Views, open_offers: OpenOffers, packs: Packs
    ) -> None:
        self._context = context
        self._views = views
        self._open_offers = open_offers
        self._inputs = Inputs(context, packs)

    def submit(self, caller: str, envelope: Envelope, *, wait_for_offer: bool = True) -> JobView:
        """Accept a job, hold its budget. `wait_for_offer`: also where no machine is free for it
        now; else that is refused.

        The market and the content are asked before the transaction. What may have changed since
        then is looked at again in it, but for the market: an offer may always go the next moment.
        """
        try:
            signed = receive_document(self._context, envelope, Job, signed_by=(caller,))
            if signed.document.renter != caller:
                raise DocumentRefused("the renter is not who sent it", "renter")
            with self._context.read() as snapshot:
                known = snapshot.get(JobFact, signed.id) is not None
                job = None if known else self._admit(snapshot, signed)
            if job is not None:
                self._check_terms(signed.document)
                if not wait_for_offer:
                    self._check_market(job)
                with self._inputs.found(signed.document) as blobs:
                    self._accept(signed, blobs)
        except DocumentRefused as error:
            raise as_refusal(error) from error
        return self._views.job(caller, signed.id)

    def _accept(self, signed: Signed[Job], blobs: list[BlobFact]) -> None:
        with self._context.work() as work:
            if work.get(JobFact, signed.id) is not None:
                return
            job = self._admit(work, signed)
            self._hold(work, job.renter, job.id, job.budget_ucr, signed.id, "hold")
            work.add_job(job)
            sizes = {blob.digest: blob.size_bytes for blob in blobs}
            if lies(work, sizes).keys() != sizes.keys():
                entry = signed.document.inputs[0]
                raise Refusal(
                    ProblemCode.INPUT_MISSING,
                    "some of the inputs' content is here no longer",
                    field="inputs",
                    destination=entry.destination,
                )
            settings = self._context.settings
            claim_all(self._context, work, job.id, sizes, settings.max_job_bytes)
            claim_all(self._context, work, job.renter, sizes, settings.max_renter_bytes)
            work.record(signed.id)

    def _admit(self, work: UnitOfWork, signed: Signed[Job]) -> JobFact:
        """Return the job as it is queued. Raises DocumentRefused, Refusal: its time or its renter
        is not right."""
        document = signed.document
        check_fresh(
            self._context, work.now_ms, issued_ms=document.issued_ms, expires_ms=document.expires_ms
        )
        if work.get(PartyFact, document.renter) is None:
            raise Refusal(ProblemCode.UNKNOWN_PARTY, "this key has not been introduced")
        most = self._context.settings.max_live_jobs
        if work.tally(LIVE_JOBS, document.renter) >= most:
            raise Refusal(
                ProblemCode.TOO_MANY_JOBS,
                f"{most} of your jobs have not ended yet",
                field="renter",
                limit=most,
            )
        return JobFact(
            id=signed.id,
            renter=document.renter,
            name=document.name,
            state=JobState.QUEUED,
            envelope=signed.envelope,
            budget_ucr=document.budget_ucr,
            accept_ucr=document.accept_receipts_up_to_ucr,
            submitted_ms=work.now_ms,
            hardware_class=document.resources.hardware_class,
        )

    def _check_terms(self, job: Job) -> None:
        if self._context.settings.image_policy == "digest" and not is_pinned(job.image):
            raise Refusal(
                ProblemCode.IMAGE_NOT_PINNED,
                f"{job.image} is named by tag; this broker takes images by digest only",
                field="image",
                image=job.image,
            )
        least = minimum_budget_ucr(job.max_price_ucr_per_device_hour, job.resources.devices)
        for field, amount in (
            ("budget_ucr", job.budget_ucr),
            ("accept_receipts_up_to_ucr", job.accept_receipts_up_to_ucr),
        ):
            if amount < least:
                raise Refusal(
                    ProblemCode.BUDGET_TOO_SMALL,
                    f"{field} is {format_credits(amount)}, and a minute of this job at its highest "
                    f"price costs {format_credits(least)}",
                    field=field,
                    amount_ucr=amount,
                    least_ucr=least,
                )

    def _check_market(self, job: JobFact) -> None:
        requirements = requirements_of(job)
        self._open_offers.refresh()
        if self._open_offers.candidates(requirements, 1):
            return
        explanation = self._open_offers.explain(requirements)
        if explanation.fitting:
            return
        waiting = self._context.waiting_line.length(requirements.resources.device_kind)
        if not explanation.considered:
            raise Refusal(
                ProblemCode.NO_MATCH,
                "no offer is open at the moment",
                field="resources",
                considered=0,
                failures={},
                shortfalls=[],
                waiting=waiting,
            )
        if busy := len(explanation.busy):
            raise Refusal(
                ProblemCode.NO_MATCH,
                (
                    "the only machine that would do is"
                    if busy == 1
                    else f"all {busy} machines that would do are"
                )
                + f" busy, and {_in_line(waiting)} for the same kind of device",
                field=Constraint.BUSY,
                considered=explanation.considered,
                failures={**explanation.failures},
                shortfalls=[shortfall.as_json() for shortfall in explanation.relax],
                waiting=waiting,
            )
        failing = ", ".join(
            f"{name} ({count})"
            for name, count in sorted(
                explanation.failures.items(), key=lambda item: (-item[1], item[0])
            )
        )
        raise Refusal(
            ProblemCode.NO_MATCH,
            f"none of {explanation.considered} open offers fits; they fail on: {failing}",
            field=str(explanation.relax[0].constraint),
            considered=explanation.considered,
            failures={**explanation.failures},
            shortfalls=[shortfall.as_json() for shortfall in explanation.relax],
            waiting=waiting,
        )

    def _hold(
        self, work: UnitOfWork, renter: str, job: str, amount_ucr: int, cites: str, memo: str
    ) -> None:
        if not amount_ucr:
            return
        try:
            work.post(
                [
                    ledger.Move(
                        ledger.transfer_id("submit", cites),
                        ledger.available(renter),
                        ledger.held(job),
                        amount_ucr,
                        cites,
                        memo,
                    )
                ]
            )
        except ledger.Overdrawn as error:
            raise Refusal(
                ProblemCode.OVER_BALANCE,
                f"the budget is {format_credits(amount_ucr)}, the balance is "
                f"{format_credits(error.free_ucr)}",
                field="budget_ucr",
                amount_ucr=amount_ucr,
                balance_ucr=error.free_ucr,
            ) from error

    def cancel(self, caller: str, ref: str) -> JobView:
        """End a job: its run stops, what is left of its hold goes back."""
        with self._context.work() as work:
            job = own_job(work, caller, ref)
            if not is_terminal(JOB, job.state):
                self._end(work, job, "cancel", Reason.CANCELLED, JobState.CANCELLED)
        return self._views.job(caller, job.id)

    def pause(self, caller: str, ref: str) -> JobView:
        """Checkpoint the job and stop it, until it is resumed. Its hold stays."""
        with self._context.work() as work:
            job = own_job(work, caller, ref)
            if is_terminal(JOB, job.state):
                raise _ended(job)
            if job.state is not JobState.PAUSED and job.wanted != "cancel":
                self._end(work, job, "pause", Reason.PAUSED_BY_RENTER, JobState.PAUSED)
        return self._views.job(caller, job.id)

    def _end(
        self, work: UnitOfWork, job: JobFact, wanted: str, reason: Reason, state: JobState
    ) -> None:
        leases = work.find(LeaseFact, {"job": job.id, "state": LIVE_LEASE})
        if not leases:
            ended = ended_by_renter(job, state, reason, work.now_ms)
            work.put_job(job, ended)
            release_if_ended(work, ended)
            return
        job = work.put_job(job, replace(job, wanted=wanted))
        lease = leases[0]
        if lease.state is LeaseState.PROPOSED:
            close(self._context, work, lease, reason, "")
            return
        run = work.must(RunFact, lease.id)
        grace_ms = accepted(job.envelope, Job).stop_grace_ms
        give_order(work, lease, run, Desired.DRAIN, reason, grace_ms)

    def resume(self, caller: str, ref: str, amendment: Envelope | None = None) -> JobView:
        """Queue a paused job again, first raising its bounds if an amendment says so. A job
        that runs just gets the new bounds, from its next lease on."""
        try:
            signed = amendment and receive_document(
                self._context, amendment, Amendment, signed_by=(caller,)
            )
            with self._context.work() as work:
                job = own_job(work, caller, ref)
                if is_terminal(JOB, job.state):
                    raise _ended(job)
                if signed:
                    job = self._amend(work, job, signed)
                self._resume(work, job, amended=signed is not None)
        except DocumentRefused as error:
            raise as_refusal(error) from error
        return self._views.job(caller, job.id)

    def _resume(self, work: UnitOfWork, job: JobFact, *, amended: bool) -> None:
        if job.wanted == "pause":
            # It hasn't stopped yet: it will, and goes on right after.
            work.put_job(job, replace(job, wanted=""))
        elif job.state is JobState.PAUSED:
            document = accepted(job.envelope, Job)
            if not affords_a_lease(job, document):
                least = minimum_budget_ucr(
                    document.max_price_ucr_per_device_hour, document.resources.devices
                )
                raise _unaffordable(job, least)
            work.put_job(job, resumed(job, work.now_ms))
        elif not amended:
            raise Refusal(ProblemCode.NOT_PAUSED, f"the job is {job.state}", state=str(job.state))

    def _amend(self, work: UnitOfWork, job: JobFact, signed: Signed[Amendment]) -> JobFact:
        document = signed.document
        if work.get(AmendmentFact, signed.id) is not None:
            return job
        if document.job != job.id or document.renter != job.renter:
            raise DocumentRefused(f"it amends job {short(document.job)}", "job")
        check_fresh(self._context, work.now_ms, issued_ms=document.issued_ms)
        if document.budget_ucr < job.budget_ucr:
            raise DocumentRefused(
                f"the budget is {format_credits(job.budget_ucr)} already and can't be lowered",
                "budget_ucr",
            )
        if not job.accept_ucr <= document.accept_receipts_up_to_ucr <= document.budget_ucr:
            raise DocumentRefused(
                f"must lie between {format_credits(job.accept_ucr)}, as before, and the budget",
                "accept_receipts_up_to_ucr",
            )
        added = document.budget_ucr - job.budget_ucr
        self._hold(work, job.renter, job.id, added, signed.id, "budget raised")
        work.add(AmendmentFact(signed.id, job.id, signed.envelope))
        work.record(signed.id)
        work.event("money", job.id, after="amended", detail=f"{format_credits(added)} more held")
        raised = replace(
            job,
            budget_ucr=document.budget_ucr,
            accept_ucr=document.accept_receipts_up_to_ucr,
        )
        return work.put_job(job, raised)


def _in_line(waiting: int) -> str:
    if not waiting:
        return "no job waits in line"
    return "1 job waits in line" if waiting == 1 else f"{waiting} jobs wait in line"


def _ended(job: JobFact) -> Refusal:
    return Refusal(ProblemCode.JOB_ENDED, f"the job has ended: {job.state}", state=str(job.state))


def _unaffordable(job: JobFact, least_ucr: int) -> Refusal:
    """Return why a paused job can't go on: `least_ucr`, a minute's price, is not left of its
    budget, or of what it accepts before its renter signs."""
    costs = f"a minute at the highest price costs {format_credits(least_ucr)}"
    budget_left_ucr = max(0, job.budget_ucr - job.settled_ucr)
    if budget_left_ucr < least_ucr:
        return Refusal(
            ProblemCode.BUDGET_USED_UP,
            f"{format_credits(budget_left_ucr)} of the budget are left, {costs}",
            field="budget_ucr",
            left_ucr=budget_left_ucr,
            least_budget_ucr=job.budget_ucr - budget_left_ucr + least_ucr,
        )
    accept_left_ucr = max(0, job.accept_ucr - job.accepted_ucr)
    return Refusal(
        ProblemCode.RECEIPTS_UNSIGNED,
        f"{format_credits(accept_left_ucr)} may still be charged before its receipts are signed, "
        f"{costs}",
        left_ucr=accept_left_ucr,
        least_ucr=least_ucr,
    )
