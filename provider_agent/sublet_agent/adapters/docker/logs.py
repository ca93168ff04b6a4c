"""Reads a container's log on from a cursor, so that no line comes twice and none is skipped.

The engine writes stdout and stderr by two writers: only within one stream are times in order. So
each stream has its own place: the time of the last line in nanoseconds, and how many lines of
that very time were read. A cursor is `stdout's time.count,stderr's time.count`.

The engine keeps the newest lines only. Where the line at the cursor is gone, a line of stream
`sublet` says what time span was lost (the engine does not tell how many bytes).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sublet_agent.core.runner_port import (
    LINE_BYTES,
    MAX_LINE_BYTES,
    LogBatch,
    OutputLine,
    RunnerError,
)

_STREAMS: tuple[Literal["stdout", "stderr"], ...] = ("stdout", "stderr")
_NS = 1_000_000_000
_RECORD_OVERHEAD_BYTES = 75  # of one line in the engine's own JSON file


@dataclass(frozen=True)
class _Place:
    time_ns: int = 0
    count: int = 0


def read(
    api: Any, container: str, cursor: str | None, limit_bytes: int, log_bytes: int
) -> LogBatch:
    """Return the lines after `cursor`; `log_bytes` is what the engine keeps of this container."""
    places = _parse(cursor)
    batches = [
        _read_stream(api, container, stream, place, limit_bytes, log_bytes)
        for stream, place in zip(_STREAMS, places, strict=True)
    ]
    lines = tuple(heapq.merge(*(b[0] for b in batches), key=lambda line: line.time_ms))
    after = ",".join(f"{place.time_ns}.{place.count}" for _, place, _ in batches)
    return LogBatch(lines, after, any(more for _, _, more in batches))


def _parse(cursor: str | None) -> tuple[_Place, _Place]:
    if cursor is None:
        return _Place(), _Place()
    try:
        stdout, stderr = (_Place(*map(int, part.split("."))) for part in cursor.split(","))
    except (ValueError, TypeError) as error:
        raise RunnerError(f"cursor {cursor!r} is none of this runner's: start at None") from error
    return stdout, stderr


def _read_stream(
    api: Any,
    container: str,
    stream: Literal["stdout", "stderr"],
    place: _Place,
    limit_bytes: int,
    log_bytes: int,
) -> tuple[list[OutputLine], _Place, bool]:
    lines: list[OutputLine] = []
    taken = written = 0
    at, skip = place, place.count
    first = True
    for time_ns, text in _messages(api, container, stream, place.time_ns):
        if first and place.time_ns and time_ns != place.time_ns:
            lost = f"between {_clock(place.time_ns)} and {_clock(time_ns)} UTC"
            lines.append(_remark(time_ns, f"{stream} {lost}", log_bytes))
        first = False
        if time_ns == place.time_ns and skip:
            skip -= 1
            continue
        written += len(text) + _RECORD_OVERHEAD_BYTES
        if taken >= limit_bytes:
            # The very first read goes to the end, to see whether the engine has dropped any yet.
            if place.time_ns or written > log_bytes // 2:
                break
            continue
        taken += len(text) + LINE_BYTES
        lines.append(OutputLine(stream, time_ns // 1_000_000, text.decode("utf-8", "replace")))
        at = _Place(time_ns, at.count + 1 if time_ns == at.time_ns else 1)
    if not place.time_ns and written > log_bytes // 2 and lines:
        lines.insert(
            0, _remark(lines[0].time_ms * 1_000_000, f"{stream} before this, maybe", log_bytes)
        )
    return lines, at, taken >= limit_bytes


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
        pending = b""
        for chunk in response.iter_content(64 * 1024):
            pending += chunk
            start = 0
            while len(pending) - start >= 8:
                size = int.from_bytes(pending[start + 4 : start + 8], "big")
                if len(pending) - start - 8 < size:
                    break
                yield _message(pending[start + 8 : start + 8 + size])
                start += 8 + size
            pending = pending[start:]
    finally:
        response.close()


def _message(frame: bytes) -> tuple[int, bytes]:
    stamp, _, text = frame.partition(b" ")
    whole, _, fraction = stamp.decode("ascii").rstrip("Z").partition(".")
    seconds = int(datetime.fromisoformat(whole + "+00:00").timestamp())
    return seconds * _NS + int((fraction + "0" * 9)[:9]), text.rstrip(b"\r\n")[:MAX_LINE_BYTES]
