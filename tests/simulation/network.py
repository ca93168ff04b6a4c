"""Connections between agents and the broker, with TCP's promises and no others.

Frames arrive in order or not at all. While a direction is cut off, frames wait (TCP sends them
again) until it works or until an end gives up. When a connection breaks, what was under way is lost
but for a piece of it that had reached the other side already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.simulation.engine import Engine


@dataclass
class Line:
    """The way between one agent's machine and the broker. Times in true ms."""

    on_blocked: Callable[[], None]
    up_blocked_until_ms: int = 0
    down_blocked_until_ms: int = 0
    blocked_since_ms: int = 0
    slow_until_ms: int = 0
    slow_ms: int = 0

    def block(self, now_ms: int, until_ms: int, *, up: bool, down: bool) -> None:
        """Nothing passes until then in these directions."""
        worked = self.works(now_ms)
        if up:
            self.up_blocked_until_ms = until_ms
        if down:
            self.down_blocked_until_ms = until_ms
        if worked:
            self.blocked_since_ms = now_ms
            self.on_blocked()

    def open(self) -> None:
        """Everything passes, at full speed."""
        self.up_blocked_until_ms = self.down_blocked_until_ms = self.slow_until_ms = 0

    def blocked_until_ms(self, *, up: bool) -> int:
        return self.up_blocked_until_ms if up else self.down_blocked_until_ms

    def works(self, now_ms: int) -> bool:
        """Say whether a request and its answer get through now."""
        return max(self.up_blocked_until_ms, self.down_blocked_until_ms) <= now_ms

    def delay_ms(self, engine: Engine) -> int:
        extra = self.slow_ms if engine.now_ms < self.slow_until_ms else 0
        return engine.draw_ms(1, 40) + extra


@dataclass
class Pipe:
    """One direction of a connection."""

    engine: Engine
    line: Line
    up: bool
    deliver: Callable[[bytes], None]
    under_way: deque[tuple[int, bytes]] = field(default_factory=deque)
    last_ms: int = 0
    broken: bool = False
    _planned: bool = False

    def send(self, frame: bytes) -> None:
        """Put a frame on its way."""
        if self.broken:
            return
        at_ms = max(self.last_ms, self.engine.now_ms + self.line.delay_ms(self.engine))
        self.last_ms = at_ms
        self.under_way.append((at_ms, frame))
        self._plan()

    def _plan(self) -> None:
        if self._planned or not self.under_way:
            return
        self._planned = True
        at_ms = max(self.under_way[0][0], self.line.blocked_until_ms(up=self.up))
        self.engine.after(at_ms - self.engine.now_ms, self._arrive)

    def _arrive(self) -> None:
        self._planned = False
        if not self.under_way:
            return
        now_ms = self.engine.now_ms
        if self.line.blocked_until_ms(up=self.up) > now_ms or self.under_way[0][0] > now_ms:
            self._plan()
            return
        _, frame = self.under_way.popleft()
        self._plan()
        self.deliver(frame)

    def break_off(self, *, late: bool) -> None:
        """The connection is gone. `late`: the first of what was under way arrives after all."""
        self.broken = True
        if not late or not self.under_way:
            self.under_way.clear()
            return
        kept = self.engine.random.randint(0, len(self.under_way))
        while len(self.under_way) > kept:
            self.under_way.pop()


class Wire:
    """One connection. Both ends set `on_agent_closed` and `on_broker_closed`."""

    def __init__(
        self,
        engine: Engine,
        line: Line,
        to_broker: Callable[[bytes], None],
        to_agent: Callable[[bytes], None],
    ) -> None:
        self.engine = engine
        self.line = line
        self.up = Pipe(engine, line, True, to_broker)
        self.down = Pipe(engine, line, False, to_agent)
        self.open = True
        self.on_agent_closed: Callable[[], None] = _nothing
        self.on_broker_closed: Callable[[], None] = _nothing
        self._told: set[str] = set()

    def close(self, *, late: bool = False) -> None:
        """End it: each side hears of it as soon as its direction works, or has given up before."""
        if not self.open:
            return
        self.open = False
        self.up.break_off(late=late)
        self.down.break_off(late=late)
        now_ms = self.engine.now_ms
        delay_ms = self.line.delay_ms(self.engine) + (2_000 if late else 0)
        up_ms = max(delay_ms, self.line.up_blocked_until_ms - now_ms)
        down_ms = max(delay_ms, self.line.down_blocked_until_ms - now_ms)
        # Nobody waits for ever: each side's own timeouts end what it hears nothing of.
        self.engine.after(min(up_ms, 15_000), self.tell_broker)
        self.engine.after(min(down_ms, 12_000), self.tell_agent)

    def tell_broker(self) -> None:
        """The broker notes the end."""
        if "broker" not in self._told:
            self._told.add("broker")
            self.on_broker_closed()

    def tell_agent(self) -> None:
        """The agent notes the end."""
        if "agent" not in self._told:
            self._told.add("agent")
            self.on_agent_closed()


def _nothing() -> None:
    return None
