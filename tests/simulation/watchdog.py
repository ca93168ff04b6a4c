"""The watchdog of a provider's machine, another process than its agent's: it ends each run whose
deadline passes. After a reboot there are no deadlines, and no runs either."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from sublet_agent.core.deadlines import Over

if TYPE_CHECKING:
    from tests.simulation.agents import AgentHost

LOOK_MS = 500


class Watchdog:
    """What adapters/watchdog/watchdog.py does."""

    def __init__(self, host: AgentHost) -> None:
        self._host = host
        self._at_ms: dict[str, tuple[int, Over]] = {}
        self.passed: dict[str, Over] = {}
        """Which runs it has ended, and what was over for each."""

    def renew(self, lease_id: str, in_ms: int, over: Over) -> None:
        """The agent writes a deadline down."""
        watched = lease_id in self._at_ms
        self._at_ms[lease_id] = (self._host.engine.now_ms + in_ms, over)
        if not watched:
            self._plan(lease_id, in_ms)

    def rebooted(self) -> None:
        """Deadlines are by a clock that starts anew with the machine; what it noted stays."""
        self._at_ms.clear()

    def forget(self, lease_id: str) -> None:
        """The run is gone."""
        self._at_ms.pop(lease_id, None)
        self.passed.pop(lease_id, None)

    def _plan(self, lease_id: str, in_ms: int) -> None:
        engine = self._host.engine
        engine.after(in_ms + engine.draw_ms(1, LOOK_MS), partial(self._look, lease_id))

    def _look(self, lease_id: str) -> None:
        host = self._host
        known = self._at_ms.get(lease_id)
        if known is None:
            return
        at_ms, over = known
        left_ms = at_ms - host.engine.now_ms
        if left_ms > 0 or host.engine_is_away:
            self._plan(lease_id, max(0, left_ms))
            return
        del self._at_ms[lease_id]
        container = host.containers.get(lease_id)
        if container is not None and container.running:
            host.engine.say(f"{host.name}: the watchdog ends a run: {over}")
            host.market.lifetimes.ended_by_watchdog(host, lease_id, over)
            self.passed[lease_id] = over
            container.ends(137, over, signal=9)
