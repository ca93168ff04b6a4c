"""Where the agent speaks: plain lines; on a terminal also a live picture below them.

The terminal is written to by a thread of its own: one that is stopped (Ctrl-S) or slow must not
keep the agent from its heartbeats.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sublet_agent.adapters.owner.dashboard import safe, status_lines
from sublet_agent.core.status import Status

MAX_WAITING_LINES = 1000
"""for a terminal that takes none; older ones are left out"""
CLOSE_S = 2.0


class OwnerOutput(Protocol):
    """How the agent speaks to its owner."""

    def say(self, text: str) -> None:
        """Print a line, with the time."""

    def show(self, status: Status) -> None:
        """Show how it stands, where that can be shown."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def make_output(as_json: bool) -> OwnerOutput:
    """Return the output for this stdout: a terminal that can move its cursor gets the picture."""
    console = Console(highlight=False, emoji=False, markup=False)
    if console.is_terminal and not console.is_dumb_terminal and not as_json:
        return Screen(console)
    return Lines(as_json)


class Lines:
    """Plain lines, or JSON ones, on stdout."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self._has_reader = True

    def say(self, text: str) -> None:
        """Print a line. Where nobody reads any more the agent works on in silence."""
        if self._json:
            line = json.dumps({"time_ms": time.time_ns() // 1_000_000, "says": text})
        else:
            line = f"{_now()} {_lines(text)}"
        try:
            if self._has_reader:
                print(line, flush=True)
        except OSError:
            self._has_reader = False

    def show(self, status: Status) -> None:
        """Show nothing: lines are for a log."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return


class Screen:
    """Lines that scroll by, and the picture below them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines: deque[tuple[str, str]] = deque(maxlen=MAX_WAITING_LINES)
        self._status: Status | None = None
        self._closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="screen", daemon=True)

    def say(self, text: str) -> None:
        """Print a line above the picture. Returns at once; any thread may call."""
        self._lines.append((_now(), _lines(text)))
        self._wake.set()

    def show(self, status: Status) -> None:
        """Draw this from now on. Returns at once."""
        self._status = status
        self._wake.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join(CLOSE_S)

    def _draw(self) -> None:
        try:
            with Live(
                _NewestStatus(lambda: self._status),
                console=self._console,
                auto_refresh=False,
                transient=True,
            ) as live:
                while not self._closing:
                    self._wake.wait()
                    self._wake.clear()
                    self._print()
                    live.refresh()
            self._print()
        except OSError:
            # The terminal is gone, and the hangup is dealt with elsewhere: nobody reads.
            return

    def _print(self) -> None:
        while self._lines:
            stamp, words = self._lines.popleft()
            row = Table.grid(padding=(0, 1))
            row.add_row(Text(stamp, style="dim"), Text(words, overflow="fold"))
            self._console.print(row)


class _NewestStatus:
    """Asks for the newest status whenever it is drawn."""

    def __init__(self, status: Callable[[], Status | None]) -> None:
        self._newest = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        status = self._newest()
        if status is not None:
            yield from status_lines(status, width=options.max_width, height=options.size.height)


def _now() -> str:
    return time.strftime("%H:%M:%S")


def _lines(text: str) -> str:
    """Return a message as it may be printed: strangers' words may be in it."""
    return "\n".join(safe(line.replace("\t", " ")) for line in text.splitlines())
