"""The auditor's rules about how often a job is asked for a checkpoint that leaves it to its agent:
never so often that saves pile up, never so seldom that more is lost than was told, and each lease
says how often machines were lost by then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.simulation.models import never

if TYPE_CHECKING:
    from sublet_agent.core.records import RunRecord
    from sublet_contracts.wire import Assign, RunReport
    from tests.simulation.agents import AgentHost
    from tests.simulation.jobs import Container
    from tests.simulation.market import Market

LEAST_MS = 15_000
MOST_MS = 1_800_000
SLACK_MS = 6_000
"""For looks that are two seconds apart, and clocks that run fast or slow."""
BOUND_SLACK_MS = 15_000
"""For the ask to come and the answer to be seen."""
DAY_MS = 86_400_000
_LOST = ("provider_lost", "run_killed", "run_vanished", "run_quarantined", "device_failed")
_LOST_TOO = ("engine_stopped", "provider_disk_full")


class Cadences:
    """Looks at each ask, and at each lease."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self._last: dict[str, int] = {}
        """When a job was asked last, or its newest checkpoint found. True time."""
        self._late: set[str] = set()
        """Runs that nobody had looked at for a while: what is found there now was saved before."""
        self._closed: set[str] = set()
        self._machine_ms = 0
        self._losses = 0
        self._expected: dict[str, int] = {}
        self._failed: set[str] = set()
        """Leases of which a checkpoint was left out: what lies between two then is no interval."""

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

    # -- the bound ----------------------------------------------------------------------------

    def failed(self, lease_id: str) -> None:
        """A checkpoint of this lease could not be uploaded, or was refused."""
        self._failed.add(lease_id)

    def reported(self, host: AgentHost, record: RunRecord | None, report: RunReport) -> None:
        """An honest agent says how a run stands, whose job saves when it is asked to: should the
        machine be lost now, no more is lost than it says."""
        container = host.containers.get(report.lease)
        if record is None or container is None or report.cadence is None or not host.honest:
            return
        program, began_ms = container.program, container.started_ms
        answers = container.folder is None and container.hangs_ms is None
        answers = answers and program.ending != "deaf" and container.running
        looked_after = (
            host.inflates == 1
            and host.alive_since_ms is not None
            and host.alive_since_ms <= began_ms
            and max(host.hung_until_ms, host.engine_away_until_ms) <= began_ms
        )
        steady = abs(self._market.engine.now_ms - began_ms - container.clocked_ms()) < SLACK_MS
        if not (answers and looked_after and steady) or report.lease in self._failed:
            return
        self._market.count("bound of a loss looked at")
        counted_ms = max(record.durable_device_ms, record.pull_device_ms)
        lost_ms = (report.cum_device_ms - counted_ms) // record.devices
        most_ms = report.cadence.most_lost_ms + program.step_ms + program.save_ms + BOUND_SLACK_MS
        never(
            lost_ms > most_ms,
            f"{host.name}: a loss now costs {lost_ms} ms of work, and at most "
            f"{report.cadence.most_lost_ms} were told",
        )

    # -- asks ---------------------------------------------------------------------------------

    def looked(self, lease_id: str, after_ms: int) -> None:
        """An agent looks at a run, so long after it did so before."""
        (self._late.add if after_ms > SLACK_MS else self._late.discard)(lease_id)

    def found(self, lease_id: str) -> None:
        """An agent has found a checkpoint."""
        if lease_id in self._late:
            self._last.pop(lease_id, None)
        else:
            self._last[lease_id] = self._market.engine.now_ms

    def asked(self, host: AgentHost, record: RunRecord | None, container: Container | None) -> None:
        """A job is asked for a checkpoint."""
        if record is None or container is None:
            return
        now_ms = self._market.engine.now_ms
        last_ms = self._last.get(record.lease_id)
        self._last[record.lease_id] = now_ms
        steady = abs(now_ms - container.started_ms - container.clocked_ms()) < SLACK_MS
        # A liar's run has a time of its own.
        if record.job.checkpoint_interval_ms or not steady or not host.honest:
            return
        self._market.count("asked at an interval of the agent's")
        if last_ms is None:
            return
        waited_ms = now_ms - last_ms
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
