"""Matching: which job goes on which offer, and why one doesn't.

Rules:
- `fits` is the only judge (its constraints are contracts' requirements.py, by which the agent
  judges too). A shard proposes by it, the scheduler commits by it, and a refusal is explained by
  it; a non-match always names the constraints that fail.
- Of the offers that fit: first the provider that prepared to take the job over; then those that
  haven't failed it; among those the cheapest; then the smallest machine that does; then by id.
- Jobs are served in the order: those that have lost their machine, then by age, then by id.
- The same facts give the same proposals, whatever order they came in.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import JobFact, OfferFact
from sublet_broker.market.offers import MIXED
from sublet_contracts.documents import Job, Offer
from sublet_contracts.requirements import (
    Constraint,
    MachineRequirements,
    Shortfall,
    choose_devices,
    ease,
    shortfalls,
)


@dataclass(frozen=True)
class BookEntry:
    """An offer with what is free of it, as a shard keeps it."""

    offer: OfferFact
    free_device_ids: tuple[str, ...]


@dataclass(frozen=True)
class Requirements(MachineRequirements):
    """What a job asks of the market: of a machine, and whose machines it would rather have."""

    avoid: tuple[str, ...] = ()
    prefer: str = ""


@dataclass(frozen=True)
class Match:
    """A job on an offer's devices."""

    job: str
    offer: str
    device_ids: tuple[str, ...]


def requirements_of(job: JobFact) -> Requirements:
    """Return what the job asks for now, with what it is pinned to since it began."""
    document = accepted(job.envelope, Job)
    return Requirements(
        renter=job.renter,
        resources=document.resources,
        max_price_ucr_per_device_hour=document.max_price_ucr_per_device_hour,
        image=document.image,
        pinned_class=job.hardware_class,
        pinned_threads=job.threads,
        avoid=job.avoid,
        prefer=job.prefer,
    )


def fits(requirements: Requirements, offer: Offer, free: Sequence[str]) -> list[Shortfall]:
    """Return the constraints that this offer fails; none: it fits. BUSY comes alone: the machine
    would do, and is taken at the moment."""
    found = shortfalls(requirements, offer, offer.devices)
    if not found and pick_devices(requirements, offer, free) is None:
        found.append(Shortfall(Constraint.BUSY, len(free), requirements.resources.devices))
    return found


def pick_devices(
    requirements: Requirements, offer: Offer, free: Sequence[str]
) -> tuple[str, ...] | None:
    """Return the devices that the job would get: all of one class, the smallest that suffice."""
    available = set(free)
    return choose_devices(requirements, [d for d in offer.devices if d.id in available])


def pool_may_hold(requirements: Requirements, pool: str) -> bool:
    """Say whether a pool can have an offer for this wish at all."""
    hardware_class, _, region = pool.partition("@")
    if requirements.hardware_class and hardware_class not in (requirements.hardware_class, MIXED):
        return False
    return requirements.resources.region in ("", region)


@dataclass
class Explanation:
    """What a job would get, and where it gets nothing, why."""

    fitting: list[BookEntry] = field(default_factory=list)
    busy: list[BookEntry] = field(default_factory=list)
    considered: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """Constraint -> offers that fail on it."""
    relax: tuple[Shortfall, ...] = ()
    """All that the offer lacks that is nearest to fitting, the hardest to change first."""

    @property
    def some_offer_could(self) -> bool:
        """Whether some machine on the market would do, busy or not."""
        return bool(self.fitting or self.busy)


def explain(requirements: Requirements, entries: Iterable[BookEntry]) -> Explanation:
    """Judge all of `entries`. Where none fits, `relax` is about the offer that is nearest to
    fitting: it fails on the fewest constraints, and on those that are changed most easily."""
    result = Explanation()
    nearest: tuple[tuple[int, int, int, int, str], list[Shortfall]] | None = None
    for entry in sorted(entries, key=lambda e: rank_of(e.offer)):
        offer = accepted(entry.offer.envelope, Offer)
        result.considered += 1
        found = fits(requirements, offer, entry.free_device_ids)
        if not found:
            result.fitting.append(entry)
            continue
        if found[0].constraint == Constraint.BUSY:
            result.busy.append(entry)
        found.sort(key=lambda shortfall: ease(shortfall.constraint), reverse=True)
        for shortfall in found:
            name = str(shortfall.constraint)
            result.failures[name] = result.failures.get(name, 0) + 1
        rank = (
            len(found),
            ease(found[0].constraint),
            found[0].distance,
            offer.price_ucr_per_device_hour,
            entry.offer.id,
        )
        if nearest is None or rank < nearest[0]:
            nearest = (rank, found)
    if not result.fitting and nearest is not None:
        # All of them: to relax one of two that fail would get the job nothing.
        result.relax = tuple(nearest[1])
    return result


Rank = tuple[int, int, int, int, str]


def rank_of(offer: OfferFact) -> Rank:
    document = accepted(offer.envelope, Offer)
    return (
        document.price_ucr_per_device_hour,
        len(document.devices),
        max(device.memory_bytes for device in document.devices),
        document.cpu_millis * len(document.devices),
        offer.id,
    )
