"""Leasing: one job on one offer at one price, under an epoch.

Rules:
- A job has at most one lease that isn't closed; each new one has the next epoch. Whoever holds an
  older epoch is refused by one comparison.
- The price is the offer's. The hold is the most the lease may ever charge: what is left of the
  budget, and no more than the renter accepts without signing again. So every settlement can be made
  at once, whether or not the renter is there.
- A lease is proposed for a short time only: signed by then, or void. Refused and unanswered leases
  cost nobody anything.
- A lease that would not even pay for a minute is not made: the job is paused instead.
"""

from sublet_broker.market.facts import CheckpointFact, JobFact, LeaseFact
from sublet_broker.market.matching import requirements_of
from sublet_contracts.documents import Job, Lease, Offer
from sublet_contracts.rules import minimum_budget_ucr
from sublet_contracts.states import JobState, LeaseState


def hold_ucr(job: JobFact) -> int:
    """Return the most that the job's next lease may charge."""
    return max(0, min(job.budget_ucr - job.settled_ucr, job.accept_ucr - job.accepted_ucr))


def affords_a_lease(job: JobFact, document: Job) -> bool:
    """Say whether what is left pays for a minute at the job's highest price."""
    least = minimum_budget_ucr(document.max_price_ucr_per_device_hour, document.resources.devices)
    return hold_ucr(job) >= least


def why_not_leased(job: JobFact, document: Job, open_leases: int, now_ms: int) -> str | None:
    """Say why this job must not be leased now; None: it may be."""
    if job.state not in (JobState.QUEUED, JobState.RECOVERING) or job.wanted:
        return f"the job is {job.state}"
    if open_leases:
        return "the job has a lease already"
    if job.not_before_ms > now_ms:
        return "the job waits after a failed attempt"
    if job.started_ms is None and document.expires_ms <= now_ms:
        return "the job has expired"
    if not affords_a_lease(job, document):
        return "what is left of the budget does not pay for a minute"
    return None


def lease_document(
    job: JobFact,
    offer: Offer,
    offer_id: str,
    device_ids: tuple[str, ...],
    start: CheckpointFact | None,
    *,
    broker: str,
    fee_bps: int,
    now_ms: int,
    answer_ms: int,
) -> Lease:
    """Return the lease to sign: the job's next epoch on these devices."""
    return Lease(
        broker=broker,
        provider=offer.provider,
        renter=job.renter,
        job=job.id,
        offer=offer_id,
        epoch=job.epoch + 1,
        device_ids=device_ids,
        price_ucr_per_device_hour=offer.price_ucr_per_device_hour,
        fee_bps=fee_bps,
        hold_ucr=hold_ucr(job),
        start_step=start.step if start else 0,
        start_checkpoint=start.id if start else None,
        image=job.image_pinned,
        threads=requirements_of(job).threads_on(offer),
        issued_ms=now_ms,
        answer_by_ms=now_ms + answer_ms,
    )


def is_held(lease: LeaseFact | None, job: JobFact | None, provider: str, epoch: int) -> bool:
    """Say whether `provider` writes under the job's one live lease: the epoch check."""
    return (
        lease is not None
        and job is not None
        and lease.state is not LeaseState.CLOSED
        and lease.provider == provider
        and lease.epoch == epoch == job.epoch
    )
