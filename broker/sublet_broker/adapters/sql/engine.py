"""Connections: how an SQLAlchemy engine for the broker's database is set up.

SQLite: WAL, so that readers and the one writer never wait for each other; synchronous FULL, so that
what was committed survives a power cut; transactions are begun by us, because the driver's own
begin would take the write lock late and then fail half-way. PostgreSQL: its defaults are durable.
"""

from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

BUSY_TIMEOUT_MS = 10_000
_BROKER_LOCK = 0x5B1E8


class DatabaseInUse(Exception):
    """Another broker uses this database."""


class Claim:
    """This broker's claim to a PostgreSQL database: an advisory lock, held by a connection of its
    own for as long as the process lives, however it ends. An SQLite file lies in the data folder,
    which has its own lock."""

    def __init__(self, url: str) -> None:
        """Take the database. Raises DatabaseInUse, DatabaseUnsupported, SQLAlchemyError."""
        self._engine: Engine | None = None
        self._connection: Connection | None = None
        if make_url(url).get_backend_name() == "postgresql":
            self._engine = connect_engine(url)
            try:
                self._take()
            except BaseException:
                self.close()
                raise

    def trouble(self) -> str:
        """Say what is wrong with the claim, or "". A connection that broke is made again."""
        if self._engine is None:
            return ""
        try:
            if self._connection is not None:
                self._connection.exec_driver_sql("SELECT 1")
                return ""
        except SQLAlchemyError:
            # The server was away, and with it the lock.
            self._drop()
        try:
            self._take()
        except DatabaseInUse as error:
            return str(error)
        except SQLAlchemyError:
            return "the database doesn't answer"
        return ""

    def close(self) -> None:
        """Let another broker have it, from this moment on."""
        if self._connection is not None:
            # The server notices only a while later that a connection was closed. One that is broken
            # holds nothing.
            with suppress(SQLAlchemyError):
                self._connection.exec_driver_sql(f"SELECT pg_advisory_unlock({_BROKER_LOCK})")
        self._drop()
        if self._engine is not None:
            self._engine.dispose()

    def _take(self) -> None:
        assert self._engine is not None
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        got = connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({_BROKER_LOCK})").scalar()
        if not got:
            connection.close()
            raise DatabaseInUse(
                "another broker uses this database: stop it, or name another --database "
                "(SELECT pid FROM pg_locks WHERE locktype = 'advisory' shows its connection)"
            )
        self._connection = connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # A connection that goes back to the pool would keep its lock.
            connection.invalidate()
            connection.close()


class DatabaseUnsupported(ValueError):
    """The URL names a database that the broker can't use."""


def connect_engine(url: str, *, read_only: bool = False) -> Engine:
    """Return an engine for `url`: sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME.

    `read_only`: an SQLite file is opened so that it can't be written, and must exist.
    Raises DatabaseUnsupported.
    """
    parsed = make_url(url)
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return _sqlite(parsed, read_only)
    if backend == "postgresql":
        # A broker needs few connections: one writer at a time, and a handful of readers.
        chosen = parsed.set(drivername="postgresql+psycopg")
        return create_engine(chosen, pool_size=8, max_overflow=16, pool_pre_ping=True)
    raise DatabaseUnsupported(
        f"--database {parsed.render_as_string()}: use sqlite:///FILE or postgresql://USER@HOST/NAME"
    )


def _sqlite(parsed: URL, read_only: bool) -> Engine:
    if not parsed.database or parsed.database == ":memory:":
        raise DatabaseUnsupported("--database sqlite: name a file, as in sqlite:////data/db.sqlite")
    if read_only:
        path = parsed.database.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        parsed = parsed.set(database=f"file:{path}", query={"mode": "ro", "uri": "true"})
    engine = create_engine(
        parsed,
        connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_MS / 1000},
        **({"poolclass": NullPool} if read_only else {"pool_size": 8, "max_overflow": 16}),
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself; `begin` below does
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA foreign_keys = ON")
        if not read_only:
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute("PRAGMA synchronous = FULL")
            cursor.execute("PRAGMA temp_store = MEMORY")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine
