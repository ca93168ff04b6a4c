"""What only a database on a disk promises: other processes, durability, a full disk."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from sublet_broker.adapters.sql.engine import connect_engine
from sublet_broker.adapters.sql.migrations import migrate
from sublet_broker.adapters.sql.store import SqlStore
from sublet_broker.market.facts import AccountFact, CounterFact
from sublet_broker.service.ports import StorageFailing, StorageFull, StoreAway

WRITE_FOR_EVER = """
import sys
from sublet_broker.adapters.sql.store import SqlStore
from sublet_broker.market.facts import AccountFact

store = SqlStore(sys.argv[1])
while True:
    with store.transaction() as tx:
        number = tx.next("rounds")
        tx.put(AccountFact("world", number, 0))
        tx.put(AccountFact("fees", 0, number))
    print(number, flush=True)
"""


def test_a_writer_killed_at_any_moment_loses_nothing_it_committed(database_url: str) -> None:
    migrate(database_url)
    last = 0
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOR_EVER, database_url], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        said = [int(writer.stdout.readline()) for _ in range(20)]
        os.kill(writer.pid, signal.SIGKILL)
        said += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
        writer.stdout.close()
        writer.wait()
        assert said == list(range(last + 1, last + 1 + len(said)))
        store = SqlStore(database_url)
        with store.snapshot() as tx:
            counter = tx.get(CounterFact, "rounds")
            assert counter is not None
            # It may have been killed after a commit and before it could say so.
            assert said[-1] <= counter.value <= said[-1] + 1
            assert tx.find(AccountFact) == [
                AccountFact("fees", 0, counter.value),
                AccountFact("world", counter.value, 0),
            ]
        store.close()
        last = counter.value


def test_another_process_reads_while_we_write(database_url: str) -> None:
    migrate(database_url)
    store, reader = SqlStore(database_url), SqlStore(database_url, read_only=True)
    with store.transaction() as tx:
        tx.put(AccountFact("world", 1, 1))
        with reader.snapshot() as other:
            assert other.find(AccountFact) == []
    with reader.snapshot() as other:
        assert other.find(AccountFact) == [AccountFact("world", 1, 1)]
    with pytest.raises(TypeError, match="read-only"), reader.transaction():
        pass
    reader.close()
    store.close()


def test_who_waits_for_a_commit_is_woken_where_nobody_knows_whether_it_was_made(
    database_url: str,
) -> None:
    migrate(database_url)
    store = SqlStore(database_url)
    heard: list[str] = []

    def broken(_connection: Any) -> None:
        # As where a server dies between its commit and its answer.
        raise OperationalError("COMMIT", {}, Exception("the connection is lost"))

    event.listen(store._engine, "commit", broken)

    def write() -> None:
        with store.transaction() as tx:
            tx.next("turns")
            tx.after_commit(lambda: heard.append("look"))

    with pytest.raises((OperationalError, StoreAway)):
        write()
    assert heard == ["look"]
    event.remove(store._engine, "commit", broken)
    write()
    assert heard == ["look", "look"]
    store.close()


def test_a_second_process_waits_for_its_turn(database_url: str) -> None:
    migrate(database_url)
    one, two = SqlStore(database_url), SqlStore(database_url)
    entered, order = threading.Event(), []

    def second() -> None:
        entered.set()
        with two.transaction() as tx:
            order.append("two")
            tx.next("turns")

    thread = threading.Thread(target=second)
    with one.transaction() as tx:
        thread.start()
        assert entered.wait(300)
        order.append("one")
        tx.next("turns")
    thread.join(300)
    assert order == ["one", "two"]
    with one.snapshot() as seen:
        assert seen.get(CounterFact, "turns") == CounterFact("turns", 2)
    one.close()
    two.close()


@pytest.mark.postgres
def test_a_server_that_goes_away_fails_the_one_transaction(postgres_database: str) -> None:
    migrate(postgres_database)
    store = SqlStore(postgres_database)

    def cut_off() -> None:
        with store.transaction() as tx:
            tx.put(AccountFact("world", 1, 0))
            end_sessions(store)
            tx.put(AccountFact("fees", 1, 0))

    with pytest.raises(StoreAway):
        cut_off()
    with store.transaction() as tx:
        assert tx.find(AccountFact) == []
        tx.put(AccountFact("world", 2, 0))
    # A session that ended while nobody used it is noticed before it's used.
    end_sessions(store)
    with store.snapshot() as seen:
        assert seen.get(AccountFact, "world") == AccountFact("world", 2, 0)
    store.close()


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    # No PostgreSQL is needed to find none.
    store = SqlStore(f"postgresql://nobody@/nothing?host={tmp_path}")
    with pytest.raises(StoreAway), store.snapshot():
        pass
    store.close()


def end_sessions(store: SqlStore) -> None:
    """End all sessions of a store's database, as a server that crashes does."""
    engine = connect_engine(store.url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    engine.dispose()


def test_a_disk_that_cannot_be_written(sqlite_url: str) -> None:
    migrate(sqlite_url)
    store = SqlStore(sqlite_url)
    engine: Any = store._engine

    def query_only(on: bool) -> None:
        @event.listens_for(engine, "checkout")
        def set_it(connection: Any, *_: object) -> None:
            connection.execute(f"PRAGMA query_only = {int(on)}")

    query_only(True)  # SQLite's own way to be on a disk that became read-only
    with pytest.raises(StorageFailing), store.transaction() as tx:
        tx.put(AccountFact("world", 1, 0))
    query_only(False)
    with store.transaction() as tx:
        assert tx.find(AccountFact) == []
    store.close()


def test_a_full_disk_fails_the_one_transaction(sqlite_url: str) -> None:
    migrate(sqlite_url)
    store = SqlStore(sqlite_url)
    with store.transaction() as tx:
        tx.put(AccountFact("world", 1, 0))

    # SQLite's own limit on its size gives the very error of a full disk.
    engine: Any = store._engine
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        with store.transaction() as tx:
            for number in range(3000):
                tx.put(AccountFact(f"a{number}" + "x" * 200))

    with pytest.raises(StorageFull):
        fill()
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    with store.transaction() as tx:
        assert tx.find(AccountFact) == [AccountFact("world", 1, 0)]
        tx.put(AccountFact("more"))
    store.close()


def test_sqlite_is_set_up_for_durability(sqlite_url: str) -> None:
    migrate(sqlite_url)
    store = SqlStore(sqlite_url)
    engine: Any = store._engine
    with engine.connect() as connection:
        said = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert said == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    store.close()


def test_a_read_only_store_can_not_write_even_by_hand(sqlite_url: str, tmp_path: Path) -> None:
    migrate(sqlite_url)
    store = SqlStore(sqlite_url, read_only=True)
    engine: Any = store._engine
    with engine.connect() as connection, pytest.raises(OperationalError) as refused:
        connection.exec_driver_sql("DELETE FROM counter")
    assert isinstance(refused.value.orig, sqlite3.OperationalError)
    missing = SqlStore(f"sqlite:///{tmp_path / 'absent.sqlite'}", read_only=True)
    with pytest.raises(OperationalError), missing.snapshot():
        pass
    assert not (tmp_path / "absent.sqlite").exists()
    store.close()
    missing.close()
