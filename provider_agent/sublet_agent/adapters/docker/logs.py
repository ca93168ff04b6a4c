"""Reads a container's log on from a cursor, so that no line comes twice and none is skipped.

The engine writes stdout and stderr by two writers: only within one stream are times in order. So
each stream has its own place: the time of the last message in nanoseconds, and how many messages of
that very time were read. The engine cuts what has no end yet into messages of 16 KiB, in the middle
of a character if need be, and only those have no end: what is shorter has ended, whether its line
feed was kept or not. log_lines.py makes lines of them, and what it holds back of a line stands in
the cursor. A cursor is `stdout's time.count.held,stderr's time.count.held`, held in base64.

The engine keeps the newest lines only. Where the message at the cursor is gone, a line of stream
`sublet` says what time span was lost (the engine does not tell how many bytes).
"""

from __future__ import annotations

import base64
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sublet_agent.core.log_lines import LineBuffer, shown
from sublet_agent.core.runner_port import LINE_BYTES, LogBatch, OutputLine, RunnerError

Stream = Literal["stdout", "stderr"]
STREAMS: tuple[Stream, ...] = ("stdout", "stderr")
_NS = 1_000_000_000
_CUT_BYTES = 16 * 1024
_RECORD_OVERHEAD_BYTES = 28  # of one message in the engine's own file, at the least


@dataclass(frozen=True)
class _Place:
    time_ns: int = 0
    count: int = 0
    held: bytes = b""

    def __str__(self) -> str:
        held = base64.urlsafe_b64encode(self.held).decode("ascii")
        return f"{self.time_ns}.{self.count}.{held}"

    @classmethod
    def parse(cls, text: str) -> _Place:
        """Raises ValueError."""
        time_ns, count, held = text.split(".")
        return cls(int(time_ns), int(count), base64.b64decode(held, altchars="-_", validate=True))


def read(
    api: Any,
    container: str,
    cursor: str | None,
    limit_bytes: int,
    log_bytes: int,
    *,
    ended: bool = False,
) -> LogBatch:
    """Return the lines after `cursor`; `log_bytes` is what the engine keeps of this container.
    `ended`: nothing more is written, so that a line without an end is one."""
    places = _parse(cursor)
    batches = [
        _read_stream(api, container, stream, place, limit_bytes, log_bytes, ended)
        for stream, place in zip(STREAMS, places, strict=True)
    ]
    lines = tuple(heapq.merge(*(b[0] for b in batches), key=lambda line: line.time_ms))
    after = ",".join(str(place) for _, place, _ in batches)
    return LogBatch(lines, after, any(more for _, _, more in batches))


def _parse(cursor: str | None) -> tuple[_Place, _Place]:
    if cursor is None:
        return _Place(), _Place()
    try:
        stdout, stderr = map(_Place.parse, cursor.split(","))
    except (ValueError, TypeError) as error:
        raise RunnerError(f"cursor {cursor!r} is none of this runner's: start at None") from error
    return stdout, stderr


def _read_stream(
    api: Any,
    container: str,
    stream: Stream,
    place: _Place,
    limit_bytes: int,
    log_bytes: int,
    ended: bool,
) -> tuple[list[OutputLine], _Place, bool]:
    lines: list[OutputLine] = []
    taken = written = 0
    time_ns, count, skip = place.time_ns, place.count, place.count
    first = True
    buffer = LineBuffer(place.held)

    def add(found: list[bytes], when_ns: int) -> None:
        lines.extend(OutputLine(stream, when_ns // 1_000_000, shown(line)) for line in found)

    for when_ns, data in _messages(api, container, stream, place.time_ns):
        if first and place.time_ns and when_ns != place.time_ns:
            # What was held back ends here: how that line went on is not known.
            add(buffer.end(), place.time_ns)
            lost = f"between {_clock(place.time_ns)} and {_clock(when_ns)} UTC"
            lines.append(_remark(when_ns, f"{stream} {lost}", log_bytes))
        first = False
        if when_ns == place.time_ns and skip:
            skip -= 1
            continue
        written += len(data) + _RECORD_OVERHEAD_BYTES
        if taken >= limit_bytes:
            # The very first read goes to the end, to see whether the engine has dropped any yet.
            if place.time_ns or written > log_bytes // 2:
                break
            continue
        taken += len(data) + LINE_BYTES
        add(buffer.feed(data), when_ns)
        time_ns, count = when_ns, count + 1 if when_ns == time_ns else 1
    more = taken >= limit_bytes
    if ended and not more:
        add(buffer.end(), time_ns)
    if not place.time_ns and written > log_bytes // 2 and lines:
        lines.insert(
            0, _remark(lines[0].time_ms * 1_000_000, f"{stream} before this, maybe", log_bytes)
        )
    return lines, _Place(time_ns, count, buffer.held), more


def _remark(time_ns: int, what: str, log_bytes: int) -> OutputLine:
    return OutputLine(
        "sublet",
        time_ns // 1_000_000,
        f"[sublet] output was dropped: {what}; the newest {log_bytes // 1024} KiB are kept",
    )


def _clock(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / _NS, UTC).strftime("%H:%M:%S.%f")[:-3]


def _messages(api: Any, container: str, stream: str, since_ns: int) -> Iterator[tuple[int, bytes]]:
    # The SDK's own `logs` takes no nanoseconds, and joins what it can't tell apart afterwards.
    query = {
        "stdout": int(stream == "stdout"),
        "stderr": int(stream == "stderr"),
        "timestamps": 1,
        "since": f"{since_ns // _NS}.{since_ns % _NS:09d}",
    }
    response = api._get(api._url("/containers/{0}/logs", container), params=query, stream=True)
    try:
        api._raise_for_status(response)
        frames = Frames()
        for chunk in response.iter_content(64 * 1024):
            for _, frame in frames.feed(chunk):
                yield _message(frame)
    finally:
        response.close()


class Frames:
    """Takes the engine's multiplexed stream apart: a header of 8 bytes, then so many of content."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield (1 stdout or 2 stderr, content) of each frame that is whole by now."""
        self._pending += data
        start = 0
        while len(self._pending) - start >= 8:
            size = int.from_bytes(self._pending[start + 4 : start + 8], "big")
            if len(self._pending) - start - 8 < size:
                break
            yield self._pending[start], self._pending[start + 8 : start + 8 + size]
            start += 8 + size
        self._pending = self._pending[start:]


def _message(frame: bytes) -> tuple[int, bytes]:
    stamp, _, text = frame.partition(b" ")
    whole, _, fraction = stamp.decode("ascii").rstrip("Z").partition(".")
    seconds = int(datetime.fromisoformat(whole + "+00:00").timestamp())
    if len(text) < _CUT_BYTES and not text.endswith(b"\n"):
        text += b"\n"
    return seconds * _NS + int((fraction + "0" * 9)[:9]), text
