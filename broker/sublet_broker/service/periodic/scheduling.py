"""Scheduling: shards propose, one transaction commits.

A tick tells the match engine what has changed since the last one, asks it for proposals, and makes
leases of those that still hold: the same `fits`, the shard's epoch, the devices still free, the job
still queued. Of several proposals for one job (one from each pool) the best is taken. A proposal
that doesn't hold costs nothing: the engine is told how things are.
"""

from collections import deque
from dataclasses import replace

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import JobFact, LeaseFact, OfferFact, ShardFact
from sublet_broker.market.leasing import lease_document, why_not_leased
from sublet_broker.market.ledger import held
from sublet_broker.market.losses import loss_every_ms
from sublet_broker.market.matching import BookEntry, fits, requirements_of
from sublet_broker.service.leases.candidates import (
    LIVE_LEASE,
    PROVIDERS_AT_ONCE,
    entry_of,
    is_queued,
    load_entries,
    load_queued_jobs,
    open_offer,
)
from sublet_broker.service.leases.settlement import pending_of
from sublet_broker.service.leases.standby import newest_durable
from sublet_broker.service.ports import MatcherAway, Proposal
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.tallies import LEASED_MACHINE_MS, LOSSES
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.documents import Job, Offer, sign_document
from sublet_contracts.states import JOB, JobState, LeaseState, step
from sublet_contracts.wire import Assign

BATCH = 32


class Scheduling:
    """From proposals to leases."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._known_offers: dict[str, tuple[str, str]] = {}
        """Per provider the offer (and its pool) that the engine has."""
        self.matcher_away = False
        self._line_known = False
        self.waited_ms: deque[int] = deque(maxlen=1000)
        """How long the latest leases' jobs were queued."""

    def tick(self) -> int:
        """Let the engine match. Return how many leases were made. One caller at a time."""
        try:
            if self.matcher_away:
                self._context.ports.matcher.rebuild()
            self._tell_changes()
            proposals = self._context.ports.matcher.propose(self._context.ports.clock.now_ms())
            self.matcher_away = False
        except MatcherAway:
            self.matcher_away = True
            return 0
        best = self._best(proposals)
        made = 0
        for start in range(0, len(best), BATCH):
            with self._context.work() as work:
                for proposal in best[start : start + BATCH]:
                    made += self._commit(work, proposal)
        if made:
            self._tell_changes()
        return made

    def _know_line(self) -> None:
        """Once after a start: who waits already."""
        with self._context.read() as snapshot:
            for job in load_queued_jobs(snapshot.tx):
                self._context.waiting_line.put(job)
        self._line_known = True

    def _tell_changes(self) -> None:
        """Bring the engine up to date with what has changed."""
        if not self._line_known:
            self._know_line()
        dirty = self._context.dirty
        providers, jobs = list(dirty.providers), list(dirty.jobs)
        if not providers and not jobs:
            return
        for provider in providers:
            dirty.providers.pop(provider, None)
        for job in jobs:
            dirty.jobs.pop(job, None)
        try:
            with self._context.read() as snapshot:
                offers = self._read_offers(snapshot, providers)
                queued = self._read_jobs(snapshot, jobs)
            for provider, entry in offers.items():
                self._tell_offer(provider, entry)
            for id, queued_job in queued.items():
                if queued_job is not None:
                    self._context.waiting_line.put(queued_job)
                    self._context.ports.matcher.job_queued(queued_job)
                else:
                    self._context.waiting_line.remove(id)
                    self._context.ports.matcher.job_gone(id)
        except Exception:
            # Told again: once the engine has come back and rebuilt, or the database answers.
            dirty.providers.update(dict.fromkeys(providers))
            dirty.jobs.update(dict.fromkeys(jobs))
            raise

    def _read_offers(
        self, snapshot: UnitOfWork, providers: list[str]
    ) -> dict[str, BookEntry | None]:
        entries: dict[str, BookEntry | None] = {}
        for start in range(0, len(providers), PROVIDERS_AT_ONCE):
            some = providers[start : start + PROVIDERS_AT_ONCE]
            entries |= load_entries(snapshot.tx, some, snapshot.now_ms)
        return entries

    def _read_jobs(self, snapshot: UnitOfWork, jobs: list[str]) -> dict[str, JobFact | None]:
        """Return those of these jobs that are queued; None: that one wants no machine."""
        queued: dict[str, JobFact | None] = {}
        for id in jobs:
            job = snapshot.get(JobFact, id)
            queued[id] = job if job is not None and is_queued(snapshot.tx, job) else None
        return queued

    def _tell_offer(self, provider: str, entry: BookEntry | None) -> None:
        matcher = self._context.ports.matcher
        known = self._known_offers.get(provider)
        if known is not None and (entry is None or entry.offer.id != known[0]):
            matcher.offer_gone(*known)
            del self._known_offers[provider]
        if entry is not None:
            self._known_offers[provider] = (entry.offer.id, entry.offer.pool)
            matcher.offer_changed(entry)

    def _best(self, proposals: list[Proposal]) -> list[Proposal]:
        """Return one proposal for each job, in the engine's order of jobs."""
        if not proposals:
            return []
        ranked: dict[str, tuple[tuple[bool, bool, int, str], Proposal]] = {}
        with self._context.read() as snapshot:
            for proposal in proposals:
                job = snapshot.get(JobFact, proposal.job)
                offer = snapshot.get(OfferFact, proposal.offer)
                if job is None or offer is None:
                    continue
                price = accepted(offer.envelope, Offer).price_ucr_per_device_hour
                rank = (
                    offer.provider != job.prefer,
                    offer.provider in job.avoid,
                    price,
                    offer.id,
                )
                if proposal.job not in ranked or rank < ranked[proposal.job][0]:
                    ranked[proposal.job] = (rank, proposal)
        return [proposal for _, proposal in ranked.values()]

    def _commit(self, work: UnitOfWork, proposal: Proposal) -> bool:
        """Make a lease of a proposal, if it holds."""
        work.touch_job(proposal.job)
        shard = work.get(ShardFact, proposal.pool)
        if shard is not None and shard.epoch != proposal.shard_epoch:
            return False
        offer = work.get(OfferFact, proposal.offer)
        job = work.get(JobFact, proposal.job)
        if offer is None or job is None:
            return False
        work.touch_offer(offer.provider)
        if open_offer(work.tx, offer.provider, work.now_ms) != offer:
            # A shard that was rebuilt may have read an offer that nobody told of: nor would anybody
            # tell that it has gone, and it would hold up every job that it fits.
            matcher = self._context.ports.matcher
            work.tx.after_commit(lambda: matcher.offer_gone(offer.id, offer.pool))
            return False
        open_leases = work.tx.count(LeaseFact, {"job": job.id, "state": LIVE_LEASE})
        document = accepted(job.envelope, Job)
        if why_not_leased(job, document, open_leases, work.now_ms) is not None:
            return False
        free = entry_of(work.tx, offer, work.now_ms, job.id).free_device_ids
        chosen = tuple(id for id in proposal.device_ids if id in free)
        asked = document.resources.devices
        if len(set(chosen)) != asked or len(proposal.device_ids) != asked:
            return False
        terms = accepted(offer.envelope, Offer)
        if fits(requirements_of(job), terms, chosen):
            return False
        self._lease(work, job, offer, terms, chosen)
        return True

    def _lease(
        self,
        work: UnitOfWork,
        job: JobFact,
        offer: OfferFact,
        terms: Offer,
        chosen: tuple[str, ...],
    ) -> None:
        start = newest_durable(work, job.id)
        document = lease_document(
            job,
            terms,
            offer.id,
            chosen,
            start,
            broker=self._context.party,
            fee_bps=self._context.settings.fee_bps,
            now_ms=work.now_ms,
            answer_ms=self._context.settings.answer_ms,
        )
        signed = sign_document(document, work.key)
        work.reserve(pending_of(signed.id), held(job.id), document.hold_ucr, signed.id)
        lease = LeaseFact(
            id=signed.id,
            job=job.id,
            offer=offer.id,
            provider=offer.provider,
            renter=job.renter,
            epoch=document.epoch,
            state=LeaseState.PROPOSED,
            device_ids=chosen,
            price_ucr_per_device_hour=document.price_ucr_per_device_hour,
            fee_bps=document.fee_bps,
            hold_ucr=document.hold_ucr,
            start_step=document.start_step,
            start_checkpoint=document.start_checkpoint,
            answer_by_ms=document.answer_by_ms,
            proposed_ms=work.now_ms,
            proposed_stopwatch_ms=work.stopwatch_ms,
            envelope=signed.envelope,
        )
        work.add(lease)
        queued = job.state is JobState.QUEUED
        state = step(JOB, job.state, JobState.STARTING) if queued else job.state
        leased = replace(job, state=state, epoch=document.epoch, prefer="")
        work.put_job(job, leased, lease=lease.id)
        work.event(
            "lease",
            job.id,
            lease=lease.id,
            epoch=lease.epoch,
            after=lease.state,
            detail=f"{', '.join(chosen)} of {offer.provider}, from step {lease.start_step}",
        )
        work.send(
            offer.provider,
            Assign(
                lease=signed.envelope,
                job=job.envelope,
                checkpoint=start.envelope if start else None,
                loss_every_ms=loss_every_ms(work.tally(LEASED_MACHINE_MS), work.tally(LOSSES)),
            ),
        )
        since_ms = max(job.submitted_ms, job.not_before_ms)
        work.tx.after_commit(lambda: self.waited_ms.append(max(0, work.now_ms - since_ms)))
