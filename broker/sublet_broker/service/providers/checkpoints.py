"""Evidence: the checkpoints and receipts that agents sign, and what the verifier makes of them."""

from dataclasses import replace

from sublet_broker.market.accepted import accepted
from sublet_broker.market.checkpointing import judged, why_refused
from sublet_broker.market.facts import (
    BlobFact,
    ChainFact,
    CheckpointFact,
    JobFact,
    LeaseFact,
    OfferFact,
    ReceiptFact,
    RunFact,
)
from sublet_broker.market.leasing import is_held
from sublet_broker.market.metering import Admission, Judgement, judge
from sublet_broker.service.errors import NotYet
from sublet_broker.service.leases.closing import close, close_if_due
from sublet_broker.service.leases.quarantine import quarantine
from sublet_broker.service.ports import VerifyResult, VerifyTask
from sublet_broker.service.unit_of_work.context import Core
from sublet_broker.service.unit_of_work.signed_input import receive_document, refuse_strangers
from sublet_broker.service.unit_of_work.unit_of_work import RECEIPTS, Work
from sublet_contracts.documents import (
    Checkpoint,
    DocumentRefused,
    Offer,
    Receipt,
    Signed,
    open_document,
)
from sublet_contracts.envelope import Envelope
from sublet_contracts.reasons import Reason
from sublet_contracts.states import CHAIN, ChainState, CheckpointState, LeaseState, step
from sublet_contracts.wire import CheckpointVerdict


class Evidence:
    """Checkpoints and receipts."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def _bound(self, party: str, now_ms: int) -> None:
        """Raises NotYet beyond the quota: the agent sends it again."""
        most = self._core.settings.max_reports_an_hour
        if not self._core.quotas.take("reports", party, most, now_ms):
            raise NotYet(f"more than {most} checkpoints and receipts in an hour")

    def checkpoint(self, party: str, envelope: Envelope) -> None:
        """Take up an uploaded checkpoint and have it verified. Raises DocumentRefused."""
        signed = receive_document(self._core, envelope, Checkpoint, signed_by=(party,))
        document = signed.document
        with self._core.work() as work:
            known = work.get(CheckpointFact, signed.id)
            if known is not None:
                if known.state is CheckpointState.UPLOADED:
                    self._verify(work, known)
                return
            self._bound(party, work.now_ms)
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
            fact = CheckpointFact(
                id=signed.id,
                job=job.id,
                lease=lease.id,
                epoch=lease.epoch,
                kind=document.kind,
                step=document.step,
                state=CheckpointState.UPLOADED,
                index_sha256=document.index_sha256,
                total_bytes=document.total_bytes,
                cum_device_ms=document.cum_device_ms,
                created_ms=work.now_ms,
                envelope=envelope,
            )
            work.tx.add(fact)
            work.record(signed.id)
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
        self, work: Work, lease: LeaseFact, job: JobFact, document: Checkpoint, party: str
    ) -> str | None:
        if lease.state is not LeaseState.ACTIVE or not is_held(lease, job, party, document.epoch):
            return "stale epoch: the job has gone on elsewhere, or the lease is closed"
        return why_refused(
            document,
            lease,
            max_bytes=self._core.settings.max_checkpoint_bytes,
            most_device_ms=self._core.settings.most_device_ms(lease, work.stopwatch_ms),
        )

    def _verify(self, work: Work, fact: CheckpointFact) -> None:
        task = VerifyTask(
            fact.id, fact.job, fact.index_sha256, self._core.settings.max_checkpoint_bytes
        )
        work.tx.after_commit(lambda: self._core.ports.verifier.submit(task))

    def _tell(
        self,
        work: Work,
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
        with self._core.work() as work:
            for fact in work.find(CheckpointFact, {"state": CheckpointState.UPLOADED}):
                self._verify(work, fact)

    def verdict(self, result: VerifyResult) -> str | None:
        """Act on what the verifier found. Return the job whose checkpoints are to be pruned."""
        with self._core.work() as work:
            fact = work.get(CheckpointFact, result.checkpoint)
            if fact is None:
                return None
            if not result.ok and not result.permanent:
                self._verify(work, fact)
                return None
            if fact.state is CheckpointState.DURABLE:
                if not result.ok and fact.kept:
                    quarantine(work, fact, result.detail)
                return None
            if fact.state is not CheckpointState.UPLOADED:
                return None
            return self._judge(work, fact, result)

    def _judge(self, work: Work, fact: CheckpointFact, result: VerifyResult) -> str | None:
        lease = work.must(LeaseFact, fact.lease)
        job = work.must(JobFact, fact.job)
        detail = result.detail if not result.ok else self._unowned(work, fact, result)
        current = lease.state is LeaseState.ACTIVE and lease.epoch == job.epoch
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
            pinned = job.hardware_class or _class_of(work, lease)
            outputs = fact.id if fact.kind == "outputs" else job.outputs
            work.put(replace(job, hardware_class=pinned, outputs=outputs))
            run = work.get(RunFact, lease.id)
            if run is not None and fact.kind == "checkpoint" and run.step < fact.step:
                work.put(replace(run, step=fact.step))
        if fact.kind == "outputs":
            close_if_due(self._core, work, lease)
        return job.id if durable and fact.kind == "checkpoint" else None

    def _unowned(self, work: Work, fact: CheckpointFact, result: VerifyResult) -> str:
        """Say what of the content the job has no right to: nobody gets a stranger's chunk by
        naming its hash."""
        wanted = {fact.index_sha256, *(result.chunk_sizes or {})}
        mine = work.find(BlobFact, {"scope": fact.job, "sha256": tuple(sorted(wanted))})
        missing = sorted(wanted - {blob.sha256 for blob in mine})
        if missing:
            return f"chunk {missing[0][:10]} was not uploaded for this job; upload it"
        if result.total_bytes != fact.total_bytes:
            return f"it says {fact.total_bytes} bytes, its index lists {result.total_bytes}"
        return ""

    def receipt(self, party: str, envelope: Envelope) -> None:
        """Take up a receipt. Raises DocumentRefused, NotYet."""
        signed = open_document(envelope, Receipt, signed_by=(party,))
        receipt = signed.document
        with self._core.work() as work:
            lease = work.get(LeaseFact, receipt.lease)
            if lease is None or lease.provider != party or receipt.provider != party:
                raise DocumentRefused("it names a lease that is not the sender's", "lease")
            refuse_strangers(envelope, (party, lease.renter))
            chain = work.get(ChainFact, lease.id)
            if chain is None:
                raise DocumentRefused("its lease was never signed", "lease")
            if work.get(ReceiptFact, signed.id) is not None:
                return
            self._bound(party, work.now_ms)
            judgement = self._judge_receipt(work, signed, lease, chain)
            closed = lease.state is LeaseState.CLOSED
            match judgement.admission:
                case Admission.FORK:
                    self._fork(work, signed, lease, chain, judgement)
                case Admission.NEW if not closed:
                    self._append(work, signed, lease, chain)
                case Admission.EARLY if not closed:
                    raise NotYet(f"receipt {receipt.sequence} comes before what it rests on")
                case _ if judgement.detail:
                    work.event(
                        "refused",
                        lease.job,
                        lease=lease.id,
                        epoch=lease.epoch,
                        detail=f"receipt {receipt.sequence}: {judgement.detail}",
                    )
                case _:
                    pass  # Known, or too late: the lease was settled without it.

    def _judge_receipt(
        self, work: Work, signed: Signed[Receipt], lease: LeaseFact, chain: ChainFact
    ) -> Judgement:
        receipt = signed.document
        same = [
            r
            for r in work.find(ReceiptFact, {"lease": lease.id, "sequence": receipt.sequence})
            if r.id not in chain.evidence
        ]
        head = work.get(ReceiptFact, chain.head) if chain.head else None
        checkpoint = (
            work.get(CheckpointFact, receipt.durable_checkpoint)
            if receipt.durable_checkpoint
            else None
        )
        return judge(
            receipt,
            signed.id,
            lease,
            chain,
            same[0] if same else None,
            accepted(head.envelope, Receipt) if head else None,
            checkpoint,
        )

    def _append(
        self, work: Work, signed: Signed[Receipt], lease: LeaseFact, chain: ChainFact
    ) -> None:
        receipt = signed.document
        work.tx.add(_receipt_fact(work, signed, lease))
        work.tally(RECEIPTS, 1)
        work.record(signed.id)
        state = step(CHAIN, chain.state, ChainState.SEALED) if receipt.final else chain.state
        work.put(
            replace(
                chain,
                state=state,
                sequence=receipt.sequence,
                head=signed.id,
                cum_device_ms=receipt.cum_device_ms,
                durable_device_ms=receipt.durable_device_ms,
            )
        )
        work.event(
            "receipt",
            lease.job,
            lease=lease.id,
            epoch=lease.epoch,
            before=chain.state,
            after=state,
            detail=f"receipt {receipt.sequence}: {receipt.cum_device_ms} device-ms, "
            f"{receipt.charge_ucr} ucr",
        )
        if receipt.final:
            close_if_due(self._core, work, lease)

    def _fork(
        self,
        work: Work,
        signed: Signed[Receipt],
        lease: LeaseFact,
        chain: ChainFact,
        judgement: Judgement,
    ) -> None:
        """Keep both histories, go back to where they agree, and end the lease."""
        work.tx.add(_receipt_fact(work, signed, lease))
        work.tally(RECEIPTS, 1)
        work.record(signed.id)
        work.event(
            "receipt",
            lease.job,
            lease=lease.id,
            epoch=lease.epoch,
            before=chain.state,
            after=ChainState.DISPUTED,
            reason=Reason.EVIDENCE_OF_FRAUD,
            detail=judgement.detail,
        )
        if lease.state is LeaseState.CLOSED:
            work.put(replace(chain, evidence=(*chain.evidence, signed.id)))
            return
        held = work.find(ReceiptFact, {"lease": lease.id}, order_by="sequence")
        agreed = [r for r in held if r.sequence <= judgement.agreed and r.id != signed.id]
        contested = [r.id for r in held if r not in agreed and r.id not in chain.evidence]
        head = agreed[-1] if agreed else None
        document = accepted(head.envelope, Receipt) if head else None
        work.put(
            replace(
                chain,
                state=step(CHAIN, chain.state, ChainState.DISPUTED),
                sequence=head.sequence if head else 0,
                head=head.id if head else None,
                cum_device_ms=document.cum_device_ms if document else 0,
                durable_device_ms=document.durable_device_ms if document else 0,
                evidence=(*chain.evidence, *contested),
            )
        )
        close(self._core, work, lease, Reason.EVIDENCE_OF_FRAUD, judgement.detail)


def _receipt_fact(work: Work, signed: Signed[Receipt], lease: LeaseFact) -> ReceiptFact:
    return ReceiptFact(
        signed.id,
        lease.job,
        lease.id,
        signed.document.sequence,
        work.now_ms,
        lease.renter in signed.envelope.signers,
        signed.envelope,
        work.stopwatch_ms,
    )


def _class_of(work: Work, lease: LeaseFact) -> str:
    offer = accepted(work.must(OfferFact, lease.offer).envelope, Offer)
    return next(d.hardware_class for d in offer.devices if d.id == lease.device_ids[0])
