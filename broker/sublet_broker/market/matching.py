"""Matching: which job goes on which offer, and why one doesn't.

Rules:
- `fits` is the only judge. A shard proposes by it, the scheduler commits by it, and a refusal is
  explained by it; a non-match always names the constraints that fail.
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
from sublet_contracts.amounts import credits_of, size_of
from sublet_contracts.documents import Device, Job, Offer, Resources

BUSY = "busy"


@dataclass(frozen=True)
class BookEntry:
    """An offer with what is free of it, as a shard keeps it."""

    offer: OfferFact
    free_device_ids: tuple[str, ...]


@dataclass(frozen=True)
class Requirements:
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


def requirements_of(job: JobFact) -> Requirements:
    """Return what the job asks for now, with what it is pinned to since it began."""
    document = accepted(job.envelope, Job)
    return Requirements(
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


def fits(requirements: Requirements, offer: Offer, free: Sequence[str]) -> list[Failure]:
    """Return the constraints that this offer fails; none: it fits. BUSY comes alone: the machine
    would do, and is taken at the moment."""
    need = requirements.resources
    failures = _device_failures(requirements, offer.devices)
    price, highest = offer.price_ucr_per_device_hour, requirements.max_price_ucr_per_device_hour
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
    if offer.image_policy == "digest" and not is_pinned(requirements.image):
        failures.append(
            Failure(
                "image",
                "it takes images by digest only",
                "name the image by digest (name@sha256:...)",
            )
        )
    if offer.accepts and requirements.renter not in offer.accepts:
        failures.append(
            Failure("accepts", "it serves other renters only", "ask its owner to trust your key")
        )
    if not failures and pick_devices(requirements, offer, free) is None:
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


def _suits(requirements: Requirements, device: Device) -> bool:
    need = requirements.resources
    return (
        need.device_kind in ("any", device.kind)
        and device.memory_bytes >= need.device_memory_bytes
        and need.device_name.lower() in device.name.lower()
        and requirements.hardware_class in ("", device.hardware_class)
    )


def _device_failures(requirements: Requirements, devices: Sequence[Device]) -> list[Failure]:
    """Name what stands between the wish and this machine's devices, taken or not."""
    need = requirements.resources
    if _enough_of_one_class(requirements, devices) is not None:
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
    if requirements.hardware_class and _fewer(
        need, [d.hardware_class == requirements.hardware_class for d in devices]
    ):
        failures.append(
            Failure(
                "hardware_class",
                f"it is of class {devices[0].hardware_class}, not {requirements.hardware_class}",
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


def _enough_of_one_class(
    requirements: Requirements, devices: Iterable[Device]
) -> tuple[str, ...] | None:
    by_class: dict[str, list[Device]] = {}
    for device in devices:
        if _suits(requirements, device):
            by_class.setdefault(device.hardware_class, []).append(device)
    for name in sorted(by_class):
        like = sorted(by_class[name], key=lambda d: (d.memory_bytes, d.id))
        if len(like) >= requirements.resources.devices:
            return tuple(device.id for device in like[: requirements.resources.devices])
    return None


def pick_devices(
    requirements: Requirements, offer: Offer, free: Sequence[str]
) -> tuple[str, ...] | None:
    """Return the devices that the job would get: all of one class, the smallest that suffice."""
    available = set(free)
    return _enough_of_one_class(requirements, [d for d in offer.devices if d.id in available])


def pool_may_hold(requirements: Requirements, pool: str) -> bool:
    """Say whether a pool can have an offer for this wish at all."""
    hardware_class, _, region = pool.partition("@")
    if requirements.hardware_class and hardware_class not in (requirements.hardware_class, MIXED):
        return False
    return requirements.resources.region in ("", region)


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


def explain(requirements: Requirements, entries: Iterable[BookEntry]) -> Explanation:
    """Judge all of `entries`. Where none fits, `relax` says how to get the offer that is nearest to
    fitting: it fails on the fewest constraints, and on those that are changed most easily."""
    result = Explanation()
    nearest: tuple[tuple[int, int, int, int, str], list[Failure]] | None = None
    for entry in sorted(entries, key=lambda e: rank_of(e.offer)):
        offer = accepted(entry.offer.envelope, Offer)
        result.considered += 1
        failures = fits(requirements, offer, entry.free_device_ids)
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


def choose(requirements: Requirements, entries: Iterable[BookEntry]) -> Match | None:
    """Return the best match for one wish among `entries` (job id left empty)."""
    ranked = sorted(
        entries,
        key=lambda e: (
            e.offer.provider != requirements.prefer,
            e.offer.provider in requirements.avoid,
            rank_of(e.offer),
        ),
    )
    for entry in ranked:
        offer = accepted(entry.offer.envelope, Offer)
        if not fits(requirements, offer, entry.free_device_ids):
            devices = pick_devices(requirements, offer, entry.free_device_ids)
            if devices is not None:
                return Match("", entry.offer.id, devices)
    return None
