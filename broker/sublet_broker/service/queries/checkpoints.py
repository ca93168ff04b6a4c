"""A job's checkpoints as its renter sees them, a page at a time.

A page ends at a moment, and has all that came at it: so the next one begins there, and leaves none
out however many came in the same millisecond.
"""

from typing import Any

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import CheckpointFact, JobFact, LeaseFact, OfferFact, PartyFact
from sublet_broker.service.leases.standby import newest_durable
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.api import CheckpointsPage, CheckpointView
from sublet_contracts.documents import Offer
from sublet_contracts.states import JOB, CheckpointState, is_terminal


def checkpoints_page(
    snapshot: UnitOfWork,
    job: JobFact,
    *,
    kind: str | None,
    before_ms: int | None,
    limit: int,
    until_ms: int | None,
) -> CheckpointsPage:
    """Return those before a moment, newest first: `limit` of them, and what came at the same moment
    as the last. `until_ms`: until when the content of an ended job is kept."""
    where: dict[str, Any] = {"job": job.id, **({"kind": kind} if kind else {})}
    page = snapshot.find(
        CheckpointFact,
        where,
        before=None if before_ms is None else ("created_ms", before_ms),
        order_by="created_ms",
        descending=True,
        limit=limit,
    )
    next_before_ms = None
    if len(page) == limit:
        next_before_ms = page[-1].created_ms
        last = snapshot.find(CheckpointFact, {**where, "created_ms": next_before_ms})
        page = [c for c in page if c.created_ms > next_before_ms] + last
    resumes_from = None if is_terminal(JOB, job.state) else newest_durable(snapshot, job.id)
    providers: dict[str, tuple[str, str]] = {}

    def view(fact: CheckpointFact) -> CheckpointView:
        if fact.lease not in providers:
            providers[fact.lease] = _provider(snapshot, fact.lease)
        return _view(fact, *providers[fact.lease], until_ms)

    return CheckpointsPage(
        checkpoints=tuple(view(c) for c in page),
        next_before_ms=next_before_ms,
        total=snapshot.tx.count(CheckpointFact, where),
        resumes_from=None if resumes_from is None else view(resumes_from),
    )


def _provider(snapshot: UnitOfWork, lease_id: str) -> tuple[str, str]:
    """Return who holds or held a lease: party and name."""
    lease = snapshot.must(LeaseFact, lease_id)
    offer = accepted(snapshot.must(OfferFact, lease.offer).envelope, Offer)
    party = snapshot.get(PartyFact, lease.provider)
    return lease.provider, offer.name or (party.name if party else "")


def _view(
    fact: CheckpointFact, provider: str, provider_name: str, until_ms: int | None
) -> CheckpointView:
    durable_after_ms = None
    if fact.durable_ms is not None:
        durable_after_ms = fact.took_ms + max(0, fact.durable_ms - fact.created_ms)
    gone = fact.state is CheckpointState.DURABLE and not fact.kept
    return CheckpointView(
        id=fact.id,
        kind=fact.kind,
        step=fact.step,
        epoch=fact.epoch,
        provider=provider,
        provider_name=provider_name,
        state=fact.state,
        index_digest=fact.index_digest,
        total_bytes=fact.total_bytes,
        sent_bytes=fact.sent_bytes,
        stall_ms=fact.stall_ms,
        created_ms=fact.created_ms,
        durable_ms=fact.durable_ms,
        durable_after_ms=durable_after_ms,
        detail="its content is no longer kept" if gone else fact.detail,
        kept=fact.kept,
        kept_until_ms=until_ms if fact.kept else None,
    )
