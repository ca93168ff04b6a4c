"""The auditor's model of matching: what shards promise, and that whoever can be served is served.

Like the auditor it shares no code with the market. What stands in the broker's tables it reads as
they are; documents from their signed bytes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tests.simulation.models import Violation, never, read

if TYPE_CHECKING:
    from tests.simulation.market import Market

LOOK_MS = 5_000
SERVED_WITHIN_MS = 10_000
"""A job that fits what a machine has free is leased after so long, while the broker runs and can
write: whatever Ray does, for nothing waits for it."""


class Matching:
    """Follows the shards' epochs, the proposals, and the line."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self._epochs: dict[str, int] = {}
        self._makers: dict[tuple[str, int], str] = {}
        """By pool and epoch the shard that proposes under it."""
        self._proposed: dict[tuple[str, str], list[tuple[str, int]]] = {}
        self._since: dict[str, tuple[Any, int]] = {}
        """Of a job in line, and of a provider: how it is, and since when it has been so."""
        self._touched: dict[str, int] = defaultdict(int)
        self._offers: dict[str, dict[str, Any]] = {}
        self._hindered_ms = 0
        self._starts = 0
        market.engine.after(LOOK_MS, self._look)

    # -- epochs -------------------------------------------------------------------------------

    def epoch(self, old: Any, new: Any) -> None:
        """A pool's epoch is committed."""
        never(new is None, "a pool's epoch was deleted")
        before = self._epochs.get(new.id, 0)
        never(new.epoch != before + 1, f"epoch {new.epoch} of {new.id} follows {before}")
        self._epochs[new.id] = new.epoch

    def proposed(self, proposals: Iterable[tuple[Any, str]]) -> None:
        """The scheduler is handed proposals, each with the incarnation of its shard."""
        self._proposed = {}
        for proposal, maker in proposals:
            known = self._makers.setdefault((proposal.pool, proposal.shard_epoch), maker)
            never(known != maker, f"two shards propose for {proposal.pool} under one epoch")
            made_under = (proposal.pool, proposal.shard_epoch)
            self._proposed.setdefault((proposal.job, proposal.offer), []).append(made_under)

    def leased(self, document: dict[str, Any]) -> None:
        """A lease is committed: somebody proposed it who had the right to."""
        made_under = self._proposed.get((document["job"], document["offer"]), [])
        never(not made_under, "a lease that no shard proposed")
        stale = all(epoch != self._epochs.get(pool) for pool, epoch in made_under)
        never(stale, f"a lease was proposed under {made_under}, the pools are at {self._epochs}")

    def cores_of(self, lease: dict[str, Any]) -> int:
        """Return how many thousandths of a core the machine gives a lease, by the offer's bytes."""
        tables = self._market.broker.store._tables
        offers = next(table for kind, table in tables.items() if kind.__name__ == "OfferFact").facts
        offer: int = self._offered(offers[lease["offer"],])["cpu_millis"]
        return offer * len(lease["device_ids"])

    # -- the line -----------------------------------------------------------------------------

    def touched(self, provider: str) -> None:
        """What this provider has free changes: whoever waits for it is served anew."""
        self._touched[provider] = self._market.engine.now_ms

    def _look(self) -> None:
        market = self._market
        now_ms = market.engine.now_ms
        market.engine.after(LOOK_MS, self._look)
        broker = market.broker
        if broker.started != self._starts or not broker.up:
            self._starts, self._hindered_ms = broker.started, now_ms
        self._hindered_ms = max(self._hindered_ms, min(broker.store.hindered_until_ms, now_ms))
        waiting = [
            id
            for id, job in market.auditor.jobs.items()
            if not job.live and job.state in ("queued", "recovering")
        ]
        if not waiting or self._hindered_ms == now_ms:
            self._since.clear()
            return
        facts = {kind.__name__: table.facts for kind, table in broker.store._tables.items()}
        clock_ms = broker.now_ms()
        machines = self._machines(facts, clock_ms)
        for id in waiting:
            self._served(id, facts["JobFact"][id,], machines, clock_ms)

    def _served(self, id: str, job: Any, machines: list[_Machine], clock_ms: int) -> None:
        document = self._market.auditor.jobs[id].document
        if not _may_be_leased(job, document, clock_ms):
            self._since.pop(id, None)
            return
        line_ms = self._unchanged_since(job.id, (job.state, job.epoch, job.not_before_ms))
        for machine in machines:
            waited_ms = self._market.engine.now_ms - max(machine.since_ms, line_ms)
            if waited_ms > SERVED_WITHIN_MS and machine.suits(
                document, job.hardware_class, job.threads
            ):
                name = self._market.names.get(id, id[:8])
                raise Violation(
                    f"{name} has stood in line for {waited_ms} ms, and "
                    f"{machine.name} had what it asks for"
                )

    def _unchanged_since(self, id: str, state: Any) -> int:
        known = self._since.get(id)
        if known is None or known[0] != state:
            known = self._since[id] = (state, self._market.engine.now_ms)
        return max(known[1], self._hindered_ms, self._touched[id])

    def _offered(self, offer: Any) -> dict[str, Any]:
        document = self._offers.get(offer.id)
        if document is None:
            document = self._offers[offer.id] = read(offer.envelope)
        return document

    def _machines(self, facts: dict[str, Any], clock_ms: int) -> list[_Machine]:
        leases = facts.get("LeaseFact", {})
        taken = {
            (lease.provider, device)
            for job in self._market.auditor.jobs.values()
            if job.live and (lease := leases[job.live,])
            for device in lease.device_ids
        }
        held: dict[str, int] = defaultdict(int)
        for run in facts.get("RunFact", {}).values():
            if run.successor:
                held[run.successor] += len(leases[run.id,].device_ids)
        found = []
        for agent in facts.get("AgentFact", {}).values():
            offer = facts["OfferFact"].get((agent.offer,)) if agent.connected else None
            aside = self._market.auditor.set_aside.is_set_aside(agent.id, clock_ms)
            if offer is None or not offer.open or offer.expires_ms <= clock_ms or aside:
                self._since.pop(agent.id, None)
                continue
            document = self._offered(offer)
            devices = [d for d in document["devices"] if (agent.id, d["id"]) not in taken]
            devices = devices[: max(0, len(devices) - held[agent.id])]
            how_it_is = (offer.id, agent.instance, [d["id"] for d in devices])
            since_ms = self._unchanged_since(agent.id, how_it_is)
            name = self._market.names[agent.id]
            found.append(_Machine(name, document, devices, since_ms))
        return found


class _Machine:
    """A machine, with what it has free."""

    def __init__(
        self, name: str, offer: dict[str, Any], free: list[dict[str, Any]], since_ms: int
    ) -> None:
        self.name = name
        self.since_ms = since_ms
        self._offer = offer
        self._free = free

    def suits(self, job: dict[str, Any], pinned: str, threads: int = 0) -> bool:
        """Say whether a job would find here all that it asks for. Every field of its resources is
        read (tests/simulation/test_judges.py holds this model and the market's judge together)."""
        need, offer = job["resources"], self._offer
        classes: dict[str, int] = defaultdict(int)
        for device in self._free:
            if (
                need["device_kind"] in ("any", device["kind"])
                and device["memory_bytes"] >= need["device_memory_bytes"]
                and _called(need["device_name"], device["name"])
            ):
                classes[device["hardware_class"]] += 1
        asked = pinned or need["hardware_class"]
        most = max((n for name, n in classes.items() if asked in ("", name)), default=0)
        return (
            most >= need["devices"]
            and offer["price_ucr_per_device_hour"] <= job["max_price_ucr_per_device_hour"]
            and need["region"] in ("", offer["region"])
            and (offer["egress"] or not need["egress"])
            and (offer["users"] or not need["user"])
            and (not offer["accepts"] or job["renter"] in offer["accepts"])
            and (offer["image_policy"] == "any" or "@sha256:" in job["image"])
            and (threads < 2 or offer["cpu_millis"] * need["devices"] >= 1000 * threads)
            and all(
                offer[what] * need["devices"] >= need[what]
                for what in ("cpu_millis", "memory_bytes", "disk_bytes")
            )
        )


def _called(asked: str, name: str) -> bool:
    """Its letters and digits stand in the name, whatever stands between them, and no other letter
    or digit touches them."""
    if not asked:
        return True
    characters = [c for c in asked.lower() if c.isalnum()]
    side_by_side = r"[^a-z0-9]*".join(map(re.escape, characters))
    pattern = rf"(?<![a-z0-9])(?:{side_by_side})(?![a-z0-9])"
    return bool(characters) and re.search(pattern, name.lower()) is not None


def _may_be_leased(job: Any, document: dict[str, Any], clock_ms: int) -> bool:
    highest, devices = document["max_price_ucr_per_device_hour"], document["resources"]["devices"]
    left = min(job.budget_ucr - job.settled_ucr, job.accept_ucr - job.accepted_ucr)
    return (
        not job.wanted
        and job.not_before_ms <= clock_ms
        and (job.started_ms is not None or document["expires_ms"] > clock_ms)
        and left >= -(-highest * devices // 60)
    )
