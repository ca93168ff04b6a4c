"""A run's output on disk, bounded: written by the supervisor, read by the agent at a cursor.

Segments `log-<number of the first line>` of JSON lines [number, bytes before it, ms, stream,
text]; the newest two are kept. Numbers and bytes count on over what was dropped, so a reader who
comes late can say exactly how much that was. A cursor is `number.bytes.segment.offset`: the next
line's number, the bytes before it, and where in which segment it is expected.

A job can reach these files: a line that is none of the writer's is left out, and that is said.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import BinaryIO, Literal

from sublet_agent.adapters.process.files import open_plain
from sublet_agent.core.runner_port import (
    LINE_BYTES,
    MAX_LINE_BYTES,
    LogBatch,
    OutputLine,
    RunnerError,
)

_KEPT_SEGMENTS = 2
_PREFIX = "log-"
_SEGMENT = re.compile(rf"{_PREFIX}(0|[1-9][0-9]{{0,17}})\Z")
_MOST_SEGMENTS = 64
_MOST_RECORD_BYTES = 8 * MAX_LINE_BYTES
"""In JSON a letter takes six bytes at worst."""
_DAMAGED = "[sublet] damaged output is left out here"


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
    found = filter(None, map(_SEGMENT.match, os.listdir(directory)))
    return sorted(int(name[1]) for name in found)


def read(directory: Path, cursor: str | None, limit_bytes: int) -> LogBatch:
    """Return the lines after `cursor`, and one that counts what was dropped in between."""
    number, before, segment, offset = _parse(cursor)
    lines: list[OutputLine] = []
    taken = 0
    for first in _listed(directory)[-_MOST_SEGMENTS:]:
        if first < segment:
            continue
        try:
            with open_plain(directory / f"{_PREFIX}{first}") as file:
                file.seek(offset if first == segment else 0)
                while taken < limit_bytes:
                    raw = file.readline(_MOST_RECORD_BYTES)
                    whole = raw.endswith(b"\n")
                    if not whole and len(raw) < _MOST_RECORD_BYTES:
                        break  # the end, or a line that is being written
                    segment, offset = first, file.tell()
                    line = _line(raw) if whole else None
                    if line is None:
                        taken += len(raw)
                        if not lines or lines[-1].text != _DAMAGED:
                            when_ms = int(os.fstat(file.fileno()).st_mtime * 1000)
                            lines.append(OutputLine("sublet", when_ms, _DAMAGED))
                        continue
                    found, bytes_before, shown = line
                    if found < number:
                        continue
                    if found > number:
                        lost = f"{found - number} lines, {bytes_before - before} bytes"
                        remark = f"[sublet] output was dropped here: {lost}"
                        lines.append(OutputLine("sublet", shown.time_ms, remark))
                    lines.append(shown)
                    number, before = found + 1, bytes_before + len(shown.text.encode()) + 1
                    taken += len(shown.text) + LINE_BYTES
        except OSError:
            continue  # dropped since it was listed; the next segment's first line tells the gap
        if taken >= limit_bytes:
            break
    return LogBatch(tuple(lines), f"{number}.{before}.{segment}.{offset}", taken >= limit_bytes)


def _listed(directory: Path) -> list[int]:
    try:
        return segments(directory)
    except OSError:
        return []


def _line(raw: bytes) -> tuple[int, int, OutputLine] | None:
    """Return a line's number, the bytes before it, and itself; None if it is none of ours."""
    try:
        number, before, time_ms, stream, text = json.loads(raw)
        numbers_fit = all(type(n) is int and 0 <= n < 2**53 for n in (number, before, time_ms))
        if not numbers_fit or stream not in ("stdout", "stderr", "sublet"):
            return None
        text.encode()  # fails on what is no text, and on half a letter
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return number, before, OutputLine(stream, time_ms, text)


def _parse(cursor: str | None) -> tuple[int, int, int, int]:
    if cursor is None:
        return 0, 0, 0, 0
    try:
        number, before, segment, offset = map(int, cursor.split("."))
    except ValueError as error:
        raise RunnerError(f"cursor {cursor!r} is none of this runner's: start at None") from error
    return number, before, segment, offset
