"""Succession: while a run is silent, another machine gets ready for its job.

The successor is told to pull the image and to restore the newest durable checkpoint, and its
devices are kept back for it (candidates.entry_of). It costs a notice; a loss then costs only its
detection.
"""

from collections.abc import Sequence
from dataclasses import replace

from sublet_broker.market.accepted import accepted
from sublet_broker.market.checkpointing import resume_point
from sublet_broker.market.facts import CheckpointFact, JobFact, LeaseFact, RunFact
from sublet_broker.market.matching import Requirements, fits, requirements_of
from sublet_broker.service.leases.candidates import entry_of, open_offer
from sublet_broker.service.leases.open_offers import OpenOffers
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.documents import Offer
from sublet_contracts.states import CheckpointState, RunState
from sublet_contracts.wire import Prepare, Unprepare

CANDIDATES = 5
"""How many offers are looked at for a successor before the next sweep."""


def newest_durable(work: UnitOfWork, job: str) -> CheckpointFact | None:
    """Return the checkpoint from which the job would go on."""
    durable = {"job": job, "kind": "checkpoint", "state": CheckpointState.DURABLE, "kept": True}
    return resume_point(work.find(CheckpointFact, durable))


def prepare_successor(
    open_offers: OpenOffers,
    work: UnitOfWork,
    lease: LeaseFact,
    run: RunFact,
    *,
    without: str = "",
) -> RunFact:
    """Choose a successor for a run that has fallen silent, if it has none. `without`: a provider
    that has said it can't.

    The offers in memory propose, and each that is looked at is judged by the facts once more. Where
    none holds, the next sweep tries again.
    """
    if run.successor or run.state is not RunState.UNKNOWN:
        return run
    job = work.must(JobFact, lease.job)
    if job.wanted:
        return run
    requirements = replace(requirements_of(job), avoid=(*job.avoid, lease.provider), prefer="")
    provider = _choose(open_offers, work, requirements, (lease.provider, without))
    if provider is None:
        return run
    _ask(work, provider, job)
    work.touch_offer(provider)
    work.event(
        "successor",
        job.id,
        lease=lease.id,
        epoch=lease.epoch,
        after="preparing",
        detail=f"{provider} prepares to take over",
    )
    return work.put_run(run, replace(run, successor=provider))


def _choose(
    open_offers: OpenOffers, work: UnitOfWork, requirements: Requirements, excluded: Sequence[str]
) -> str | None:
    for entry in open_offers.candidates(requirements, CANDIDATES + len(excluded)):
        provider = entry.offer.provider
        offer = open_offer(work.tx, provider, work.now_ms)
        if provider in excluded or offer is None:
            continue
        terms = accepted(offer.envelope, Offer)
        if not fits(requirements, terms, entry_of(work.tx, offer, work.now_ms).free_device_ids):
            return provider
    return None


def ask_again(work: UnitOfWork, provider: str) -> None:
    """Tell a provider that has just joined what it is to prepare: the first notice may be lost."""
    for run in work.find(RunFact, {"successor": provider}):
        _ask(work, provider, work.must(JobFact, run.job))


def _ask(work: UnitOfWork, provider: str, job: JobFact) -> None:
    start = newest_durable(work, job.id)
    checkpoint = start.envelope if start else None
    notice = Prepare(job=job.envelope, checkpoint=checkpoint, image=job.image_pinned)
    work.notice(provider, notice)


def release_successor(work: UnitOfWork, run: RunFact) -> None:
    """Tell a successor that it isn't needed. The caller puts the run without it."""
    if run.successor:
        work.notice(run.successor, Unprepare(job=run.job))
        work.touch_offer(run.successor)
