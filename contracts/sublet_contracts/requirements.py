"""What a job requires of a machine, and the one judge of whether a machine meets it.

The broker proposes by it, commits by it and explains a refusal by it; the agent signs a lease by
it, looking at the offer that it has signed itself and at the devices that the lease names.

To add a constraint: a member of Constraint, and one row in _MACHINE_RULES or _DEVICE_RULES. What
it says are codes with facts; the words for people are the SDK's (sublet/shortfalls.py).

A device is asked for by words of its name, whole and side by side, whatever stands between them:
A10 is an NVIDIA A10 and an A10-24Q, not an A100; L40 is no L40S; RTX4090 and 4090 are an RTX 4090.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate
from typing import Annotated

from pydantic import Field, JsonValue

from sublet_contracts.amounts import format_bytes, format_cores, format_credits
from sublet_contracts.documents import MAX_THREADS, Device, Job, Offer, Resources


class Constraint(StrEnum):
    """What a machine can fall short of, from what a renter changes most easily to what no renter
    can change."""

    BUSY = "busy"
    """The machine would do, and its devices are taken at the moment. Only the broker knows."""
    PRICE = "price"
    REGION = "region"
    DISK = "disk"
    MEMORY = "memory"
    CPU = "cpu"
    IMAGE = "image"
    DEVICE_MEMORY = "device_memory"
    DEVICE_NAME = "device_name"
    HARDWARE_CLASS = "hardware_class"
    DEVICES = "devices"
    DEVICE_KIND = "device_kind"
    EGRESS = "egress"
    USER = "user"
    ACCEPTS = "accepts"


Fact = bool | int | str


@dataclass(frozen=True)
class Shortfall:
    """A constraint that a machine doesn't meet.

    Units: price in ucr per device-hour, cpu in thousandths of a core, memory, disk and
    device_memory in bytes. `has` is the most that the machine offers of it; for devices: how many
    it has at all, or where those are enough, how many of one class meet every other constraint.
    """

    constraint: Annotated[Constraint | str, Field(union_mode="left_to_right")]
    """A peer that is newer may know constraints that we don't."""
    has: Fact
    needs: Fact

    @property
    def distance(self) -> int:
        """How far off it is, in the constraint's own unit: comparable only within one constraint.
        0 where there is no measure."""
        facts = [fact for fact in (self.has, self.needs) if isinstance(fact, int)]
        if len(facts) < 2 or isinstance(self.has, bool):
            return 0
        return abs(facts[1] - facts[0])

    def as_json(self) -> dict[str, JsonValue]:
        """Return it as it travels in a refusal's facts."""
        return {"constraint": str(self.constraint), "has": self.has, "needs": self.needs}

    def __str__(self) -> str:
        words = _UNITS.get(self.constraint, _plain)
        return f"{self.constraint}: {words(self.has)} there, {words(self.needs)} asked for"


def _plain(fact: Fact) -> str:
    return ("yes" if fact else "no") if isinstance(fact, bool) else str(fact)


_UNITS: dict[str, Callable[[Fact], str]] = {
    Constraint.PRICE: lambda fact: format_credits(int(fact)),
    Constraint.CPU: lambda fact: format_cores(int(fact)),
    Constraint.MEMORY: lambda fact: format_bytes(int(fact)),
    Constraint.DISK: lambda fact: format_bytes(int(fact)),
    Constraint.DEVICE_MEMORY: lambda fact: format_bytes(int(fact)),
}


def ease(constraint: str) -> int:
    """Return the constraint's place in the order in which a renter would rather change them."""
    return _EASE.get(constraint, len(_EASE))


_EASE: dict[str, int] = {constraint: place for place, constraint in enumerate(Constraint)}


@dataclass(frozen=True)
class MachineRequirements:
    """What a job requires of the machine that it runs on."""

    renter: str
    resources: Resources
    max_price_ucr_per_device_hour: int
    image: str
    pinned_class: str = ""
    """The hardware class that the job's first checkpoint has pinned it to."""
    pinned_threads: int = 0
    """The threads of arithmetic that its first checkpoint has pinned it to; 0: none has."""

    @property
    def hardware_class(self) -> str:
        """The class that it must be, '' if any."""
        return self.pinned_class or self.resources.hardware_class

    @property
    def cpu_millis(self) -> int:
        """Thousandths of a core that it must have, in all: never fewer cores than threads. A
        single thread runs on less than a core as well."""
        cores = self.pinned_threads if self.pinned_threads > 1 else 0
        return max(self.resources.cpu_millis, 1000 * cores)

    def threads_on(self, offer: Offer) -> int:
        """Return how many threads of arithmetic it gets on a machine: as many as whole cores, and
        once it is pinned always the same, for another number gives other bits."""
        share = self.resources.cpu_millis or offer.cpu_millis * self.resources.devices
        return self.pinned_threads or min(max(1, share // 1000), MAX_THREADS)


def required_by(job: Job) -> MachineRequirements:
    """Return what a job's document requires."""
    return MachineRequirements(
        renter=job.renter,
        resources=job.resources,
        max_price_ucr_per_device_hour=job.max_price_ucr_per_device_hour,
        image=job.image,
    )


def is_pinned(image: str) -> bool:
    """Say whether an image is named by its digest."""
    return "@sha256:" in image


_WORD = re.compile(r"[^\W_]+")


@lru_cache(maxsize=4096)
def is_named(asked: str, name: str) -> bool:
    """Say whether a device of this name is what is asked for: its words, or some of them that stand
    side by side, are the letters and digits that were asked for."""
    wanted = "".join(_WORD.findall(asked.casefold()))
    words = _WORD.findall(name.casefold())
    ends = {0, *accumulate(map(len, words))}
    said = "".join(words)
    return bool(wanted) and any(
        begin + len(wanted) in ends and said.startswith(wanted, begin) for begin in ends
    )


@dataclass(frozen=True)
class _MachineRule:
    """A constraint on the machine as a whole."""

    constraint: Constraint
    meets: Callable[[MachineRequirements, Offer], bool]
    has: Callable[[MachineRequirements, Offer], Fact]
    needs: Callable[[MachineRequirements], Fact]


_MACHINE_RULES = (
    _MachineRule(
        Constraint.PRICE,
        lambda need, offer: offer.price_ucr_per_device_hour <= need.max_price_ucr_per_device_hour,
        lambda _, offer: offer.price_ucr_per_device_hour,
        lambda need: need.max_price_ucr_per_device_hour,
    ),
    _MachineRule(
        Constraint.CPU,
        lambda need, offer: offer.cpu_millis * need.resources.devices >= need.cpu_millis,
        lambda need, offer: offer.cpu_millis * need.resources.devices,
        lambda need: need.cpu_millis,
    ),
    _MachineRule(
        Constraint.MEMORY,
        lambda need, offer: (
            offer.memory_bytes * need.resources.devices >= need.resources.memory_bytes
        ),
        lambda need, offer: offer.memory_bytes * need.resources.devices,
        lambda need: need.resources.memory_bytes,
    ),
    _MachineRule(
        Constraint.DISK,
        lambda need, offer: offer.disk_bytes * need.resources.devices >= need.resources.disk_bytes,
        lambda need, offer: offer.disk_bytes * need.resources.devices,
        lambda need: need.resources.disk_bytes,
    ),
    _MachineRule(
        Constraint.REGION,
        lambda need, offer: need.resources.region in ("", offer.region),
        lambda _, offer: offer.region,
        lambda need: need.resources.region,
    ),
    _MachineRule(
        Constraint.EGRESS,
        lambda need, offer: offer.egress or not need.resources.egress,
        lambda _, offer: offer.egress,
        lambda need: need.resources.egress,
    ),
    _MachineRule(
        Constraint.USER,
        lambda need, offer: offer.users or not need.resources.user,
        lambda _, offer: offer.users,
        lambda need: need.resources.user,
    ),
    _MachineRule(
        Constraint.IMAGE,
        lambda need, offer: offer.image_policy == "any" or is_pinned(need.image),
        lambda _, offer: offer.image_policy,
        lambda need: need.image,
    ),
    _MachineRule(
        Constraint.ACCEPTS,
        lambda need, offer: not offer.accepts or need.renter in offer.accepts,
        lambda _need, _offer: "other renters",
        lambda need: need.renter,
    ),
)


@dataclass(frozen=True)
class _DeviceRule:
    """A constraint on each device of the job."""

    constraint: Constraint
    meets: Callable[[MachineRequirements, Device], bool]
    has: Callable[[Sequence[Device]], Fact]
    needs: Callable[[MachineRequirements], Fact]


_DEVICE_RULES = (
    _DeviceRule(
        Constraint.DEVICE_KIND,
        lambda need, device: need.resources.device_kind in ("any", device.kind),
        lambda devices: devices[0].kind,
        lambda need: need.resources.device_kind,
    ),
    _DeviceRule(
        Constraint.DEVICE_NAME,
        lambda need, device: (
            not need.resources.device_name or is_named(need.resources.device_name, device.name)
        ),
        lambda devices: devices[0].name,
        lambda need: need.resources.device_name,
    ),
    _DeviceRule(
        Constraint.HARDWARE_CLASS,
        lambda need, device: need.hardware_class in ("", device.hardware_class),
        lambda devices: devices[0].hardware_class,
        lambda need: need.hardware_class,
    ),
    _DeviceRule(
        Constraint.DEVICE_MEMORY,
        lambda need, device: device.memory_bytes >= need.resources.device_memory_bytes,
        lambda devices: max(device.memory_bytes for device in devices),
        lambda need: need.resources.device_memory_bytes,
    ),
)


def shortfalls(
    need: MachineRequirements, offer: Offer, devices: Sequence[Device]
) -> list[Shortfall]:
    """Return what an offer lacks for a job that would get its devices from `devices`, which are
    of the offer; nothing: it fits."""
    found = _device_shortfalls(need, devices)
    for rule in _MACHINE_RULES:
        if not rule.meets(need, offer):
            found.append(Shortfall(rule.constraint, rule.has(need, offer), rule.needs(need)))
    return found


def choose_devices(need: MachineRequirements, devices: Iterable[Device]) -> tuple[str, ...] | None:
    """Return the ids of those of `devices` that the job would get: all of one class, the smallest
    that suffice. None: they are too few."""
    for alike in _suitable(need, devices):
        if len(alike) >= need.resources.devices:
            smallest = sorted(alike, key=lambda device: (device.memory_bytes, device.id))
            return tuple(device.id for device in smallest[: need.resources.devices])
    return None


def _suitable(need: MachineRequirements, devices: Iterable[Device]) -> list[list[Device]]:
    """Return the devices that meet every rule, by class, in the order of the classes' names."""
    by_class: dict[str, list[Device]] = {}
    for device in devices:
        for rule in _DEVICE_RULES:  # The market's innermost loop: no generator here.
            if not rule.meets(need, device):
                break
        else:
            by_class.setdefault(device.hardware_class, []).append(device)
    return [by_class[name] for name in sorted(by_class)]


def _device_shortfalls(need: MachineRequirements, devices: Sequence[Device]) -> list[Shortfall]:
    """Name what stands between the job and these devices, taken or not."""
    if choose_devices(need, devices) is not None:
        return []
    asked = need.resources.devices
    # With too few devices it fails on `devices`; here only on what the devices are.
    enough = min(asked, len(devices))
    found = [
        Shortfall(rule.constraint, rule.has(devices), rule.needs(need))
        for rule in _DEVICE_RULES
        if sum(rule.meets(need, device) for device in devices) < enough
    ]
    if len(devices) < asked:
        found.append(Shortfall(Constraint.DEVICES, len(devices), asked))
    if not found:
        # Each rule is met by enough devices, and all of them together by too few of one class.
        most = max((len(alike) for alike in _suitable(need, devices)), default=0)
        found.append(Shortfall(Constraint.DEVICES, most, asked))
    return found
