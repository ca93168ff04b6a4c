"""Sends the runs' output from the spool over the link: of each run one frame at a time.

The next frame goes once the broker has said what it wants next, or when it was silent for too long.
"""

import asyncio
import time
from collections.abc import Callable

from sublet_agent.adapters.session.link import Link
from sublet_agent.adapters.session.log_spool import Spool
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.runner_port import OutputLine
from sublet_contracts.run_conventions import MAX_LOG_STATE_CHARACTERS
from sublet_contracts.wire import Logs, LogState, LogStates

ANSWER_S = 3.0
"""how long one frame may be under way before the next is sent all the same"""
STALL_S = 2.0
"""how long `drain` waits where the broker takes nothing more"""
LOOK_S = 0.02
STATES_S = 0.5
REPEAT_S = 5.0


class LogSender:
    """All runs' output on its way. Used from the event loop's thread."""

    def __init__(self, spool: Spool, core: AgentCore, link: Callable[[], Link | None]) -> None:
        self._spool = spool
        self._core = core
        self._link = link
        self._sent_s: dict[str, float] = {}
        """lease -> when the frame that is under way was sent, by the monotonic clock"""
        self._states: dict[str, tuple[tuple[tuple[str, str], ...], float]] = {}
        """lease -> the unfinished lines that were told last, and when, by the monotonic clock"""

    def begin_session(self) -> None:
        """The broker says anew of each run what it wants: nothing is under way."""
        self._sent_s.clear()
        self._states.clear()

    def wanted(self, lease_id: str, next_number: int) -> None:
        """The broker has all lines before `next_number` (-1: as far as is known): send on."""
        if next_number >= 0:
            self._spool.confirm(lease_id, next_number)
        self._send(lease_id, next_number if next_number >= 0 else None)

    def unfinished(self, lease_id: str, lines: tuple[OutputLine, ...]) -> None:
        """Tell the broker how a run's unfinished lines stand: what has changed, at most once in
        STATES_S, and all of it again after REPEAT_S, for it may have been lost. What was seen
        before its stream's newest line was written is that line, as it stood before its end."""
        newest_ms = self._spool.newest_ms
        lines = tuple(line for line in lines if line.time_ms > newest_ms(lease_id, line.stream))
        known = self._states.get(lease_id)
        if known is None and not lines:
            return
        run, link = self._core.runs.get(lease_id), self._link()
        if run is None or link is None or not link.live:
            return
        before, sent_s = known or ((), 0.0)
        shown = tuple((line.stream, line.text) for line in lines)
        since_s = time.monotonic() - sent_s
        if since_s < (STATES_S if shown != before else REPEAT_S) or (not lines and not before):
            return
        number = self._spool.next_number(lease_id)
        states = tuple(
            LogState(
                number=number,
                time_ms=max(0, line.time_ms),
                stream=line.stream,
                text=line.text[:MAX_LOG_STATE_CHARACTERS],
            )
            for line in lines
            if line.stream != "sublet"
        )
        link.send(LogStates(lease=lease_id, epoch=run.record.lease.epoch, states=states))
        self._states[lease_id] = (shown, time.monotonic())
        if not lines:
            del self._states[lease_id]

    def pump(self) -> None:
        """Send what can be sent now."""
        errors = []
        for lease_id in self._core.runs:
            sent_s = self._sent_s.get(lease_id)
            if sent_s is None or time.monotonic() - sent_s >= ANSWER_S:
                try:
                    self._send(lease_id, None)
                except Exception as error:  # noqa: BLE001 - the others' output goes on
                    errors.append(error)
        if errors:
            raise errors[0]

    async def drain(self, lease_id: str, limit_s: float) -> None:
        """Send a run's output until nothing is left, nothing moves any more, or `limit_s` is over;
        return at once where no session is live."""
        begin = moved = time.monotonic()
        left = self._spool.unconfirmed(lease_id)
        while left and (link := self._link()) is not None and link.live:
            now = time.monotonic()
            if now - moved > STALL_S or now - begin > limit_s:
                break
            self.pump()
            await asyncio.sleep(LOOK_S)
            if self._spool.unconfirmed(lease_id) < left:
                left, moved = self._spool.unconfirmed(lease_id), now

    def _send(self, lease_id: str, start: int | None) -> None:
        self._sent_s.pop(lease_id, None)
        run, link = self._core.runs.get(lease_id), self._link()
        if run is None or link is None or not link.live:
            return
        lines = self._spool.batch(lease_id, start)
        epoch = run.record.lease.epoch
        if lines and link.send(Logs(lease=lease_id, epoch=epoch, lines=lines)):
            self._sent_s[lease_id] = time.monotonic()
