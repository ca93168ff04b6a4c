"""Evidence: the checkpoints and receipts that agents sign, and what the verifier makes of them."""

from dataclasses import replace

from sublet_broker.market.accepted import accepted
from sublet_broker.market.checkpointing import judged, still_counts, why_refused
from sublet_broker.market.facts import (
    CheckpointFact,
    JobFact,
    LeaseFact,
    OfferFact,
    RunFact,
)
from sublet_broker.market.leasing import is_held
from sublet_broker.service.content.claims import claimed, lies
from sublet_broker.service.leases.closing import close_if_due, outputs_of
from sublet_broker.service.leases.quarantine import quarantine
from sublet_broker.service.ports import VerifyResult, VerifyTask
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.signed_input import receive_document
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.digests import shortened
from sublet_contracts.documents import (
    Checkpoint,
    DocumentRefused,
    Lease,
    Offer,
)
from sublet_contracts.states import CheckpointState, LeaseState
from sublet_contracts.wire import CheckpointUploaded, CheckpointVerdict


class Checkpoints:
    """Checkpoints and receipts."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def checkpoint(self, party: str, message: CheckpointUploaded) -> None:
        """Take up an uploaded checkpoint and have it verified. Raises DocumentRefused."""
        envelope = message.checkpoint
        signed = receive_document(self._context, envelope, Checkpoint, signed_by=(party,))
        document = signed.document
        with self._context.work() as work:
            known = work.get(CheckpointFact, signed.id)
            if known is not None:
                if known.state is CheckpointState.UPLOADED:
                    self._verify(work, known)
                return
            most = self._context.settings.max_reports_an_hour
            self._context.rate_limits.defer("reports", party, most, work.now_ms)
            lease = work.get(LeaseFact, document.lease)
            if lease is None or lease.provider != party or document.provider != party:
                raise DocumentRefused("it names a lease that is not the sender's", "lease")
            job = work.must(JobFact, lease.job)
            why = self._why_refused(work, lease, job, document, party)
            if why is not None:
                self._tell(work, lease, signed.id, document, durable=False, detail=why)
                work.event(
                    "checkpoint",
                    job.id,
                    lease=lease.id,
                    epoch=lease.epoch,
                    after="refused",
                    detail=f"{document.kind} of step {document.step}: {why}",
                )
                return
            # For people only; even so, no more than there can be.
            most_ms = max(0, work.now_ms - lease.proposed_ms)
            fact = CheckpointFact(
                id=signed.id,
                job=job.id,
                lease=lease.id,
                epoch=lease.epoch,
                kind=document.kind,
                step=document.step,
                state=CheckpointState.UPLOADED,
                index_digest=document.index_digest,
                total_bytes=document.total_bytes,
                cum_device_ms=document.cum_device_ms,
                created_ms=work.now_ms,
                envelope=envelope,
                sent_bytes=min(message.sent_bytes, document.total_bytes),
                took_ms=min(message.took_ms, most_ms),
                stall_ms=None if message.stall_ms is None else min(message.stall_ms, most_ms),
            )
            work.add(fact)
            work.record(signed.id)
            heartbeats = self._context.heartbeats
            work.tx.after_commit(lambda: heartbeats.uploaded(lease.id, fact.kind, fact.step))
            work.event(
                "checkpoint",
                job.id,
                lease=lease.id,
                epoch=lease.epoch,
                after=fact.state,
                detail=f"{document.kind} of step {document.step}, {document.total_bytes} bytes",
            )
            self._verify(work, fact)

    def _why_refused(
        self, work: UnitOfWork, lease: LeaseFact, job: JobFact, document: Checkpoint, party: str
    ) -> str | None:
        if lease.state is not LeaseState.ACTIVE or not is_held(lease, job, party, document.epoch):
            return "stale epoch: the job has gone on elsewhere, or the lease is closed"
        return why_refused(
            document,
            lease,
            image=job.image_pinned,
            max_bytes=self._context.settings.max_checkpoint_bytes,
            most_device_ms=self._context.settings.most_device_ms(
                lease, work.get(RunFact, lease.id), work.stopwatch_ms
            ),
        )

    def _verify(self, work: UnitOfWork, fact: CheckpointFact) -> None:
        task = VerifyTask(
            fact.id, fact.job, fact.index_digest, self._context.settings.max_checkpoint_bytes
        )
        work.tx.after_commit(lambda: self._context.ports.verifier.submit(task))

    def _tell(
        self,
        work: UnitOfWork,
        lease: LeaseFact,
        id: str,
        document: Checkpoint,
        *,
        durable: bool,
        detail: str,
    ) -> None:
        work.send(
            lease.provider,
            CheckpointVerdict(
                lease=lease.id,
                epoch=lease.epoch,
                checkpoint=id,
                kind=document.kind,
                step=document.step,
                durable=durable,
                detail=detail[:1024],
            ),
        )

    def verify_all(self) -> None:
        """Have everything verified that was uploaded and not judged: after a start."""
        with self._context.work() as work:
            for fact in work.find(CheckpointFact, {"state": CheckpointState.UPLOADED}):
                self._verify(work, fact)

    def verdict(self, result: VerifyResult) -> str | None:
        """Act on what the verifier found. Return the job whose checkpoints are to be pruned."""
        with self._context.work() as work:
            fact = work.get(CheckpointFact, result.checkpoint)
            if fact is None:
                return None
            if not result.ok and not result.permanent:
                self._verify(work, fact)
                return None
            if fact.state is CheckpointState.DURABLE:
                why = result.detail if not result.ok else self._unowned(work, fact, result)
                if why and fact.kept:
                    quarantine(work, fact, why)
                return None
            if fact.state is not CheckpointState.UPLOADED:
                return None
            return self._judge(work, fact, result)

    def _judge(self, work: UnitOfWork, fact: CheckpointFact, result: VerifyResult) -> str | None:
        lease = work.must(LeaseFact, fact.lease)
        job = work.must(JobFact, fact.job)
        detail = result.detail if not result.ok else self._unowned(work, fact, result)
        current = still_counts(fact, lease, job)
        after = judged(
            fact, ok=not detail and result.ok, current=current, detail=detail, now_ms=work.now_ms
        )
        work.put(after)
        durable = after.state is CheckpointState.DURABLE
        document = accepted(fact.envelope, Checkpoint)
        self._tell(work, lease, fact.id, document, durable=durable, detail=after.detail)
        work.event(
            "checkpoint",
            job.id,
            lease=lease.id,
            epoch=lease.epoch,
            before=fact.state,
            after=after.state,
            detail=after.detail or f"{fact.kind} of step {fact.step}",
        )
        if durable:
            if fact.kind == "checkpoint":
                pinned = job.hardware_class or _class_of(work, lease)
                threads = job.threads or accepted(lease.envelope, Lease).threads
                work.put(replace(job, hardware_class=pinned, threads=threads))
            elif fact.kind == "outputs" and lease.state is LeaseState.CLOSED:
                work.put(replace(job, outputs=outputs_of(work, lease)))  # else when it is closed
            run = work.get(RunFact, lease.id)
            if run is not None and fact.kind == "checkpoint":
                self._context.heartbeats.note_saved(run.id, work.now_ms)
                work.put(_saved(run, fact, work.now_ms))
        if fact.kind == "outputs":
            close_if_due(self._context, work, lease)
        return job.id if durable and fact.kind != "outputs" else None

    def _unowned(self, work: UnitOfWork, fact: CheckpointFact, result: VerifyResult) -> str:
        """Say what of the content isn't here, or the job has no right to: nobody gets a stranger's
        chunk by naming its hash. What is here was hashed when it came (packs.py)."""
        sizes = result.chunk_sizes or {}
        wanted = sorted({fact.index_digest, *sizes})
        mine = claimed(work, fact.job, wanted)
        here = lies(work, wanted)
        for digest in wanted:
            if digest not in mine:
                return f"chunk {shortened(digest)} was not uploaded for this job; upload it"
            if digest not in here:
                return f"chunk {shortened(digest)} was damaged here; upload it again"
            size_bytes = here[digest].size_bytes
            if sizes.get(digest, size_bytes) != size_bytes:
                said = sizes[digest]
                return f"chunk {shortened(digest)} has {size_bytes} bytes; its index says {said}"
        if result.total_bytes != fact.total_bytes:
            return f"it says {fact.total_bytes} bytes, its index lists {result.total_bytes}"
        return ""


def _saved(run: RunFact, fact: CheckpointFact, now_ms: int) -> RunFact:
    """Return a run of which this checkpoint has become durable."""
    run = replace(run, step=max(run.step, fact.step))
    if run.durable_ms is not None and run.durable_step > fact.step:
        return run  # It was judged late: a newer one counts already.
    return replace(
        run,
        durable_step=fact.step,
        durable_ms=now_ms,
        durable_device_ms=fact.cum_device_ms,
    )


def _class_of(work: UnitOfWork, lease: LeaseFact) -> str:
    offer = accepted(work.must(OfferFact, lease.offer).envelope, Offer)
    return next(d.hardware_class for d in offer.devices if d.id == lease.device_ids[0])
