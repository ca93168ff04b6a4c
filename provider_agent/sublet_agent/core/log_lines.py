"""From the bytes that a job writes to the lines that are kept of them. Pure. Rules:

1. A line feed ends a line. What was not ended when the job ended is a line too.
2. A carriage return begins the line anew: of a progress bar's many states the last one is the line.
   It and a line feed together end a line, wherever the bytes were cut in between.
3. A line that is longer than MAX_LINE_BYTES comes in pieces, cut between characters.
4. Text is decoded a whole line at a time, so that no character is ever cut by where bytes happened
   to be read; what is no UTF-8 is shown as the replacement character.

A line that is written in two goes (its text, then its end) is unfinished only in between: it counts
as such once it has stood for STANDS_MS.

What is held back is at most MAX_LINE_BYTES and a carriage return, whatever a job writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from sublet_agent.core.runner_port import MAX_LINE_BYTES

STANDS_MS = 300
_MOST_OF_A_CHARACTER = 4


@dataclass
class LineBuffer:
    """One stream of a job's output. `held`: what of it is not yet part of a finished line."""

    held: bytes = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take what was written next; return the lines that it finishes, without their ends."""
        *ended, rest = (self.held + data).split(b"\n")
        lines: list[bytes] = []
        for line in ended:
            lines += pieces(last_state(line))
        self.held = _shortened(rest)
        while len(self.held.rstrip(b"\r")) > MAX_LINE_BYTES:
            at = cut_between_characters(self.held, MAX_LINE_BYTES)
            lines.append(self.held[:at])
            self.held = self.held[at:]
        return lines

    def end(self) -> list[bytes]:
        """The stream is over: return what was held as the line that it is, if it is one."""
        held, self.held = last_state(self.held), b""
        return [held] if held else []

    @property
    def state(self) -> bytes:
        """How the unfinished line stands."""
        return last_state(self.held)


def last_state(line: bytes) -> bytes:
    """Return what a terminal would show last of a line with carriage returns in it."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def _shortened(line: bytes) -> bytes:
    """Return an unfinished line without the states that were overwritten. A carriage return at its
    end stays: a line feed may follow it."""
    ended = b"\r" if line.endswith(b"\r") else b""
    return last_state(line) + ended


def pieces(line: bytes) -> list[bytes]:
    """Return a line in pieces of at most MAX_LINE_BYTES; one piece of an empty line."""
    found: list[bytes] = []
    while len(line) > MAX_LINE_BYTES:
        at = cut_between_characters(line, MAX_LINE_BYTES)
        found.append(line[:at])
        line = line[at:]
    return [*found, line]


def cut_between_characters(data: bytes, most_bytes: int) -> int:
    """Return where to cut, at `most_bytes` or the few bytes before that keep a character whole.
    Where nothing there is UTF-8 it is cut all the same."""
    for at in range(most_bytes, max(most_bytes - _MOST_OF_A_CHARACTER, 0), -1):
        if at >= len(data) or data[at] & 0xC0 != 0x80:
            return min(at, len(data))
    return most_bytes


def shown(line: bytes) -> str:
    """Return a line as text."""
    return line.decode("utf-8", "replace")


class Begun:
    """Since when the line stands that a stream is at."""

    def __init__(self) -> None:
        self._since_ms: int | None = None

    def wrote(self, held: bytes, now_ms: int, *, ended_one: bool) -> None:
        """Something was written; `held`: what is unfinished after it, `ended_one`: it ended a line
        before that."""
        if not held:
            self._since_ms = None
        elif self._since_ms is None or ended_one:
            self._since_ms = now_ms

    def stands(self, now_ms: int) -> bool:
        """Say whether it has stood for long enough to be shown."""
        return self._since_ms is not None and now_ms - self._since_ms >= STANDS_MS


@dataclass
class UnfinishedLine:
    """How the line stands that a stream is at, for who is shown nothing but that."""

    known: bool = True
    """False: what is fed begins somewhere in a line. Its beginning is awaited."""
    held: bytes = b""

    def feed(self, data: bytes) -> None:
        """Take what was written next."""
        _, ended, rest = data.rpartition(b"\n")
        held = rest if ended else self.held + rest
        if not self.known and not ended:
            _, begun, held = held.partition(b"\r")
            if not begun:
                return
        self.known = True
        held = _shortened(held)
        while len(held.rstrip(b"\r")) > MAX_LINE_BYTES:
            held = held[cut_between_characters(held, MAX_LINE_BYTES) :]
        self.held = held

    @property
    def state(self) -> bytes:
        """How it stands; nothing where it is not begun, or not known."""
        return last_state(self.held)
