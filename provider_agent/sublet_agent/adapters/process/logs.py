"""A run's output on disk, bounded: written by the supervisor, read by the agent at a cursor.

Segments `log-<number of the first line>` of JSON lines [number, bytes before it, ms, stream,
text]; the newest two are kept. Numbers and bytes count on over what was dropped, so a reader who
comes late can say exactly how much that was. A cursor is `number.bytes.segment.offset`: the next
line's number, the bytes before it, and where in which segment it is expected.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO, Literal

from sublet_agent.core.runner_port import LogBatch, OutputLine, RunnerError

_KEPT_SEGMENTS = 2
_PREFIX = "log-"


class LogWriter:
    """Appends lines; drops the oldest segment when two are full. A full disk drops lines too."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._segment_bytes = max(4096, limit_bytes // _KEPT_SEGMENTS)
        self._next_number = 0
        self._bytes_before = 0
        self._file: BinaryIO | None = None
        self._segment_size = 0

    def write(
        self, stream: Literal["stdout", "stderr", "sublet"], time_ms: int, text: bytes
    ) -> None:
        """Append one line, without its newline."""
        shown = text.decode("utf-8", "replace")
        record = (
            json.dumps([self._next_number, self._bytes_before, time_ms, stream, shown]).encode()
            + b"\n"
        )
        try:
            file = self._open()
            file.write(record)
            self._segment_size += len(record)
        except OSError:
            self._file = None  # the numbers go on, so the reader sees how much is missing
        self._next_number += 1
        self._bytes_before += len(text) + 1

    def flush(self, durable: bool = False) -> None:
        """Hand what was written to the system, or to the disk itself."""
        if self._file is None:
            return
        try:
            self._file.flush()
            if durable:
                os.fsync(self._file.fileno())
        except OSError:
            self._file = None

    def _open(self) -> BinaryIO:
        if self._file is None or self._segment_size >= self._segment_bytes:
            if self._file is not None:
                self._file.close()
            for old in segments(self._directory)[: 1 - _KEPT_SEGMENTS]:
                (self._directory / f"{_PREFIX}{old}").unlink()
            self._file = (self._directory / f"{_PREFIX}{self._next_number}").open("ab")
            self._segment_size = 0
        return self._file


def segments(directory: Path) -> list[int]:
    """Return the first line numbers of the segments that are there, in order."""
    names = (p.name.removeprefix(_PREFIX) for p in directory.glob(f"{_PREFIX}*"))
    return sorted(int(name) for name in names if name.isdigit())


def read(directory: Path, cursor: str | None, limit_bytes: int) -> LogBatch:
    """Return the lines after `cursor`, and one that counts what was dropped in between."""
    number, before, segment, offset = _parse(cursor)
    lines: list[OutputLine] = []
    taken = 0
    for first in segments(directory):
        if first < segment:
            continue
        try:
            with (directory / f"{_PREFIX}{first}").open("rb") as file:
                file.seek(offset if first == segment else 0)
                while taken < limit_bytes:
                    raw = file.readline()
                    if not raw.endswith(b"\n"):  # the end, or a line that is being written
                        break
                    found, bytes_before, time_ms, stream, text = json.loads(raw)
                    segment, offset = first, file.tell()
                    if found < number:
                        continue
                    if found > number:
                        lost = f"{found - number} lines, {bytes_before - before} bytes"
                        remark = f"[sublet] output was dropped here: {lost}"
                        lines.append(OutputLine("sublet", time_ms, remark))
                    lines.append(OutputLine(stream, time_ms, text))
                    number, before = found + 1, bytes_before + len(text.encode()) + 1
                    taken += len(text) + 1
        except FileNotFoundError:
            continue  # dropped since it was listed; the next segment's first line tells the gap
        if taken >= limit_bytes:
            break
    return LogBatch(tuple(lines), f"{number}.{before}.{segment}.{offset}", taken >= limit_bytes)


def _parse(cursor: str | None) -> tuple[int, int, int, int]:
    if cursor is None:
        return 0, 0, 0, 0
    try:
        number, before, segment, offset = map(int, cursor.split("."))
    except ValueError as error:
        raise RunnerError(f"cursor {cursor!r} is none of this runner's: start at None") from error
    return number, before, segment, offset
