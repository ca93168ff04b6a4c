"""The auditor's model of what comes before a run's start: ten minutes of it are free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.simulation.models import LeaseModel, never

if TYPE_CHECKING:
    from tests.simulation.agents import AgentHost
    from tests.simulation.auditor import Auditor

FREE_MS = 600_000
CLOCKS_MS = 2_000
"""So far a machine's clock may be off in that time, and so long nobody may look;"""
UNSEEN_MS = 15_000
"""and so much later a run may be seen to have begun. A heartbeat may be under way as long."""


class Pulls:
    """Measures them in true time."""

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor
        self._began_ms: dict[str, tuple[int, AgentHost]] = {}
        self._took_ms: dict[str, int] = {}
        self._looked_after: set[str] = set()
        """Leases whose agent was there all the time."""

    def began(self, host: AgentHost, lease: str) -> None:
        """A pull begins; one that begins again began when it first did."""
        self._began_ms.setdefault(lease, (self._auditor.market.engine.now_ms, host))

    def ended(self, lease: str) -> None:
        """A run has started."""
        now_ms = self._auditor.market.engine.now_ms
        began_ms, host = self._began_ms.get(lease, (now_ms, None))
        self._took_ms[lease] = now_ms - began_ms
        alive = host is not None and host.alive_since_ms is not None
        if host and alive and max(host.alive_since_ms or 0, host.hung_until_ms) <= began_ms:
            self._looked_after.add(lease)

    def _took(self, lease: str) -> int:
        now_ms = self._auditor.market.engine.now_ms
        began_ms, _ = self._began_ms.get(lease, (now_ms, None))
        return self._took_ms.get(lease, now_ms - began_ms)

    def _most_ms(self, lease: LeaseModel) -> int:
        terms = lease.document
        price, hold = terms["price_ucr_per_device_hour"], terms["hold_ucr"]
        return int(((hold + 1) * 3_600_000 - 1) // price // 4)

    def claimed(self, id: str, lease: LeaseModel, receipt: dict[str, Any]) -> None:
        """A receipt was taken, by which so much of its time came before the start."""
        claimed_ms, most_ms = receipt.get("pull_device_ms", 0), self._most_ms(lease)
        never(claimed_ms > most_ms, f"{claimed_ms} device-ms of a pull, {most_ms} may be")
        devices = len(lease.document["device_ids"])
        host = self._auditor.market.agents_by_party[lease.document["provider"]]
        if not host.honest:
            return
        # In older receipts nothing is said of it.
        idle = receipt["cum_device_ms"] > 0 and id not in self._took_ms
        never(idle, f"{receipt['cum_device_ms']} device-ms of a run that never started")
        true_ms = self._true_ms(id, devices)
        never(claimed_ms > true_ms, f"{claimed_ms} device-ms of a pull that had {true_ms}")
        least_ms = min(
            (self._took(id) - UNSEEN_MS - FREE_MS) * devices, most_ms // devices * devices
        )
        told = receipt["cum_device_ms"] > 0 and "pull_device_ms" in receipt
        never(
            told and id in self._looked_after and claimed_ms < least_ms,
            f"{claimed_ms} device-ms of a pull that had {least_ms}",
        )

    def _true_ms(self, id: str, devices: int) -> int:
        if id not in self._took_ms:
            return 0
        return max(0, self._took(id) + CLOCKS_MS - FREE_MS) * devices

    def paid_ms(self, id: str, lease: LeaseModel) -> tuple[int, int]:
        """Return between what the device time before the start lies that the newest receipt has in
        it. Older receipts don't tell it apart."""
        if not lease.chain:
            return 0, 0
        told = lease.chain[-1].document.get("pull_device_ms")
        if told is not None:
            return told, told
        true_ms = self._true_ms(id, len(lease.document["device_ids"]))
        return 0, min(true_ms, self._most_ms(lease))

    def heard(self, id: str, lease: LeaseModel) -> int:
        """Return for how long the broker may hold against a run that it had not begun."""
        host = self._auditor.market.agents_by_party[lease.document["provider"]]
        took_ms, preparing_ms = self._took(id), lease.preparing_ms
        never(
            host.honest and preparing_ms > took_ms + UNSEEN_MS,
            f"a run is said to have been made ready for {preparing_ms} ms, it was {took_ms}",
        )
        return max(0, preparing_ms - 10_000)

    def free_ms(self, lease: LeaseModel, claimed_ms: int, not_begun_ms: int) -> int:
        """Return what of the time since the lease was made no run can be paid for."""
        devices = len(lease.document["device_ids"])
        beyond_ms = min(max(0, not_begun_ms - FREE_MS), self._most_ms(lease) // devices)
        return max(FREE_MS if claimed_ms else 0, not_begun_ms - beyond_ms)
