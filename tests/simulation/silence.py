"""Who falls silent is given up in time: no sooner (see the auditor), and not much later either.
And what was uploaded is judged in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.models import LeaseModel, never

if TYPE_CHECKING:
    from tests.simulation.market import Market

LOOK_MS = 5_000
LATE_MS = 15_000
"""A broker that can write does what is due within this."""
JUDGED_WITHIN_MS = 240_000
"""Verifying takes a minute at most here, and has to be done again where its worker dies."""


class Silence:
    """Looks at all open leases now and then. Times are the broker's clock."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self._hindered_ms = 0
        """When the broker couldn't write last: nobody is given up for what it couldn't keep."""
        self._unjudged: dict[str, int] = {}
        """Since when, of each checkpoint that is here and no more than that."""
        market.engine.after(LOOK_MS, self._look)

    def _look(self) -> None:
        market = self._market
        market.engine.after(LOOK_MS, self._look)
        broker, auditor = market.broker, market.auditor
        if not broker.up:
            return
        now_ms = broker.now_ms()
        if broker.store.hindered_until_ms > market.engine.now_ms - LOOK_MS:  # since the last look
            self._hindered_ms = now_ms
        since_ms = max(self._hindered_ms, auditor.started_ms)
        for job in auditor.jobs.values():
            if job.live:
                lease = auditor.leases[job.live]
                silent_ms = now_ms - max(since_ms, auditor.heard_ms.get(job.live, 0))
                never(
                    silent_ms > self._patience_ms(lease, job.document["patience_ms"]) + LATE_MS,
                    f"a lease that is {lease.state}, its run {lease.run or 'not there'}, has said "
                    f"nothing for {silent_ms} ms and is kept",
                )

        self._judged(now_ms, since_ms)

    def _judged(self, now_ms: int, since_ms: int) -> None:
        unjudged = {
            id: self._unjudged.get(id, now_ms)
            for id, checkpoint in self._market.auditor.checkpoints.items()
            if checkpoint.state == "uploaded"
        }
        self._unjudged = unjudged
        for id, here_ms in unjudged.items():
            waits_ms = now_ms - max(since_ms, here_ms)
            never(
                waits_ms > JUDGED_WITHIN_MS,
                f"checkpoint {id[:8]} waits for its verdict since {waits_ms} ms",
            )

    def _patience_ms(self, lease: LeaseModel, patience_ms: int) -> float:
        if lease.state == "proposed":
            settings = self._market.settings
            return max(settings.answer_ms, settings.unknown_after_ms)
        # Whoever has exited says nothing more, and waits for its last documents to be judged.
        return float("inf") if lease.run in ("exited", "lost") else patience_ms
