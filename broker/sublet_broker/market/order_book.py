"""The order book of one pool, in memory: offers by rank, queued jobs, and who gets what."""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import JobFact
from sublet_broker.market.matching import (
    BookEntry,
    Match,
    Rank,
    Requirements,
    fits,
    pick_devices,
    pool_may_hold,
    rank_of,
    requirements_of,
)
from sublet_contracts.documents import Offer
from sublet_contracts.requirements import is_pinned
from sublet_contracts.states import JobState

Place: TypeAlias = tuple[bool, int, str]
Kind: TypeAlias = tuple[str, Requirements]
"""Jobs of one kind would get the same here: the renter, where that matters, and the rest."""

_PINNED = "@sha256:"
"""Stands for every image that is pinned."""


class OrderBook:
    """The offers of one pool and the jobs that want one, in memory: what a shard holds.

    Every method may be called twice with the same argument. `propose` doesn't change the book: what
    was proposed is only taken once the scheduler says so, by `put`.
    """

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self._entries: dict[str, BookEntry] = {}
        self._ranks: list[Rank] = []
        self._jobs: dict[str, tuple[JobFact, Requirements, Requirements]] = {}
        """Per job what it asks for, and the same as `alike` has it."""
        self._queue: list[Place] = []
        self._restricted_offers = 0
        """Offers that serve named renters only: without any, the renter makes no difference."""
        self._unsatisfiable: set[Kind] = set()
        """What nothing here meets, until an offer changes."""

    def __len__(self) -> int:
        return len(self._entries)

    def put_offer(self, entry: BookEntry) -> None:
        """Take up an offer, or what is free of it now."""
        if entry.offer.id not in self._entries:
            insort(self._ranks, rank_of(entry.offer))
            self._restricted_offers += bool(accepted(entry.offer.envelope, Offer).accepts)
        self._entries[entry.offer.id] = entry
        self._unsatisfiable.clear()

    def remove_offer(self, offer: str) -> None:
        """Forget an offer."""
        entry = self._entries.pop(offer, None)
        if entry is not None:
            del self._ranks[bisect_left(self._ranks, rank_of(entry.offer))]
            self._restricted_offers -= bool(accepted(entry.offer.envelope, Offer).accepts)

    def add_job(self, job: JobFact) -> None:
        """Queue a job (or replace what is known of it)."""
        self.remove_job(job.id)
        requirements = requirements_of(job)
        if pool_may_hold(requirements, self.pool):
            self._jobs[job.id] = (job, requirements, alike(requirements))
            insort(self._queue, place_of(job))

    def remove_job(self, job: str) -> None:
        """Take a job out of the queue."""
        known = self._jobs.pop(job, None)
        if known is not None:
            del self._queue[bisect_left(self._queue, place_of(known[0]))]

    def propose(self, now_ms: int) -> list[Match]:
        """Return matches that don't get in each other's way, in the order of the queue."""
        batch: _Batch | None = None
        matches: list[Match] = []
        for _, _, id in self._queue:
            job, requirements, like = self._jobs[id]
            if job.not_before_ms > now_ms:
                continue
            kind = (requirements.renter if self._restricted_offers else "", like)
            if kind in self._unsatisfiable:
                continue
            if batch is None:  # While nobody waits nothing is looked at.
                batch = _Batch(self._ranks, self._entries, now_ms)
            found = batch.take(requirements, kind)
            if found is not None:
                matches.append(Match(id, *found))
            elif not matches:
                # Nothing was taken before it: it stays hopeless until an offer changes.
                self._unsatisfiable.add(kind)
        return matches

    def due_ms(self, now_ms: int) -> int | None:
        """Return when the next job that has to wait yet may be proposed."""
        later = [
            job.not_before_ms for job, _, _ in self._jobs.values() if job.not_before_ms > now_ms
        ]
        return min(later, default=None)


def alike(requirements: Requirements) -> Requirements:
    """Return what is the same for all jobs that would get the same: all that is asked for, less
    what no offer can tell apart. Whatever is added to the requirements is in it by itself.

    Whose job it is is left out too: it matters only where some offer serves named renters.
    """
    return replace(
        requirements,
        renter="",
        image=_PINNED if is_pinned(requirements.image) else "",
        prefer="",  # Looked at for each job by itself, before what all alike would get.
    )


class _Batch:
    """One round of proposals over the ranked offers: what is taken in it stays taken.

    Within a batch offers only fill up. So a search for a kind of wish goes on where the last one
    for that kind ended, and offers without a free device are stepped over in one leap.
    """

    def __init__(
        self, ranks: Sequence[Rank], entries: Mapping[str, BookEntry], now_ms: int
    ) -> None:
        self._ranks = ranks
        self._entries = entries
        self._free = [entries[rank[-1]].free_device_ids for rank in ranks]
        self._usable = list(range(len(ranks) + 1))
        """For each position itself, or a later one from which to look on (union-find)."""
        for position, rank in enumerate(ranks):
            if not self._free[position] or entries[rank[-1]].offer.expires_ms <= now_ms:
                self._usable[position] = position + 1
        self._ended: dict[tuple[bool, Kind], int] = {}

    def take(self, requirements: Requirements, kind: Kind) -> tuple[str, tuple[str, ...]] | None:
        """Return the offer and devices for a wish, and take them."""
        if requirements.prefer:
            for position in range(len(self._ranks)):
                if (
                    self._provider(position) == requirements.prefer
                    and self._from(position) == position
                ):
                    devices = self._try(requirements, position)
                    if devices is not None:
                        return self._taken(position, devices)
        for avoided in (False, True) if requirements.avoid else (False,):
            key = (avoided, kind)
            position = self._from(self._ended.get(key, 0))
            # The ranks begin with the price: beyond the highest there is nothing to find.
            while (
                position < len(self._ranks)
                and self._ranks[position][0] <= requirements.max_price_ucr_per_device_hour
            ):
                if avoided or self._provider(position) not in requirements.avoid:
                    devices = self._try(requirements, position)
                    if devices is not None:
                        self._ended[key] = position
                        return self._taken(position, devices)
                position = self._from(position + 1)
            self._ended[key] = len(self._ranks)
        return None

    def _provider(self, position: int) -> str:
        return self._entries[self._ranks[position][-1]].offer.provider

    def _from(self, position: int) -> int:
        """Return the first position from here on that has a free device."""
        usable = self._usable
        while usable[position] != position:
            usable[position] = usable[usable[position]]
            position = usable[position]
        return position

    def _try(self, requirements: Requirements, position: int) -> tuple[str, ...] | None:
        free = self._free[position]
        if len(free) < requirements.resources.devices:
            return None
        offer = accepted(self._entries[self._ranks[position][-1]].offer.envelope, Offer)
        devices = pick_devices(requirements, offer, free)
        return None if devices is None or fits(requirements, offer, devices) else devices

    def _taken(self, position: int, devices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        left = tuple(id for id in self._free[position] if id not in devices)
        self._free[position] = left
        if not left:
            self._usable[position] = position + 1
        return self._ranks[position][-1], devices


def place_of(job: JobFact) -> Place:
    """Return a job's place in the order in which jobs are served: the smaller, the sooner."""
    return (job.state is not JobState.RECOVERING, job.submitted_ms, job.id)
