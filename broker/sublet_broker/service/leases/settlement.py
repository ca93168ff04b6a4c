"""The settlement of a lease: decided by the market, signed, posted and logged."""

from dataclasses import replace

from sublet_broker.market import ledger
from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import (
    ChainFact,
    JobFact,
    LeaseFact,
    ReceiptFact,
    RunFact,
    SettlementFact,
)
from sublet_broker.market.settling import SettlementCase, SettlementDecision, decide
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.amounts import format_credits, format_duration
from sublet_contracts.documents import Receipt, Settlement, sign_document
from sublet_contracts.reasons import MEANINGS, Reason
from sublet_contracts.states import (
    CHAIN,
    ChainState,
    step,
)
from sublet_contracts.wire import SettlementNotice


def pending_of(lease: str) -> str:
    """Return the id of the reservation that covers a lease."""
    return ledger.transfer_id("hold", lease)


def case_of(context: Context, work: UnitOfWork, lease: LeaseFact, reason: Reason) -> SettlementCase:
    """Return what decides the lease's settlement."""
    chain = work.must(ChainFact, lease.id)
    case = SettlementCase(
        lease=lease.id,
        job=lease.job,
        provider=lease.provider,
        price_ucr_per_device_hour=lease.price_ucr_per_device_hour,
        fee_bps=lease.fee_bps,
        hold_ucr=lease.hold_ucr,
        reason=reason,
    )
    if chain.head is None:
        return case
    head = work.must(ReceiptFact, chain.head)
    receipt = accepted(head.envelope, Receipt)
    return replace(
        case,
        receipt=head.id,
        most_device_ms=context.settings.most_device_ms(
            lease,
            work.get(RunFact, lease.id),
            head.received_stopwatch_ms,
            receipt.pull_device_ms,
        ),
        cum_device_ms=receipt.cum_device_ms,
        durable_device_ms=receipt.durable_device_ms,
        countersigned=head.countersigned,
    )


def settle(
    context: Context,
    work: UnitOfWork,
    job: JobFact,
    lease: LeaseFact,
    reason: Reason,
    decision: SettlementDecision | None,
) -> tuple[JobFact, int]:
    """Sign and post the settlement; return the job with what it has spent now, and the charge."""
    case = case_of(context, work, lease, reason)
    if decision is None or (decision.lease, decision.reason) != (lease.id, reason):
        decision = decide(case)
    document = Settlement(
        broker=context.party,
        job=lease.job,
        lease=lease.id,
        epoch=lease.epoch,
        receipt=case.receipt,
        reason=reason,
        fault=MEANINGS[reason].fault,
        accepted_by=decision.accepted_by,
        cum_device_ms=decision.cum_device_ms,
        payable_device_ms=decision.payable_device_ms,
        lost_device_ms=decision.lost_device_ms,
        charged_ucr=decision.charged_ucr,
        fee_ucr=decision.fee_ucr,
        provider_ucr=decision.provider_ucr,
        transfers=decision.transfers,
        issued_ms=work.now_ms,
    )
    signed = sign_document(document, work.key)
    moves = [
        ledger.Move(t.id, t.debit, t.credit, t.amount_ucr, signed.id, f"lease {lease.epoch}")
        for t in decision.transfers
    ]
    work.resolve(pending_of(lease.id), moves)
    work.add(
        SettlementFact(
            signed.id,
            lease.job,
            lease.id,
            lease.provider,
            lease.renter,
            reason,
            work.now_ms,
            signed.envelope,
        )
    )
    work.record(signed.id)
    chain = work.must(ChainFact, lease.id)
    work.put(replace(chain, state=step(CHAIN, chain.state, ChainState.SETTLED)))
    work.event(
        "money",
        lease.job,
        lease=lease.id,
        epoch=lease.epoch,
        before=chain.state,
        after="settled",
        reason=reason,
        detail=f"{format_credits(decision.charged_ucr)} charged for "
        f"{format_duration(decision.payable_device_ms)} of device time"
        + (f"; {format_duration(decision.lost_device_ms)} free" if decision.lost_device_ms else ""),
    )
    work.send(lease.provider, SettlementNotice(settlement=signed.envelope))
    spent = replace(
        job,
        settled_ucr=job.settled_ucr + decision.charged_ucr,
        accepted_ucr=job.accepted_ucr
        + (decision.charged_ucr if decision.accepted_by == "job" else 0),
    )
    return spent, decision.charged_ucr
