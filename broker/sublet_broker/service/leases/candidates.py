"""The book as the database has it: shards rebuild from it, the scheduler checks against it."""

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import AgentFact, JobFact, LeaseFact, OfferFact, RunFact
from sublet_broker.market.matching import BookEntry
from sublet_broker.market.offers import free_devices
from sublet_broker.market.resuming import wants_machine
from sublet_broker.service.ports import Transaction
from sublet_contracts.documents import Offer
from sublet_contracts.states import JobState, LeaseState

LIVE_LEASE = (LeaseState.PROPOSED, LeaseState.ACTIVE)


def open_offer(tx: Transaction, provider: str, now_ms: int) -> OfferFact | None:
    """Return the provider's offer if it can be leased: open, not expired, its agent connected."""
    agent = tx.get(AgentFact, provider)
    if agent is None or not agent.connected or agent.offer is None:
        return None
    offer = tx.get(OfferFact, agent.offer)
    return offer if offer is not None and offer.open and offer.expires_ms > now_ms else None


def entry_of(tx: Transaction, offer: OfferFact, for_job: str = "") -> BookEntry:
    """Return the offer with what is free of it (for `for_job`, which its own hold doesn't bar)."""
    document = accepted(offer.envelope, Offer)
    leases = tx.find(LeaseFact, {"provider": offer.provider, "state": LIVE_LEASE})
    waiting = tx.find(RunFact, {"successor": offer.provider})
    held: list[int] = []
    for run in waiting:
        lease = tx.get(LeaseFact, run.id)
        if lease is not None and run.job != for_job:
            held.append(len(lease.device_ids))
    return BookEntry(offer, free_devices(document, leases, held))


def load_offers(tx: Transaction, now_ms: int) -> list[BookEntry]:
    """Return all offers that can be leased, with what is free of them."""
    connected = {a.id: a.offer for a in tx.find(AgentFact, {"connected": True})}
    return [
        entry_of(tx, offer)
        for offer in tx.find(OfferFact, {"open": True})
        if offer.expires_ms > now_ms and connected.get(offer.provider) == offer.id
    ]


def is_queued(tx: Transaction, job: JobFact) -> bool:
    """Say whether the job wants a machine."""
    return wants_machine(job, tx.find(LeaseFact, {"job": job.id, "state": LIVE_LEASE}))


def load_order_book(tx: Transaction, now_ms: int) -> tuple[list[BookEntry], list[JobFact]]:
    """Return everything that shards hold: the offers, and the jobs in line."""
    waiting = tx.find(JobFact, {"state": (JobState.QUEUED, JobState.RECOVERING)})
    return load_offers(tx, now_ms), [job for job in waiting if is_queued(tx, job)]
