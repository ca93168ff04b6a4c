"""The auditor's own table of ends: what a machine's run came to in truth, and by which reasons its
lease may be settled then, where its owner is honest."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from tests.simulation.models import LeaseModel, never

if TYPE_CHECKING:
    from tests.simulation.agents import AgentHost
    from tests.simulation.auditor import Auditor
    from tests.simulation.jobs import Container

_REASONS = {
    "finished": "succeeded",
    "failed": "job_failed",
    "yielded": "yielded",
    "left": "",  # for what it was asked
    "killed by its agent": "",  # likewise
    "killed unseen": "killed_unattributed killed_too_often",
    "killed from outside": "run_killed",
    "device": "device_failed",
    "memory": "out_of_memory",
    "engine": "engine_stopped",
    "forgotten": "run_vanished",
    "silence": "run_killed",
    "budget": "budget_exhausted",
}
_LOST = frozenset(["provider_lost", "run_vanished"])
"""What the broker concludes from silence."""


class Truth:
    """Compares the reason of each settlement with it."""

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor
        self._asked: dict[str, dict[str, bool]] = defaultdict(dict)
        """For what reasons a run was to end, by whomever, and whether at once: no work counts."""
        self._not_started: dict[str, set[str]] = defaultdict(set)

    def asked(self, lease: str, reason: str, desired: str) -> None:
        """The agent was told to end a run: by the broker, its owner, or the machine."""
        asked = self._asked[lease]
        asked[str(reason)] = asked.get(str(reason), False) or str(desired) == "stop"

    def not_started(self, lease: str, reason: str) -> None:
        """A run could not be prepared, for this reason."""
        self._not_started[lease].add(str(reason))

    def had_trouble(self, lease: str, reason: str) -> bool:
        """Say whether a run could truly not be prepared for a reason; a look-up takes too long
        wherever anything is slow."""
        return reason == "pull_failed" or reason in self._not_started.get(lease, ())

    def closed(self, id: str, lease: LeaseModel, now_ms: int) -> None:
        """A signed lease is closed. To be called when all of that commit was looked at."""
        agent = self._auditor.market.agents_by_party[lease.document["provider"]]
        if not agent.honest:
            return
        container = self._auditor.runs.get(id)
        told = lease.run == "exited"
        reason = lease.reason
        allowed = self._allowed(id, container, told=told) | _by_its_budget(agent, id)
        if not told:
            allowed |= _LOST
        if self._lacks_outputs(id, lease, container):
            allowed.add("run_vanished")
        truth = _how(container)
        never(
            reason not in allowed,
            f"a lease is settled as {reason}; its run {truth}, and may end as {sorted(allowed)}",
        )

    def _allowed(self, id: str, container: Container | None, *, told: bool) -> set[str]:
        asked = self._asked.get(id, {})
        allowed = set(self._not_started.get(id, ()))
        if container is None or container.running:
            return allowed | asked.keys()
        allowed |= set(_REASONS[container.truth].split())
        if container.truth != "finished" or container.folder is not None:
            # Of a script that knows nothing of it nobody can tell, where it was asked to stop.
            return allowed | asked.keys()
        # It had done its work: to have been asked to save and leave takes nothing away from that.
        return allowed | {reason for reason, at_once in asked.items() if at_once or not told}

    def _lacks_outputs(self, id: str, lease: LeaseModel, container: Container | None) -> bool:
        """Whether it succeeded, and its outputs never came."""
        wanted = self._auditor.jobs[lease.document["job"]].document["outputs"]
        here = any(
            c.document["lease"] == id and c.document["kind"] == "outputs" and c.state == "durable"
            for c in self._auditor._checkpoints_of_lease(id)
        )
        return container is not None and container.truth == "finished" and wanted and not here


def _by_its_budget(agent: AgentHost, id: str) -> set[str]:
    """An agent that can't hear the broker stops a run where its budget ends."""
    run = agent.core.runs.get(id)
    stop = run.record.stop if run else None
    return {"budget_exhausted"} & {str(stop.reason) if stop else ""}


def _how(container: Container | None) -> str:
    if container is None:
        return "never began"
    if container.running:
        return "goes on"
    return f"has ended ({container.truth}, exit code {container.exit_code})"
