"""Matching: which job goes on which offer, and why one doesn't.

Rules:
- `fits` is the only judge. A shard proposes by it, the scheduler commits by it, and a refusal is
  explained by it; a non-match always names the constraints that fail.
- Of the offers that fit: first the provider that prepared to take the job over; then those that
  haven't failed it; among those the cheapest; then the smallest machine that does; then by id.
- Jobs are served in the order: those that have lost their machine, then by age, then by id.
- The same facts give the same proposals, whatever order they came in.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import JobFact, OfferFact
from sublet_broker.market.offers import MIXED
from sublet_contracts.amounts import credits_of, size_of
from sublet_contracts.documents import Device, Job, Offer, Resources
from sublet_contracts.states import JobState

BUSY = "busy"


@dataclass(frozen=True)
class BookEntry:
    """An offer with what is free of it, as a shard keeps it."""

    offer: OfferFact
    free_device_ids: tuple[str, ...]


@dataclass(frozen=True)
class Wish:
    """What a job asks of an offer."""

    renter: str
    resources: Resources
    max_price_ucr_per_device_hour: int
    image: str
    hardware_class: str = ""
    avoid: tuple[str, ...] = ()
    prefer: str = ""


@dataclass(frozen=True)
class Failure:
    """A constraint that an offer doesn't meet. `relax`: what the renter could change."""

    constraint: str
    says: str
    relax: str
    distance: int = 0
    """How far off it is, in the constraint's own unit: comparable only within one constraint."""


@dataclass(frozen=True)
class Match:
    """A job on an offer's devices."""

    job: str
    offer: str
    device_ids: tuple[str, ...]


def wish_of(job: JobFact) -> Wish:
    """Return what the job asks for now, with what it is pinned to since it began."""
    document = accepted(job.envelope, Job)
    return Wish(
        renter=job.renter,
        resources=document.resources,
        max_price_ucr_per_device_hour=document.max_price_ucr_per_device_hour,
        image=document.image,
        hardware_class=job.hardware_class or document.resources.hardware_class,
        avoid=job.avoid,
        prefer=job.prefer,
    )


def is_pinned(image: str) -> bool:
    """Say whether an image is named by its digest."""
    return "@sha256:" in image


def fits(wish: Wish, offer: Offer, free: Sequence[str]) -> list[Failure]:
    """Return the constraints that this offer fails; none: it fits. BUSY comes alone: the machine
    would do, and is taken at the moment."""
    need = wish.resources
    failures = _device_failures(wish, offer.devices)
    price, highest = offer.price_ucr_per_device_hour, wish.max_price_ucr_per_device_hour
    if price > highest:
        failures.append(
            Failure(
                "price",
                f"it costs {credits_of(price)} per device-hour, at most {credits_of(highest)} "
                "is allowed",
                f"the cheapest offer that fits costs {credits_of(price)} per device-hour: "
                f"raise --max-price by {credits_of(price - highest)}",
                price - highest,
            )
        )
    for name, has, wants, unit in (
        ("cpu", offer.cpu_millis, need.cpu_millis, "m"),
        ("memory", offer.memory_bytes, need.memory_bytes, "B"),
        ("disk", offer.disk_bytes, need.disk_bytes, "B"),
    ):
        if has * need.devices < wants:
            failures.append(_too_small(name, has * need.devices, wants, unit))
    if need.region and need.region != offer.region:
        failures.append(
            Failure(
                "region",
                f"it is in {offer.region}, not in {need.region}",
                f"allow region {offer.region}",
            )
        )
    if need.egress and not offer.egress:
        failures.append(
            Failure("egress", "its jobs can't reach the network", "do without network access")
        )
    if offer.image_policy == "digest" and not is_pinned(wish.image):
        failures.append(
            Failure(
                "image",
                "it takes images by digest only",
                "name the image by digest (name@sha256:...)",
            )
        )
    if offer.accepts and wish.renter not in offer.accepts:
        failures.append(
            Failure("accepts", "it serves other renters only", "ask its owner to trust your key")
        )
    if not failures and pick_devices(wish, offer, free) is None:
        failures.append(Failure(BUSY, "its devices are taken at the moment", "wait for it"))
    return failures


def _too_small(name: str, has: int, wants: int, unit: str) -> Failure:
    def words(amount: int) -> str:
        return f"{amount / 1000:g} cores" if unit == "m" else size_of(amount)

    return Failure(
        name,
        f"it has {words(has)} of {name} for the job, {words(wants)} are asked for",
        f"ask for at most {words(has)} of {name}",
        wants - has,
    )


def _suits(wish: Wish, device: Device) -> bool:
    need = wish.resources
    return (
        need.device_kind in ("any", device.kind)
        and device.memory_bytes >= need.device_memory_bytes
        and need.device_name.lower() in device.name.lower()
        and wish.hardware_class in ("", device.hardware_class)
    )


def _device_failures(wish: Wish, devices: Sequence[Device]) -> list[Failure]:
    """Name what stands between the wish and this machine's devices, taken or not."""
    need = wish.resources
    if _enough_of_one_class(wish, devices) is not None:
        return []
    failures: list[Failure] = []
    if need.device_kind != "any" and _fewer(need, [d.kind == need.device_kind for d in devices]):
        has = devices[0].kind
        failures.append(
            Failure(
                "device_kind",
                f"it offers {has} devices, not {need.device_kind}",
                f"allow a {has} as device (--gpus {'cpu' if has == 'cpu' else 1})",
            )
        )
    name = need.device_name.lower()
    if name and _fewer(need, [name in d.name.lower() for d in devices]):
        failures.append(
            Failure(
                "device_name",
                f"it offers {devices[0].name}, not {need.device_name}",
                f"allow {devices[0].name}",
            )
        )
    if wish.hardware_class and _fewer(
        need, [d.hardware_class == wish.hardware_class for d in devices]
    ):
        failures.append(
            Failure(
                "hardware_class",
                f"it is of class {devices[0].hardware_class}, not {wish.hardware_class}",
                f"allow hardware class {devices[0].hardware_class}",
            )
        )
    largest = max(device.memory_bytes for device in devices)
    if _fewer(need, [d.memory_bytes >= need.device_memory_bytes for d in devices]):
        failures.append(
            Failure(
                "device_memory",
                f"its devices have {size_of(largest)}, {size_of(need.device_memory_bytes)} "
                "are asked for",
                f"ask for devices of at most {size_of(largest)}",
                need.device_memory_bytes - largest,
            )
        )
    if len(devices) < need.devices:
        failures.append(
            Failure(
                "devices",
                f"it has {len(devices)} devices, {need.devices} are asked for",
                f"ask for at most {len(devices)} devices",
                need.devices - len(devices),
            )
        )
    if not failures:
        failures.append(
            Failure(
                "devices",
                f"it has no {need.devices} like devices that meet every wish",
                "ask for fewer devices",
                need.devices,
            )
        )
    return failures


def _fewer(need: Resources, meets: Sequence[bool]) -> bool:
    # A machine with too few devices fails on `devices`; here only on what its devices are.
    return sum(meets) < min(need.devices, len(meets))


def _enough_of_one_class(wish: Wish, devices: Iterable[Device]) -> tuple[str, ...] | None:
    by_class: dict[str, list[Device]] = {}
    for device in devices:
        if _suits(wish, device):
            by_class.setdefault(device.hardware_class, []).append(device)
    for name in sorted(by_class):
        like = sorted(by_class[name], key=lambda d: (d.memory_bytes, d.id))
        if len(like) >= wish.resources.devices:
            return tuple(device.id for device in like[: wish.resources.devices])
    return None


def pick_devices(wish: Wish, offer: Offer, free: Sequence[str]) -> tuple[str, ...] | None:
    """Return the devices that the job would get: all of one class, the smallest that suffice."""
    available = set(free)
    return _enough_of_one_class(wish, [d for d in offer.devices if d.id in available])


def pool_may_hold(wish: Wish, pool: str) -> bool:
    """Say whether a pool can have an offer for this wish at all."""
    hardware_class, _, region = pool.partition("@")
    if wish.hardware_class and hardware_class not in (wish.hardware_class, MIXED):
        return False
    return wish.resources.region in ("", region)


@dataclass
class Explanation:
    """What a wish would get, and where it gets nothing, why."""

    fitting: list[BookEntry] = field(default_factory=list)
    busy: list[BookEntry] = field(default_factory=list)
    considered: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    relax: str = ""
    relax_field: str = ""
    """The constraint that `relax` is about; of several the hardest to change."""

    @property
    def some_offer_could(self) -> bool:
        """Whether some machine on the market would do, busy or not."""
        return bool(self.fitting or self.busy)


def explain(wish: Wish, entries: Iterable[BookEntry]) -> Explanation:
    """Judge all of `entries`. Where none fits, `relax` says how to get the offer that is nearest to
    fitting: it fails on the fewest constraints, and on those that are changed most easily."""
    result = Explanation()
    nearest: tuple[tuple[int, int, int, int, str], list[Failure]] | None = None
    for entry in sorted(entries, key=lambda e: _rank(e.offer)):
        offer = accepted(entry.offer.envelope, Offer)
        result.considered += 1
        failures = fits(wish, offer, entry.free_device_ids)
        if not failures:
            result.fitting.append(entry)
            continue
        if failures[0].constraint == BUSY:
            result.busy.append(entry)
        failures.sort(key=lambda f: _EASE.index(f.constraint), reverse=True)
        for failure in failures:
            result.failures[failure.constraint] = result.failures.get(failure.constraint, 0) + 1
        rank = (
            len(failures),
            _EASE.index(failures[0].constraint),
            failures[0].distance,
            offer.price_ucr_per_device_hour,
            entry.offer.id,
        )
        if nearest is None or rank < nearest[0]:
            nearest = (rank, failures)
    if not result.fitting and nearest is not None:
        # All of them: to relax one of two that fail would get the job nothing.
        result.relax = ", and ".join(failure.relax for failure in nearest[1])
        result.relax_field = nearest[1][0].constraint
    return result


# From what a renter changes most easily to what he can't change.
_EASE = (
    BUSY, "price", "region", "disk", "memory", "cpu", "image", "device_memory", "device_name",
    "hardware_class", "devices", "device_kind", "egress", "accepts",
)  # fmt: skip

_Rank = tuple[int, int, int, int, str]


def _rank(offer: OfferFact) -> _Rank:
    document = accepted(offer.envelope, Offer)
    return (
        document.price_ucr_per_device_hour,
        len(document.devices),
        max(device.memory_bytes for device in document.devices),
        document.cpu_millis * len(document.devices),
        offer.id,
    )


def choose(wish: Wish, entries: Iterable[BookEntry]) -> Match | None:
    """Return the best match for one wish among `entries` (job id left empty)."""
    ranked = sorted(
        entries,
        key=lambda e: (
            e.offer.provider != wish.prefer,
            e.offer.provider in wish.avoid,
            _rank(e.offer),
        ),
    )
    for entry in ranked:
        offer = accepted(entry.offer.envelope, Offer)
        if not fits(wish, offer, entry.free_device_ids):
            devices = pick_devices(wish, offer, entry.free_device_ids)
            if devices is not None:
                return Match("", entry.offer.id, devices)
    return None


class Book:
    """The offers of one pool and the jobs that want one, in memory: what a shard holds.

    Every method may be called twice with the same argument. `propose` doesn't change the book: what
    was proposed is only taken once the scheduler says so, by `put`.
    """

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self._entries: dict[str, BookEntry] = {}
        self._ranks: list[_Rank] = []
        self._jobs: dict[str, tuple[JobFact, Wish]] = {}
        self._line: list[tuple[bool, int, str]] = []
        self._choosy = 0
        """Offers that serve named renters only: without any, the renter makes no difference."""
        self._hopeless: set[tuple[object, ...]] = set()
        """Kinds of wishes that nothing here meets, until an offer changes."""

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, entry: BookEntry) -> None:
        """Take up an offer, or what is free of it now."""
        if entry.offer.id not in self._entries:
            insort(self._ranks, _rank(entry.offer))
            self._choosy += bool(accepted(entry.offer.envelope, Offer).accepts)
        self._entries[entry.offer.id] = entry
        self._hopeless.clear()

    def drop(self, offer: str) -> None:
        """Forget an offer."""
        entry = self._entries.pop(offer, None)
        if entry is not None:
            del self._ranks[bisect_left(self._ranks, _rank(entry.offer))]
            self._choosy -= bool(accepted(entry.offer.envelope, Offer).accepts)

    def want(self, job: JobFact) -> None:
        """Put a job in line (or replace what is known of it)."""
        self.forget(job.id)
        wish = wish_of(job)
        if pool_may_hold(wish, self.pool):
            self._jobs[job.id] = (job, wish)
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
            job, wish = self._jobs[id]
            if job.not_before_ms > now_ms:
                continue
            alike = self._alike(wish)
            if alike in self._hopeless:
                continue
            if batch is None:  # While nobody waits nothing is looked at.
                batch = _Batch(self._ranks, self._entries, now_ms)
            found = batch.take(wish, alike)
            if found is not None:
                matches.append(Match(id, *found))
            elif not matches:
                # Nothing was taken before it: it stays hopeless until an offer changes.
                self._hopeless.add(alike)
        return matches

    def due_ms(self, now_ms: int) -> int | None:
        """Return when the next job that has to wait yet may be proposed."""
        later = [job.not_before_ms for job, _ in self._jobs.values() if job.not_before_ms > now_ms]
        return min(later, default=None)

    def _alike(self, wish: Wish) -> tuple[object, ...]:
        need = wish.resources
        return (
            wish.renter if self._choosy else "",
            wish.max_price_ucr_per_device_hour,
            is_pinned(wish.image),
            wish.hardware_class,
            wish.avoid,
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
        self, ranks: Sequence[_Rank], entries: Mapping[str, BookEntry], now_ms: int
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

    def take(self, wish: Wish, alike: tuple[object, ...]) -> tuple[str, tuple[str, ...]] | None:
        """Return the offer and devices for a wish, and take them."""
        if wish.prefer:
            for position in range(len(self._ranks)):
                if self._provider(position) == wish.prefer and self._from(position) == position:
                    devices = self._try(wish, position)
                    if devices is not None:
                        return self._taken(position, devices)
        for shunned in (False, True) if wish.avoid else (False,):
            key = (shunned, *alike)
            position = self._from(self._ended.get(key, 0))
            # The ranks begin with the price: beyond the highest there is nothing to find.
            while (
                position < len(self._ranks)
                and self._ranks[position][0] <= wish.max_price_ucr_per_device_hour
            ):
                if shunned or self._provider(position) not in wish.avoid:
                    devices = self._try(wish, position)
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

    def _try(self, wish: Wish, position: int) -> tuple[str, ...] | None:
        free = self._free[position]
        if len(free) < wish.resources.devices:
            return None
        offer = accepted(self._entries[self._ranks[position][-1]].offer.envelope, Offer)
        return None if fits(wish, offer, free) else pick_devices(wish, offer, free)

    def _taken(self, position: int, devices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        left = tuple(id for id in self._free[position] if id not in devices)
        self._free[position] = left
        if not left:
            self._usable[position] = position + 1
        return self._ranks[position][-1], devices


def _place(job: JobFact) -> tuple[bool, int, str]:
    return (job.state is not JobState.RECOVERING, job.submitted_ms, job.id)
