"""Who may be leased, as the database has it: shards rebuild from it, the scheduler checks by it."""

from collections import defaultdict
from collections.abc import Collection

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import AgentFact, JobFact, LeaseFact, OfferFact, RunFact
from sublet_broker.market.matching import BookEntry
from sublet_broker.market.offers import free_devices
from sublet_broker.market.resuming import wants_machine
from sublet_broker.market.setting_aside import is_set_aside
from sublet_broker.service.ports import Transaction
from sublet_contracts.documents import Offer
from sublet_contracts.states import JobState, LeaseState

PROVIDERS_AT_ONCE = 200
LIVE_LEASE = (LeaseState.PROPOSED, LeaseState.ACTIVE)


def open_offer(tx: Transaction, provider: str, now_ms: int) -> OfferFact | None:
    """Return the provider's offer if it can be leased: open, not expired, its agent connected."""
    agent = tx.get(AgentFact, provider)
    if agent is None or not agent.connected or agent.offer is None:
        return None
    offer = tx.get(OfferFact, agent.offer)
    return offer if offer is not None and offer.open and offer.expires_ms > now_ms else None


def entry_of(tx: Transaction, offer: OfferFact, now_ms: int, for_job: str = "") -> BookEntry:
    """Return the offer with what is free of it (for `for_job`, which its own hold doesn't bar)."""
    agent = tx.get(AgentFact, offer.provider)
    if agent is None or is_set_aside(agent, now_ms):
        return BookEntry(offer, ())
    document = accepted(offer.envelope, Offer)
    leases = tx.find(LeaseFact, {"provider": offer.provider, "state": LIVE_LEASE})
    waiting = tx.find(RunFact, {"successor": offer.provider})
    held: list[int] = []
    for run in waiting:
        lease = tx.get(LeaseFact, run.id)
        if lease is not None and run.job != for_job:
            held.append(len(lease.device_ids))
    return BookEntry(offer, free_devices(document, leases, held))


def load_entries(
    tx: Transaction, providers: Collection[str], now_ms: int | None
) -> dict[str, BookEntry | None]:
    """Return for each of these providers its offer with what is free of it; None: it has none that
    can be leased. Five questions by key, however many they are. `now_ms`: None where nobody knows
    the time; then none is left out for it, and whoever leases looks at it once more."""
    agents = tx.find(AgentFact, {"id": tuple(providers), "connected": True})
    ids = tuple(agent.offer for agent in agents if agent.offer is not None)
    aside = {a.id for a in agents if now_ms is not None and is_set_aside(a, now_ms)}
    offers = {
        offer.provider: offer
        for offer in tx.find(OfferFact, {"id": ids})
        if offer.open and (now_ms is None or offer.expires_ms > now_ms)
    }
    taken = defaultdict[str, list[LeaseFact]](list)
    for lease in tx.find(LeaseFact, {"provider": tuple(offers), "state": LIVE_LEASE}):
        taken[lease.provider].append(lease)
    waiting = tx.find(RunFact, {"successor": tuple(offers)})
    leases = {
        lease.id: lease for lease in tx.find(LeaseFact, {"id": tuple(run.id for run in waiting)})
    }
    held = defaultdict[str, list[int]](list)
    for run in waiting:
        if run.id in leases:
            held[run.successor].append(len(leases[run.id].device_ids))
    entries: dict[str, BookEntry | None] = dict.fromkeys(providers)
    for provider, offer in offers.items():
        document = accepted(offer.envelope, Offer)
        free = free_devices(document, taken[provider], held[provider])
        free = () if provider in aside else free
        entries[provider] = BookEntry(offer, free)
    return entries


def load_offers(tx: Transaction, now_ms: int | None) -> list[BookEntry]:
    """Return all offers that can be leased, with what is free of them: for a start, never for one
    request."""
    connected = [agent.id for agent in tx.find(AgentFact, {"connected": True})]
    entries: list[BookEntry] = []
    for start in range(0, len(connected), PROVIDERS_AT_ONCE):
        some = load_entries(tx, connected[start : start + PROVIDERS_AT_ONCE], now_ms)
        entries += [entry for entry in some.values() if entry is not None]
    return entries


def is_queued(tx: Transaction, job: JobFact) -> bool:
    """Say whether the job wants a machine."""
    return wants_machine(job, tx.find(LeaseFact, {"job": job.id, "state": LIVE_LEASE}))


def load_order_book(tx: Transaction, now_ms: int | None) -> tuple[list[BookEntry], list[JobFact]]:
    """Return everything that shards hold: the offers, and the queued jobs."""
    return load_offers(tx, now_ms), load_queued_jobs(tx)


def load_queued_jobs(tx: Transaction) -> list[JobFact]:
    """Return all jobs that want a machine: for a start, never for one request."""
    waiting = tx.find(JobFact, {"state": (JobState.QUEUED, JobState.RECOVERING)})
    return [job for job in waiting if is_queued(tx, job)]
