"""What of this machine can be offered now, by what was seen of it last. Pure. Rules:

1. A device is offered while its driver answers for it, and nothing while the runner's engine is
   silent. What is gone leaves the offer at once.
2. A device that came back is offered again after it has answered for a while: a little after the
   first loss, longer after each further one, so that one with a loose contact does not eat a job a
   minute. One of which the driver reported a fault is left out as if it were gone.
3. A device's memory is all of it less what others use: measured while no run of ours is on it, nor
   was until SETTLE_MS ago, since a driver doesn't tell whose memory it is. In between the last
   measure stands; after a restart of the agent that is what the last offer said.
4. Main memory, disk and cores are shared evenly by the devices that belong to the offer, whether
   they answer or not. Of memory and disk no more is offered than is free, counting as free what our
   own runs may hold.
5. A change of less than NOISE_PERCENT, or than NOISE_BYTES, is no news: it waits for the next
   refresh of the offer. Others' use of a GPU below that counts as none.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from sublet_agent.core.offers import Terms
from sublet_agent.core.runner_port import CPU_DEVICE
from sublet_contracts.documents import Device

SETTLE_MS = 10_000
NOISE_PERCENT = 2
NOISE_BYTES = 256 * 2**20
BACK_AFTER_MS = 1_000
BACK_FACTOR = 10
BACK_MOST_MS = 1_800_000
FORGIVEN_AFTER_MS = 3_600_000
FAULT_QUIET_MS = 300_000
UNLISTED_DOUBT_MS = 60_000
RESERVED_MEMORY_PERCENT = 10
RESERVED_DISK_BYTES = 2 * 2**30


@dataclass(frozen=True)
class DeviceSeen:
    """A device that answers. `device.memory_bytes`: all of it, whoever uses it."""

    device: Device
    used_bytes: int = 0
    """of its memory, by anybody"""
    utilization_percent: int | None = None
    """part of the time in which it computed lately; None: its driver doesn't tell"""
    shares_main_memory: bool = False
    """It has none of its own: a CPU, or a GPU that uses the machine's."""


@dataclass(frozen=True)
class Missing:
    """A device that belongs to the offer and can't be offered."""

    id: str
    says: str
    certain_after_ms: int | None = 0
    """How long it has to stay so until what runs on it is held to have lost it: at once where the
    driver says so of this very device; after a while where it doesn't answer; None: never (a driver
    that was just upgraded still serves what runs)."""


@dataclass(frozen=True)
class Facts:
    """One look at the machine."""

    devices: tuple[DeviceSeen, ...]
    cpu_millis: int
    memory_bytes: int
    memory_free_bytes: int
    disk_free_bytes: int
    missing: tuple[Missing, ...] = ()
    answering: frozenset[str] | None = None
    """every GPU that answers, offered or not; None: none was asked"""
    engine: str = ""
    """why the runner can't work now; '' if it can"""


@dataclass(frozen=True)
class Held:
    """What one run of ours may hold of the machine."""

    device_ids: tuple[str, ...]
    memory_bytes: int
    disk_used_bytes: int


@dataclass
class _Loss:
    """A device's losses, for how long it must answer before it is believed."""

    count: int = 0
    answers_since_ms: int | None = None
    fault: str = ""
    quiet_until_ms: int = 0


@dataclass
class Supply:
    """Keeps what can be offered now in `terms`, and why the rest can't be."""

    terms: Terms
    remembered: Mapping[str, int] = field(default_factory=dict)
    """device id -> its memory in the last offer"""
    engine: str = ""
    missing: dict[str, Missing] = field(default_factory=dict)
    """what belongs to the offer and is left out, now"""
    known: dict[str, Device] = field(default_factory=dict)
    """every device that was ever seen, as it was last"""
    _measured: dict[str, int] = field(default_factory=dict)
    _in_use_until_ms: dict[str, int] = field(default_factory=dict)
    _missing_since_ms: dict[str, int] = field(default_factory=dict)
    _losses: dict[str, _Loss] = field(default_factory=dict)

    def take(self, facts: Facts, held: Collection[Held], now_ms: int) -> list[Missing]:
        """Take what was seen. Returns the devices that are certain to be lost to what runs on
        them."""
        self.engine = facts.engine
        for run in held:
            for id in run.device_ids:
                self._in_use_until_ms[id] = now_ms
        gone = {one.id: one for one in (*_unlisted(facts, held), *facts.missing)}
        for id, since_ms in list(self._missing_since_ms.items()):
            if id not in gone:
                del self._missing_since_ms[id]
                self._loss(id).answers_since_ms = now_ms
            elif since_ms > now_ms:
                self._missing_since_ms[id] = now_ms
        for id in gone:
            if id not in self._missing_since_ms:
                self._missing_since_ms[id] = now_ms
                self._loss(id).count += 1
        kept = []
        self.missing = dict(gone)
        self.known.update((seen.device.id, seen.device) for seen in facts.devices)
        for seen in facts.devices:
            why = self._not_yet(seen.device.id, now_ms)
            if why:
                self.missing[seen.device.id] = Missing(seen.device.id, why, None)
            else:
                kept.append(seen)
        self.terms = self._terms(facts, kept, held, now_ms)
        return [one for one in gone.values() if self._is_certain(one, now_ms)]

    def fault(self, id: str, says: str, now_ms: int) -> None:
        """The driver reported a fault of a device: leave it out for a while."""
        loss = self._loss(id)
        loss.count += 1
        loss.fault = says
        quiet_ms = FAULT_QUIET_MS * 2 ** min(loss.count - 1, 9)
        loss.quiet_until_ms = now_ms + min(BACK_MOST_MS, quiet_ms)
        left = tuple(device for device in self.terms.devices if device.id != id)
        if len(left) < len(self.terms.devices):
            self.missing[id] = Missing(id, says, None)
            self.terms = replace(self.terms, devices=left)

    def believe_all(self) -> None:
        """The owner says that all is well: what answers is offered from the next look on."""
        self._losses.clear()

    def why_not(self, ids: Iterable[str]) -> str:
        """Return why one of these devices can't be used now; '' if all can."""
        if self.engine:
            return f"the machine's engine does not answer: {self.engine}"
        offered = {device.id for device in self.terms.devices}
        for id in ids:
            if id in self.missing:
                return f"device_ids: {id} can't be used now: {self.missing[id].says}"
            if id not in offered:
                return f"device_ids: {id} is no longer here"
        return ""

    # -- how ---------------------------------------------------------------------------------------

    def _loss(self, id: str) -> _Loss:
        return self._losses.setdefault(id, _Loss())

    def _not_yet(self, id: str, now_ms: int) -> str:
        loss = self._losses.get(id)
        if loss is None:
            return ""
        since_ms = loss.answers_since_ms
        if since_ms is not None and now_ms - since_ms >= FORGIVEN_AFTER_MS:
            del self._losses[id]
            return ""
        if now_ms < loss.quiet_until_ms:
            return f"{loss.fault}; it is tried again in {_seconds(loss.quiet_until_ms - now_ms)}"
        if since_ms is None:
            return ""
        waits_ms = min(BACK_MOST_MS, BACK_AFTER_MS * BACK_FACTOR ** min(loss.count - 1, 5))
        left_ms = since_ms + waits_ms - now_ms
        # After a clock that went back it would wait for ever.
        if not 0 < left_ms <= waits_ms:
            return ""
        return f"it answers again, and is offered if it does so for {_seconds(left_ms)} more"

    def _is_certain(self, one: Missing, now_ms: int) -> bool:
        if one.certain_after_ms is None:
            return False
        return now_ms - self._missing_since_ms[one.id] >= one.certain_after_ms

    def _terms(
        self, facts: Facts, kept: list[DeviceSeen], held: Collection[Held], now_ms: int
    ) -> Terms:
        terms = self.terms
        shares = max(1, len(facts.devices) + len(facts.missing))
        memory = in_all(terms.asked_memory_bytes, facts) // shares
        may_hold = sum(run.memory_bytes for run in held)
        free = (facts.memory_free_bytes + may_hold) // shares
        if free < memory - _noise(memory):
            memory = max(0, free)
        disk_free = facts.disk_free_bytes + sum(run.disk_used_bytes for run in held)
        asked = terms.asked_disk_bytes
        disk = min(asked, disk_free) if asked else max(0, disk_free - RESERVED_DISK_BYTES)
        return replace(
            terms,
            devices=tuple(self._device(seen, memory, now_ms) for seen in kept),
            cpu_millis=facts.cpu_millis // shares,
            memory_bytes=memory,
            disk_bytes=disk // shares,
        )

    def _device(self, seen: DeviceSeen, share_bytes: int, now_ms: int) -> Device:
        device = seen.device
        if seen.shares_main_memory:
            return device.model_copy(update={"memory_bytes": share_bytes})
        total = device.memory_bytes
        used_at = self._in_use_until_ms.get(device.id)
        if used_at is None or not 0 <= now_ms - used_at < SETTLE_MS:
            others = seen.used_bytes if seen.used_bytes >= _noise(total) else 0
            self._measured[device.id] = max(0, total - others)
        elif device.id not in self._measured:
            self._measured[device.id] = self.remembered.get(device.id, total)
        return device.model_copy(update={"memory_bytes": min(total, self._measured[device.id])})


def _unlisted(facts: Facts, held: Collection[Held]) -> list[Missing]:
    """Return the GPUs of our runs that are not there, where the look knows nothing of them: the
    agent was started when they were gone already, or with another choice of devices."""
    if facts.answering is None:
        return []
    ids = {id for run in held for id in run.device_ids} - {CPU_DEVICE} - facts.answering
    return [Missing(id, "the driver does not list it", UNLISTED_DOUBT_MS) for id in sorted(ids)]


def in_all(asked_bytes: int, facts: Facts) -> int:
    """Return the main memory that the owner offers in all: what he says, or most of what is
    there."""
    most = facts.memory_bytes * (100 - RESERVED_MEMORY_PERCENT) // 100
    return min(asked_bytes or most, facts.memory_bytes)


def is_less(now: Terms, before: Terms) -> bool:
    """Say whether something that was offered is not there any more."""
    return _changed(now, before, +1)


def is_more(now: Terms, before: Terms) -> bool:
    """Say whether something can be offered that was not."""
    return _changed(now, before, -1)


def _changed(now: Terms, before: Terms, sign: int) -> bool:
    """Whether `now` has materially less (sign 1) or more (-1) than `before`. A device that has
    become another one by its facts counts as both."""
    devices = {device.id: device for device in now.devices}
    known = {device.id: device for device in before.devices}
    for id, device in known.items() if sign > 0 else devices.items():
        other = devices.get(id) if sign > 0 else known.get(id)
        if other is None or _facts_of(device) != _facts_of(other):
            return True
        if _differs(known[id].memory_bytes, devices[id].memory_bytes, sign):
            return True
    return (
        sign * (before.cpu_millis - now.cpu_millis) > 0
        or _differs(before.memory_bytes, now.memory_bytes, sign)
        or _differs(before.disk_bytes, now.disk_bytes, sign)
    )


def _facts_of(device: Device) -> Device:
    return device.model_copy(update={"memory_bytes": 0})


def _differs(before: int, now: int, sign: int) -> bool:
    return sign * (before - now) >= _noise(max(before, now))


def _noise(whole_bytes: int) -> int:
    return max(NOISE_BYTES, whole_bytes * NOISE_PERCENT // 100)


def _seconds(time_ms: int) -> str:
    return f"{-(-time_ms // 1000)} s"
