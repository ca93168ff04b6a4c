"""Receipts that agents sign: each extends its lease's chain, or is evidence against its signer."""

from dataclasses import replace

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import (
    ChainFact,
    CheckpointFact,
    LeaseFact,
    ReceiptFact,
)
from sublet_broker.market.metering import Admission, Judgement, judge
from sublet_broker.service.errors import NotYet
from sublet_broker.service.leases.closing import close, close_if_due
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.signed_input import refuse_strangers
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.amounts import format_credits, format_duration
from sublet_contracts.documents import (
    DocumentRefused,
    Receipt,
    Signed,
    open_document,
)
from sublet_contracts.envelope import Envelope
from sublet_contracts.reasons import Reason
from sublet_contracts.states import CHAIN, ChainState, LeaseState, step


def _receipt_fact(work: UnitOfWork, signed: Signed[Receipt], lease: LeaseFact) -> ReceiptFact:
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


class Receipts:
    """The chains of receipts."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def receipt(self, party: str, envelope: Envelope) -> None:
        """Take up a receipt. Raises DocumentRefused, NotYet."""
        signed = open_document(envelope, Receipt, signed_by=(party,))
        receipt = signed.document
        with self._context.work() as work:
            lease = work.get(LeaseFact, receipt.lease)
            if lease is None or lease.provider != party or receipt.provider != party:
                raise DocumentRefused("it names a lease that is not the sender's", "lease")
            refuse_strangers(envelope, (party, lease.renter))
            chain = work.get(ChainFact, lease.id)
            if chain is None:
                raise DocumentRefused("its lease was never signed", "lease")
            if work.get(ReceiptFact, signed.id) is not None:
                return
            most = self._context.settings.max_reports_an_hour
            self._context.rate_limits.defer("reports", party, most, work.now_ms)
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
        self, work: UnitOfWork, signed: Signed[Receipt], lease: LeaseFact, chain: ChainFact
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
        self, work: UnitOfWork, signed: Signed[Receipt], lease: LeaseFact, chain: ChainFact
    ) -> None:
        receipt = signed.document
        work.add(_receipt_fact(work, signed, lease))
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
            detail=f"receipt {receipt.sequence}: {format_duration(receipt.cum_device_ms)} of "
            f"device time, {format_credits(receipt.charge_ucr)}",
        )
        if receipt.final:
            close_if_due(self._context, work, lease)

    def _fork(
        self,
        work: UnitOfWork,
        signed: Signed[Receipt],
        lease: LeaseFact,
        chain: ChainFact,
        judgement: Judgement,
    ) -> None:
        """Keep both histories, go back to where they agree, and end the lease."""
        work.add(_receipt_fact(work, signed, lease))
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
        close(self._context, work, lease, Reason.EVIDENCE_OF_FRAUD, judgement.detail)
