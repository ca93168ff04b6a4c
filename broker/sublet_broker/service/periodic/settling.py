"""Billing: settlements that waited for something, and the renter's signature on receipts."""

from dataclasses import replace

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import ChainFact, JobFact, LeaseFact, ReceiptFact, RunFact
from sublet_broker.market.facts import SettlementFact as Settled
from sublet_broker.market.settling import SettlementCase, SettlementDecision, decide
from sublet_broker.service.errors import not_found
from sublet_broker.service.leases.closing import case_of, close_if_due, due
from sublet_broker.service.ports import MatcherAway
from sublet_broker.service.unit_of_work.context import Core
from sublet_broker.service.unit_of_work.signed_input import as_refusal, merge, receive_document
from sublet_broker.service.unit_of_work.unit_of_work import Work
from sublet_contracts.documents import DocumentRefused, Receipt, Settlement
from sublet_contracts.envelope import Envelope
from sublet_contracts.states import LeaseState, RunState

BATCH = 16
"""From so many on it is worth handing the arithmetic to the settler."""


class Billing:
    """What is paid."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def settle_due(self) -> int:
        """Close the leases whose runs have ended and whose last papers came, or no longer come.

        Most are closed by the message that completes them; this is for the rest. Returns how many.
        """
        ended = self._core.dirty.ended
        # Taken before they are read, so that one which ends meanwhile is not taken off unseen.
        taken = [id for id in list(ended) if ended.pop(id, id) is None]
        if not taken:
            return 0
        try:
            with self._core.read() as look:
                cases = self._cases(look, taken)
        except BaseException:
            ended.update(dict.fromkeys(taken))
            raise
        if not cases:
            return 0
        decided = self._decide(list(cases.values()))
        closed = 0
        for id, case in cases.items():
            with self._core.work() as work:
                lease = work.must(LeaseFact, id)
                # What was decided outside counts only if nothing has come in since.
                same = lease.state is LeaseState.ACTIVE and case == case_of(
                    self._core, work, lease, case.reason
                )
                closed += close_if_due(self._core, work, lease, decided.get(id) if same else None)
        return closed

    def _cases(self, look: Work, leases: list[str]) -> dict[str, SettlementCase]:
        cases: dict[str, SettlementCase] = {}
        for id in leases:
            lease, run = look.must(LeaseFact, id), look.must(RunFact, id)
            if lease.state is not LeaseState.ACTIVE or run.state is not RunState.EXITED:
                continue
            self._core.dirty.ended[id] = None  # Looked at again, until it is closed.
            why = due(self._core, look, lease, run)
            if why is not None:
                cases[lease.id] = case_of(self._core, look, lease, why[0])
        return cases

    def _decide(self, cases: list[SettlementCase]) -> dict[str, SettlementDecision]:
        settler = self._core.ports.settler
        if settler is not None and len(cases) >= BATCH:
            try:
                return {decision.lease: decision for decision in settler.decide(cases)}
            except MatcherAway:
                pass  # Money doesn't wait for the engine: decided here.
        return {case.lease: decide(case) for case in cases}

    def countersign(self, caller: str, receipt_id: str, envelope: Envelope) -> None:
        """Keep the renter's signature on a receipt: its charge no longer counts against what the
        job accepts in advance."""
        try:
            with self._core.work() as work:
                fact = work.get(ReceiptFact, receipt_id)
                job = work.get(JobFact, fact.job) if fact else None
                if fact is None or job is None or job.renter != caller:
                    raise not_found("receipt", receipt_id)
                if envelope.id != fact.id:
                    raise DocumentRefused("another receipt was signed", "envelope")
                provider = accepted(fact.envelope, Receipt).provider
                receive_document(
                    self._core, envelope, Receipt, signed_by=(caller,), also_by=(provider,)
                )
                if not fact.countersigned:
                    self._countersign(work, fact, job, envelope)
        except DocumentRefused as error:
            raise as_refusal(error) from error

    def _countersign(self, work: Work, fact: ReceiptFact, job: JobFact, envelope: Envelope) -> None:
        both = merge(fact.envelope, envelope)
        work.put(replace(fact, countersigned=True, envelope=both))
        work.event(
            "receipt",
            job.id,
            lease=fact.lease,
            after="countersigned",
            detail=f"receipt {fact.sequence} is signed by the renter too",
        )
        settled = work.find(Settled, {"lease": fact.lease})
        chain = work.must(ChainFact, fact.lease)
        if settled and chain.head == fact.id:
            settlement = accepted(settled[0].envelope, Settlement)
            if settlement.accepted_by == "job":
                work.put_job(
                    job, replace(job, accepted_ucr=job.accepted_ucr - settlement.charged_ucr)
                )
