"""The spool's log is moved into its database from a thread, and not within a commit."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from sublet_agent.adapters.session.disk_reserve import Reserve
from sublet_agent.adapters.session.log_spool import MOVE_BYTES, Spool
from sublet_agent.core.runner_port import OutputLine

LINE = OutputLine("stdout", 1, "x" * 1000)


def fill(spool: Spool, path: Path) -> int:
    """Add lines until the log has grown for long enough to be moved; return how many."""
    wal = path.with_name(path.name + "-wal")
    count = 0
    while wal.stat().st_size < MOVE_BYTES + 1_000_000:
        spool.add("lease", [LINE] * 200, str(count))
        count += 200
    return count


def in_database(path: Path, folder: Path) -> int:
    """How many lines the database holds without its log: of a copy that has none."""
    copy = folder / "copy.db"
    copy.write_bytes(path.read_bytes())
    try:
        with sqlite3.connect(copy) as db:
            return int(db.execute("SELECT count(*) FROM lines").fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # not even the tables are there


@pytest.mark.parametrize("beside", [False, True])
def test_it_is_moved_when_it_has_grown_and_a_writer_goes_on(tmp_path: Path, beside: bool) -> None:
    path = tmp_path / "spool.db"
    spool = Spool(path, Reserve(tmp_path / "reserve"))
    spool.add("lease", [LINE], "0")
    before = in_database(path, tmp_path)
    spool.move_log()
    assert in_database(path, tmp_path) == before, "it is not worth the while yet"
    count = 1 + fill(spool, path)
    assert in_database(path, tmp_path) == before, "a commit has moved it"
    if beside:  # somebody writes at that time
        spool._db.execute("BEGIN IMMEDIATE")
        spool.move_log()
        spool._db.execute("COMMIT")
    else:
        spool.move_log()
    assert in_database(path, tmp_path) == count
    size = path.with_name("spool.db-wal").stat().st_size
    spool.add("lease", [LINE], "last")
    assert path.with_name("spool.db-wal").stat().st_size == size, "it begins anew"
    assert (spool.unconfirmed("lease"), spool.cursor("lease")) == (count + 1, "last")
    spool.close()


def test_where_it_can_not_be_moved_it_stays_and_is_read(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    spool = Spool(path, Reserve(tmp_path / "reserve"))
    count = fill(spool, path)
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM lines").fetchone() == (count,)
    spool.add("lease", [LINE], "later")
    spool.move_log()
    assert spool.unconfirmed("lease") == count + 1
    reader.close()
    spool.close()


def test_many_lines_are_few_calls_of_sqlite(tmp_path: Path) -> None:
    """With each, other threads get the interpreter, and the event loop waits to have it back."""
    spool = Spool(tmp_path / "spool.db", Reserve(tmp_path / "reserve"))
    spool.add("lease", [LINE], "0")
    asked: list[str] = []
    spool._db.set_trace_callback(asked.append)
    spool.add("lease", [OutputLine("stdout", n, str(n)) for n in range(4_001)], "1")
    spool._db.set_trace_callback(None)
    assert len(asked) < 40
    assert (spool.next_number("lease"), spool.cursor("lease")) == (4_002, "1")
    for start in (1, 180, 181, 4_001):
        first = spool.batch("lease", start)[0]
        assert (first.number, first.text) == (start, str(start - 1))
    spool.close()
