"""The stores under test: one fixture, one suite, as many implementations as there are."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from sublet_broker.adapters.sql.engine import connect_engine
from sublet_broker.adapters.sql.migrations import migrate
from sublet_broker.adapters.sql.store import SqlStore
from sublet_broker.adapters.sql.tables import Row
from sublet_broker.service.ports import Store
from tests.services import postgres_url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """An SQLite database of this test's own, not made yet."""
    return f"sqlite:///{tmp_path / 'broker.sqlite'}"


@pytest.fixture
def postgres_database() -> Iterator[str]:
    """An empty PostgreSQL database of this test's own."""
    with _new_postgres_database() as url:
        yield url


@pytest.fixture(scope="session")
def postgres_migrated() -> Iterator[SqlStore]:
    """A migrated PostgreSQL database that tests share, one after the other."""
    with _new_postgres_database() as url:
        migrate(url)
        opened = SqlStore(url)
        yield opened
        opened.close()


@pytest.fixture
def postgres_store(postgres_migrated: SqlStore) -> SqlStore:
    """The shared PostgreSQL store, emptied (TRUNCATE passes by the guards against DELETE)."""
    opened = SqlStore(postgres_migrated.url)
    names = ", ".join(f'"{name}"' for name in Row.metadata.tables)
    engine = connect_engine(postgres_migrated.url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"TRUNCATE {names}")
    engine.dispose()
    return opened


@contextmanager
def _new_postgres_database() -> Iterator[str]:
    server = postgres_url()
    plain = server.replace("postgresql+psycopg://", "postgresql://", 1)
    name = f"sublet_test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        yield server.rsplit("/", 1)[0] + f"/{name}"
    finally:
        with psycopg.connect(plain, autocommit=True) as connection:
            statement = sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
            connection.execute(statement)


@pytest.fixture
def sqlite_store(sqlite_url: str) -> SqlStore:
    """A migrated SQLite store."""
    migrate(sqlite_url)
    return SqlStore(sqlite_url)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database, of each kind."""
    fixture = "sqlite_url" if request.param == "sqlite" else "postgres_database"
    url: str = request.getfixturevalue(fixture)
    return url


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def sql_store(request: pytest.FixtureRequest) -> Iterator[SqlStore]:
    """Each SQL store in turn, migrated and empty."""
    opened: SqlStore = request.getfixturevalue(f"{request.param}_store")
    yield opened
    opened.close()


@pytest.fixture(
    params=["memory", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)],
)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """Each store in turn, empty."""
    if request.param == "memory":
        from sublet_broker.adapters.memory.store import MemoryStore

        yield MemoryStore()
        return
    opened: SqlStore = request.getfixturevalue(f"{request.param}_store")
    yield opened
    opened.close()
