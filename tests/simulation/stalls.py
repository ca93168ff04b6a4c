"""The auditor's rules about jobs that stand still: who asked for it is paused in time, and nobody
is paused who moves on, or who never asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.simulation.models import never

if TYPE_CHECKING:
    from tests.simulation.jobs import Container
    from tests.simulation.market import Market

LOOK_MS = 5_000
EARLY_MS = 5_000
"""A machine's clock may be so much ahead of the truth within one stall, and a report so late."""
LATE_MS = 60_000
"""So much later than it may be it is ordered, while everybody hears everybody."""
HEARD_EVERY_MS = 9_000


class Stalls:
    """Looks at all machines now and then, and at each order. True times, but where it says so."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self._ordered: set[str] = set()
        """Leases whose runs were asked to end, for whatever reason."""
        self._steady: dict[str, tuple[int, int]] = {}
        """Since when a run has stood still, and nothing has kept the broker from knowing: truly,
        and by the broker's clock."""
        market.engine.after(LOOK_MS, self._look)

    def saved(self, lease: str) -> None:
        """A checkpoint of this lease became durable: that is a sign of life, too."""
        self._steady.pop(lease, None)

    def ordered(self, run: Any) -> None:
        """What the broker wants of a run, as it stands in a commit."""
        if str(run.desired) == "run" or run.id in self._ordered:
            return
        self._ordered.add(run.id)
        if str(run.order_reason) != "stalled":
            return
        job = self._market.auditor.jobs[run.job].document
        never(not job["stall_ms"], "a job was paused as stalled that never asked for it")
        lease = self._market.auditor.leases[run.id]
        container = self._market.auditor.runs.get(run.id)
        if container is None or not self._market.agents_by_party[lease.document["provider"]].honest:
            return
        still_ms = self._market.engine.now_ms - _moved_ms(container)
        never(
            still_ms < job["stall_ms"] - EARLY_MS,
            f"a job was paused as stalled {still_ms} ms after it had moved on; "
            f"{job['stall_ms']} are promised",
        )

    def _look(self) -> None:
        market = self._market
        market.engine.after(LOOK_MS, self._look)
        broker, auditor, now_ms = market.broker, market.auditor, market.engine.now_ms
        hindered = not broker.up or broker.store.hindered_until_ms > now_ms - LOOK_MS
        seen: dict[str, tuple[int, int]] = {}
        for host in market.agents:
            away = host.alive_since_ms is None or host.hung_until_ms > now_ms or not host.live
            if hindered or away or host.engine_is_away or not host.honest or host.inflates != 1:
                continue
            for lease_id, container in host.containers.items():
                lease = auditor.leases.get(lease_id)
                if lease is None or lease.run != "running" or lease_id in self._ordered:
                    continue
                silent_ms = broker.now_ms() - auditor.heard_ms.get(lease_id, 0)
                stands = container.running and container.hangs_ms is not None
                if stands and silent_ms < HEARD_EVERY_MS:
                    seen[lease_id] = self._steady.get(lease_id, (now_ms, broker.now_ms()))
        self._steady = seen
        for lease_id, (since_ms, since_broker_ms) in seen.items():
            job = auditor.jobs[auditor.leases[lease_id].document["job"]].document
            still_ms = min(now_ms - since_ms, broker.now_ms() - since_broker_ms)
            never(
                0 < job["stall_ms"] < still_ms - LATE_MS,
                f"a job has stood still for {still_ms} ms, and is not paused after "
                f"{job['stall_ms']} as it asked",
            )

    def broker_started(self) -> None:
        """It counts anew: what was before is not known to it."""
        self._steady.clear()


def _moved_ms(container: Container) -> int:
    """When the job made its newest step, in truth."""
    steps = container.step_now() - container.begin[0]
    return container.started_ms + steps * container.program.step_ms
