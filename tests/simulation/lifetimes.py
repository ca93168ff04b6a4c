"""The auditor's rules about how long containers live: none outlives its budget, nor for long an
agent that is gone; and none is ended for want of an agent that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.models import never

if TYPE_CHECKING:
    from tests.simulation.agents import AgentHost
    from tests.simulation.jobs import Container
    from tests.simulation.market import Market

LOOK_MS = 5_000
ALONE_MS = 10_000
"""So much longer than the job's patience a run may go on without its agent;"""
LATE_MS = 5_000
"""and so much later it may be seen to."""
RENEWED_WITHIN_MS = 6_000
OVERDUE_MS = 15_000
"""A run that its agent was to have ended by now is gone so much later, if the engine is there."""
BEYOND_BUDGET_MS = 20_000
"""So much longer than its budget and the time to stop: where the engine was away just then."""


class Lifetimes:
    """Looks at all machines now and then. True times."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self._overdue_ms: dict[str, int] = {}
        """Since when each run is to be gone, while nothing hinders its agent."""
        market.engine.after(LOOK_MS, self._look)

    def _look(self) -> None:
        self._market.engine.after(LOOK_MS, self._look)
        for host in self._market.agents:
            for lease_id, container in host.containers.items():
                if container.running:
                    self._lives_rightly(host, lease_id, container)
                    self._obeys(host, lease_id)

    def _obeys(self, host: AgentHost, lease_id: str) -> None:
        now_ms, run = self._market.engine.now_ms, host.core.runs.get(lease_id)
        hindered = host.alive_since_ms is None or host.hung_until_ms > now_ms or host.engine_is_away
        stop = run.record.stop if run else None
        if hindered or stop is None or host.now_ms() <= stop.deadline_ms:
            self._overdue_ms.pop(lease_id, None)
            return
        overdue_ms = now_ms - self._overdue_ms.setdefault(lease_id, now_ms)
        never(
            overdue_ms > OVERDUE_MS,
            f"a run goes on {overdue_ms} ms after its agent was to end it ({stop.reason})",
        )

    def _lives_rightly(self, host: AgentHost, lease_id: str, container: Container) -> None:
        lease = self._market.auditor.leases.get(lease_id)
        if lease is None or self._market.engine.now_ms - host.engine_away_until_ms < LATE_MS:
            return
        job = self._market.auditor.jobs[lease.document["job"]].document
        alone_ms = self._alone_ms(host)
        never(
            alone_ms > job["patience_ms"] + ALONE_MS + LATE_MS,
            f"a run goes on for {alone_ms} ms without its agent",
        )
        terms = lease.document
        devices, price = len(terms["device_ids"]), terms["price_ucr_per_device_hour"]
        paid_ms = (terms["hold_ucr"] + 1) * 3_600_000 // price // devices
        beyond_ms = container.clocked_ms() - paid_ms - job["stop_grace_ms"]
        never(
            host.honest and beyond_ms > BEYOND_BUDGET_MS,
            f"a run goes on for {beyond_ms} ms after its budget and its time to stop",
        )

    def _alone_ms(self, host: AgentHost) -> int:
        """For how long nobody has looked after the machine's runs."""
        now_ms = self._market.engine.now_ms
        if host.alive_since_ms is None:
            return now_ms - host.died_ms
        return now_ms - host.hangs_since_ms if host.hung_until_ms > now_ms else 0

    def ended_by_watchdog(self, host: AgentHost, lease_id: str, over: str) -> None:
        """It ends a run: for want of an agent? One that can't reach its engine ends nothing, and
        renews nothing either that is over."""
        now_ms, since_ms = host.engine.now_ms, host.alive_since_ms
        if over != "silence" or since_ms is None or host.hung_until_ms > now_ms:
            return
        lease = self._market.auditor.leases[lease_id]
        patience_ms = self._market.auditor.jobs[lease.document["job"]].document["patience_ms"]
        if host.engine_away_until_ms > now_ms - patience_ms - ALONE_MS - LATE_MS:
            return
        lives_ms = now_ms - max(since_ms, host.hung_until_ms)
        never(
            lives_ms > RENEWED_WITHIN_MS,
            f"a run was ended for want of an agent that has been there for {lives_ms} ms",
        )
