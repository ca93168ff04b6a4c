"""The auditor's rules about how often a job is asked for a checkpoint that leaves it to its agent:
never so often that saves pile up, never so seldom that more is lost than was told, and each lease
says how often machines were lost by then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.simulation.models import never

if TYPE_CHECKING:
    from sublet_agent.core.records import RunRecord
    from sublet_contracts.wire import Assign
    from tests.simulation.agents import AgentHost
    from tests.simulation.jobs import Container
    from tests.simulation.market import Market

LEAST_MS = 15_000
MOST_MS = 1_800_000
SLACK_MS = 6_000
"""For looks that are two seconds apart, and clocks that run fast or slow."""
DAY_MS = 86_400_000
_LOST = ("provider_lost", "run_killed", "run_vanished", "run_quarantined", "device_failed")
_LOST_TOO = ("engine_stopped", "provider_disk_full")


@dataclass(frozen=True)
class _Last:
    """When a job was asked last, or its newest checkpoint found. True time."""

    ms: int
    offset_ms: int
    """How far off its machine's clock was: one that was set since tells no lengths."""


class Cadences:
    """Looks at each ask, and at each lease."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self._last: dict[str, _Last] = {}
        self._closed: set[str] = set()
        self._machine_ms = 0
        self._losses = 0
        self._expected: dict[str, int] = {}

    # -- losses -------------------------------------------------------------------------------

    def leased(self, lease_id: str) -> None:
        """A lease is committed: what its agent is to be told of losses is what is known now."""
        self._expected[lease_id] = (self._machine_ms + DAY_MS) // (self._losses + 1)

    def closed(self, lease: Any) -> None:
        """A lease stands closed in a commit."""
        if lease.id in self._closed or lease.active_ms is None:
            return
        self._closed.add(lease.id)
        self._machine_ms += max(0, lease.closed_ms - lease.active_ms)
        self._losses += str(lease.reason) in (*_LOST, *_LOST_TOO)

    def told(self, assign: Assign) -> None:
        """An agent takes a lease."""
        expected = self._expected.get(assign.lease.id)
        never(
            expected is not None and assign.loss_every_ms != expected,
            f"a lease says that machines last {assign.loss_every_ms} ms, by the books it is "
            f"{expected}",
        )

    # -- asks ---------------------------------------------------------------------------------

    def found(self, lease_id: str, offset_ms: int) -> None:
        """An agent has found a checkpoint."""
        self._last[lease_id] = _Last(self._market.engine.now_ms, offset_ms)

    def asked(
        self, host: AgentHost, record: RunRecord | None, container: Container | None, offset_ms: int
    ) -> None:
        """A job is asked for a checkpoint."""
        if record is None or container is None:
            return
        now_ms = self._market.engine.now_ms
        last = self._last.get(record.lease_id)
        self._last[record.lease_id] = _Last(now_ms, offset_ms)
        steady = abs(now_ms - container.started_ms - container.clocked_ms()) < SLACK_MS
        if record.job.checkpoint_interval_ms or not steady:
            return
        self._market.count("asked at an interval of the agent's")
        if last is None or last.offset_ms != offset_ms:
            return
        waited_ms = now_ms - last.ms
        never(
            waited_ms < LEAST_MS - SLACK_MS,
            f"{host.name}: a job is asked for a checkpoint again after {waited_ms} ms",
        )
        ways = (record.uploading, *record.awaiting_verdict.values())
        under_way = any(way is not None and way.kind == "checkpoint" for way in ways)
        never(
            under_way and waited_ms < MOST_MS - SLACK_MS,
            f"{host.name}: saves pile up: the next is asked for after {waited_ms} ms, and the last "
            "one is still on its way",
        )
