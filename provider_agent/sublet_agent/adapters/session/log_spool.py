"""The runs' output on its way to the broker: numbered once, kept until the broker has it.

The runner's cursor and the lines it gave are committed together, so that a kill -9 neither repeats
nor skips a line. Bounded: beyond MAX_BYTES of a run lines are counted, not kept.
"""

import contextlib
import sqlite3
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from sublet_agent.adapters.session.disk_reserve import Reserve, with_reserve
from sublet_agent.core.runner_port import LINE_BYTES, OutputLine
from sublet_contracts.wire import (
    MAX_LOG_LINE_CHARACTERS,
    MAX_LOG_LINES_PER_FRAME,
    LogLine,
)

MAX_BYTES = 64 * 1024 * 1024
FRAME_BYTES = 256 * 1024
MOVE_BYTES = 4 * 1024 * 1024
_ROWS_AT_ONCE = 180
"""in one statement: with each, SQLite lets other threads have the interpreter, and the event loop
then waits for it. Line by line, 4,000 of them beside one busy thread took 0.4 s."""
_SQLITES_OWN_PAGES = 1000
"""After so many pages SQLite moves its log by itself, within a commit."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS logs (
    lease TEXT PRIMARY KEY, cursor TEXT, next INTEGER NOT NULL, confirmed INTEGER NOT NULL,
    bytes INTEGER NOT NULL, dropped INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS lines (
    lease TEXT NOT NULL, number INTEGER NOT NULL, time_ms INTEGER NOT NULL, stream TEXT NOT NULL,
    text TEXT NOT NULL, PRIMARY KEY (lease, number)) WITHOUT ROWID;
"""


class Spool:
    """Lines of all runs. Used from one thread."""

    def __init__(self, path: Path, reserve: Reserve) -> None:
        self.reserve = reserve
        self._newest_ms: dict[tuple[str, str], int] = {}
        """(lease, stream) -> when its newest line was written, of what came since the start"""
        self._path = path
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        # NORMAL: a kill loses nothing; after a power cut cursor and lines go back together.
        self._db.execute("PRAGMA synchronous=NORMAL")
        (pages,) = self._db.execute("PRAGMA wal_autocheckpoint").fetchone()
        if pages == _SQLITES_OWN_PAGES:
            # `move_log` comes long before that, and from a thread: this one may not wait so long.
            self._db.execute(f"PRAGMA wal_autocheckpoint={16 * _SQLITES_OWN_PAGES}")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def move_log(self) -> None:
        """Move what was written into the database, where SQLite's log has grown: that waits for
        the disk. From any thread."""
        try:
            if self._path.with_name(self._path.name + "-wal").stat().st_size < MOVE_BYTES:
                return
            with contextlib.closing(sqlite3.connect(self._path, isolation_level=None)) as db:
                db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except (sqlite3.OperationalError, FileNotFoundError):
            # Somebody else is at it, or the disk is full: what was written stays where it is, and
            # is read from there. In the end SQLite moves it by itself.
            return

    def cursor(self, lease: str) -> str | None:
        """Return where to read on in the runner's output."""
        row = self._db.execute("SELECT cursor FROM logs WHERE lease=?", (lease,)).fetchone()
        return row[0] if row else None

    @with_reserve
    def add(self, lease: str, lines: Iterable[OutputLine], cursor: str | None) -> None:
        """Number and keep lines, and the cursor after them."""
        run = self._db.execute
        run("BEGIN IMMEDIATE")
        try:
            run("INSERT OR IGNORE INTO logs VALUES (?,NULL,0,0,0,0)", (lease,))
            row = run("SELECT next, bytes, dropped FROM logs WHERE lease=?", (lease,)).fetchone()
            number, size, dropped = row
            rows: list[tuple[str, int, int, str, str]] = []
            for line in lines:
                self._newest_ms[lease, line.stream] = line.time_ms
                text = line.text[:MAX_LOG_LINE_CHARACTERS]
                size += len(text) + LINE_BYTES
                if size > MAX_BYTES and line.stream != "sublet":
                    dropped += 1
                    continue
                rows.append((lease, number, max(0, line.time_ms), line.stream, text))
                number += 1
            for begin in range(0, len(rows), _ROWS_AT_ONCE):
                some = rows[begin : begin + _ROWS_AT_ONCE]
                places = ",".join(["(?,?,?,?,?)"] * len(some))
                run(f"INSERT INTO lines VALUES {places}", list(chain.from_iterable(some)))
            run(
                "UPDATE logs SET cursor=COALESCE(?, cursor), next=?, bytes=?, dropped=? "
                "WHERE lease=?",
                (cursor, number, size, dropped, lease),
            )
            run("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                run("ROLLBACK")
            raise

    @with_reserve
    def add_dropped_line(self, lease: str, now_ms: int) -> None:
        """At the end: one line that says how much is missing, if any is."""
        row = self._db.execute("SELECT dropped FROM logs WHERE lease=?", (lease,)).fetchone()
        if row and row[0]:
            says = f"{row[0]} further lines were left out: a run's log is kept to {MAX_BYTES} bytes"
            self.add(lease, [OutputLine("sublet", now_ms, says)], None)
            self._db.execute("UPDATE logs SET dropped=0 WHERE lease=?", (lease,))

    def batch(self, lease: str, start: int | None = None) -> tuple[LogLine, ...]:
        """Return the next lines for one frame: from `start`, or from what is confirmed."""
        row = self._db.execute("SELECT confirmed FROM logs WHERE lease=?", (lease,)).fetchone()
        if row is None:
            return ()
        rows = self._db.execute(
            "SELECT number, time_ms, stream, text FROM lines WHERE lease=? AND number>=? "
            "ORDER BY number LIMIT ?",
            (lease, row[0] if start is None else start, MAX_LOG_LINES_PER_FRAME),
        )
        batch: list[LogLine] = []
        size = 0
        for number, time_ms, stream, text in rows:
            size += len(text) * 2 + 100
            if batch and size > FRAME_BYTES:
                break
            batch.append(LogLine(number=number, time_ms=time_ms, stream=stream, text=text))
        return tuple(batch)

    @with_reserve
    def confirm(self, lease: str, next_number: int) -> None:
        """The broker has all lines before this one: forget them."""
        run = self._db.execute
        run(
            "UPDATE logs SET confirmed=MAX(confirmed, MIN(next, ?)) WHERE lease=?",
            (next_number, lease),
        )
        run(
            "DELETE FROM lines WHERE lease=? AND number<(SELECT confirmed FROM logs WHERE lease=?)",
            (lease, lease),
        )

    def newest_ms(self, lease: str, stream: str) -> int:
        """Return when the newest line of a run's stream was written; 0: none came since the agent's
        start."""
        return self._newest_ms.get((lease, stream), 0)

    def next_number(self, lease: str) -> int:
        """Return how many lines of a run were numbered."""
        row = self._db.execute("SELECT next FROM logs WHERE lease=?", (lease,)).fetchone()
        return int(row[0]) if row else 0

    def unconfirmed(self, lease: str) -> int:
        """Return how many lines the broker doesn't have yet."""
        row = self._db.execute("SELECT next-confirmed FROM logs WHERE lease=?", (lease,)).fetchone()
        return int(row[0]) if row else 0

    @with_reserve
    def forget(self, lease: str) -> None:
        """Drop a run's lines."""
        for key in [key for key in self._newest_ms if key[0] == lease]:
            del self._newest_ms[key]
        self._db.execute("DELETE FROM lines WHERE lease=?", (lease,))
        self._db.execute("DELETE FROM logs WHERE lease=?", (lease,))
