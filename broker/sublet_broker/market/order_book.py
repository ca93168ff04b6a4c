"""The order book of one pool, in memory: offers by rank, queued jobs, and who gets what."""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import JobFact
from sublet_broker.market.matching import (
    BookEntry,
    Match,
    Rank,
    Requirements,
    fits,
    is_pinned,
    pick_devices,
    pool_may_hold,
    rank_of,
    requirements_of,
)
from sublet_contracts.documents import Offer
from sublet_contracts.states import JobState


class OrderBook:
    """The offers of one pool and the jobs that want one, in memory: what a shard holds.

    Every method may be called twice with the same argument. `propose` doesn't change the book: what
    was proposed is only taken once the scheduler says so, by `put`.
    """

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self._entries: dict[str, BookEntry] = {}
        self._ranks: list[Rank] = []
        self._jobs: dict[str, tuple[JobFact, Requirements]] = {}
        self._line: list[tuple[bool, int, str]] = []
        self._restricted_offers = 0
        """Offers that serve named renters only: without any, the renter makes no difference."""
        self._unsatisfiable: set[tuple[object, ...]] = set()
        """Kinds of wishes that nothing here meets, until an offer changes."""

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, entry: BookEntry) -> None:
        """Take up an offer, or what is free of it now."""
        if entry.offer.id not in self._entries:
            insort(self._ranks, rank_of(entry.offer))
            self._restricted_offers += bool(accepted(entry.offer.envelope, Offer).accepts)
        self._entries[entry.offer.id] = entry
        self._unsatisfiable.clear()

    def drop(self, offer: str) -> None:
        """Forget an offer."""
        entry = self._entries.pop(offer, None)
        if entry is not None:
            del self._ranks[bisect_left(self._ranks, rank_of(entry.offer))]
            self._restricted_offers -= bool(accepted(entry.offer.envelope, Offer).accepts)

    def want(self, job: JobFact) -> None:
        """Put a job in line (or replace what is known of it)."""
        self.forget(job.id)
        requirements = requirements_of(job)
        if pool_may_hold(requirements, self.pool):
            self._jobs[job.id] = (job, requirements)
            insort(self._line, _place(job))

    def forget(self, job: str) -> None:
        """Take a job out of the line."""
        known = self._jobs.pop(job, None)
        if known is not None:
            del self._line[bisect_left(self._line, _place(known[0]))]

    def propose(self, now_ms: int) -> list[Match]:
        """Return matches that don't get in each other's way, in the order of the line."""
        batch: _Batch | None = None
        matches: list[Match] = []
        for _, _, id in self._line:
            job, requirements = self._jobs[id]
            if job.not_before_ms > now_ms:
                continue
            alike = self._alike(requirements)
            if alike in self._unsatisfiable:
                continue
            if batch is None:  # While nobody waits nothing is looked at.
                batch = _Batch(self._ranks, self._entries, now_ms)
            found = batch.take(requirements, alike)
            if found is not None:
                matches.append(Match(id, *found))
            elif not matches:
                # Nothing was taken before it: it stays hopeless until an offer changes.
                self._unsatisfiable.add(alike)
        return matches

    def due_ms(self, now_ms: int) -> int | None:
        """Return when the next job that has to wait yet may be proposed."""
        later = [job.not_before_ms for job, _ in self._jobs.values() if job.not_before_ms > now_ms]
        return min(later, default=None)

    def _alike(self, requirements: Requirements) -> tuple[object, ...]:
        need = requirements.resources
        return (
            requirements.renter if self._restricted_offers else "",
            requirements.max_price_ucr_per_device_hour,
            is_pinned(requirements.image),
            requirements.hardware_class,
            requirements.avoid,
            need.devices,
            need.device_kind,
            need.device_memory_bytes,
            need.device_name,
            need.cpu_millis,
            need.memory_bytes,
            need.disk_bytes,
            need.region,
            need.egress,
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
        self._ended: dict[tuple[object, ...], int] = {}

    def take(
        self, requirements: Requirements, alike: tuple[object, ...]
    ) -> tuple[str, tuple[str, ...]] | None:
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
            key = (avoided, *alike)
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
        return None if fits(requirements, offer, free) else pick_devices(requirements, offer, free)

    def _taken(self, position: int, devices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        left = tuple(id for id in self._free[position] if id not in devices)
        self._free[position] = left
        if not left:
            self._usable[position] = position + 1
        return self._ranks[position][-1], devices


def _place(job: JobFact) -> tuple[bool, int, str]:
    return (job.state is not JobState.RECOVERING, job.submitted_ms, job.id)
