"""The renter's signature on receipts."""

from dataclasses import replace

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import (
    ChainFact,
    JobFact,
    ReceiptFact,
    SettlementFact,
)
from sublet_broker.service.errors import not_found
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.signed_input import as_refusal, merge, receive_document
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.documents import DocumentRefused, Receipt, Settlement
from sublet_contracts.envelope import Envelope


class Countersigning:
    """Receipts, signed by the renter too."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def countersign(self, caller: str, receipt_id: str, envelope: Envelope) -> None:
        """Keep the renter's signature on a receipt: its charge no longer counts against what the
        job accepts in advance."""
        try:
            with self._context.work() as work:
                fact = work.get(ReceiptFact, receipt_id)
                job = work.get(JobFact, fact.job) if fact else None
                if fact is None or job is None or job.renter != caller:
                    raise not_found("receipt", receipt_id)
                if envelope.id != fact.id:
                    raise DocumentRefused("another receipt was signed", "envelope")
                provider = accepted(fact.envelope, Receipt).provider
                receive_document(
                    self._context, envelope, Receipt, signed_by=(caller,), also_by=(provider,)
                )
                if not fact.countersigned:
                    self._countersign(work, fact, job, envelope)
        except DocumentRefused as error:
            raise as_refusal(error) from error

    def _countersign(
        self, work: UnitOfWork, fact: ReceiptFact, job: JobFact, envelope: Envelope
    ) -> None:
        both = merge(fact.envelope, envelope)
        work.put(replace(fact, countersigned=True, envelope=both))
        work.event(
            "receipt",
            job.id,
            lease=fact.lease,
            after="countersigned",
            detail=f"receipt {fact.sequence} is signed by the renter too",
        )
        settled = work.find(SettlementFact, {"lease": fact.lease})
        chain = work.must(ChainFact, fact.lease)
        if settled and chain.head == fact.id:
            settlement = accepted(settled[0].envelope, Settlement)
            if settlement.accepted_by == "job":
                work.put_job(
                    job, replace(job, accepted_ucr=job.accepted_ucr - settlement.charged_ucr)
                )
