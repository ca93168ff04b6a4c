"""The Store on SQL: SQLite for one machine, PostgreSQL for a house that has one.

Writers run one at a time, behind a lock of this process and then BEGIN IMMEDIATE (SQLite) or an
advisory lock (PostgreSQL). So a use-case sees everything that was committed before it and nothing
changes under it: serialisable, without retries. SERIALIZABLE with retries is the alternative on
PostgreSQL, and can't be had behind a `with` block, which is unable to run its body again. The
market's transactions take a millisecond, so that one writer is enough.

Readers (`snapshot`) see one committed state and hold nobody up: WAL, or REPEATABLE READ.

Statements are built once per shape and kept; rows become facts directly (codec.py), without ORM
sessions, since each fact is loaded, replaced and forgotten.
"""

import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import (
    Column,
    Connection,
    Delete,
    Engine,
    Executable,
    Select,
    Table,
    bindparam,
    delete,
    func,
    or_,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from sublet_broker.adapters.sql.codec import FactCodec, codec_of
from sublet_broker.adapters.sql.engine import connect_engine
from sublet_broker.adapters.sql.fifo_lock import FifoLock
from sublet_broker.adapters.sql.tables import ROWS
from sublet_broker.market.facts import CounterFact, Fact
from sublet_broker.service.ports import (
    AlreadyThere,
    RuleBroken,
    StorageFailing,
    StorageFull,
    StoreAway,
)

F = TypeVar("F", bound=Fact)

CLOCK_COUNTER = "clock"
_WRITER_LOCK = 0x5B1E7
_ANY_OF = (tuple, set, frozenset)
_DISK_FULL_SQLSTATES = ("53100", "53000")
_AWAY_SQLSTATES = ("08", "57P")
"""Connection exceptions; shutdown, crash of another session, recovery."""


_Filters = tuple[tuple[str, str, bool], ...]
"""For each field that is looked at: its name, how, and whether None counts too."""


class _Shape(NamedTuple):
    """What a find looks like, whatever the values."""

    filters: _Filters
    after: str | None
    before: str | None
    order_by: str | None
    descending: bool
    limited: bool


class _Kind:
    """A kind of fact with its table and the statements that were built for it."""

    def __init__(self, kind: type[Fact], dialect: str) -> None:
        self.codec: FactCodec = codec_of(kind)
        self.table: Table = ROWS[kind].metadata.tables[str(ROWS[kind].__tablename__)]
        self.key: tuple[Column[Any], ...] = tuple(self.table.c[name] for name in kind.KEY)
        self.columns = [self.table.c[field.name] for field in self.codec.fields]
        matches = [column == bindparam(f"key_{i}") for i, column in enumerate(self.key)]
        self.get: Select[Any] = select(*self.columns).where(*matches)
        self.delete: Delete = delete(self.table).where(*matches)
        names = [field.name for field in self.codec.fields]
        changed = [name for name in names if name not in kind.KEY]
        insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
        made = insert(self.table).values({name: bindparam(name) for name in names})
        only_new = made.on_conflict_do_nothing(index_elements=list(kind.KEY))
        # SQLAlchemy forgets an INSERT's row count unless it is told to keep it.
        self.add: Executable = only_new.execution_options(preserve_rowcount=True)
        self.put: Executable = (
            made.on_conflict_do_update(
                index_elements=list(kind.KEY),
                set_={name: made.excluded[name] for name in changed},
            )
            if changed
            else self.add
        )
        self.finds: dict[_Shape, Select[Any]] = {}
        self.counts: dict[_Filters, Select[Any]] = {}

    def key_values(self, key: tuple[str | int, ...]) -> dict[str, Any]:
        if len(key) != len(self.key):
            raise TypeError(f"{self.codec.kind.__name__} is found by {self.codec.kind.KEY}")
        fields = (self.codec.by_name[name] for name in self.codec.kind.KEY)
        return {
            f"key_{i}": field.to_column(value)
            for i, (field, value) in enumerate(zip(fields, key, strict=True))
        }


class SqlReader:
    """A transaction that can't change anything."""

    def __init__(self, connection: Connection, kinds: Mapping[type[Fact], _Kind]) -> None:
        self._connection = connection
        self._kinds = kinds

    def get(self, kind: type[F], *key: str | int) -> F | None:
        """See ports.Transaction."""
        known = self._kinds[kind]
        row = self._connection.execute(known.get, known.key_values(key)).first()
        found: F | None = None if row is None else known.codec.from_row(row)
        return found

    def find(
        self,
        kind: type[F],
        where: Mapping[str, Any] | None = None,
        *,
        after: tuple[str, int] | None = None,
        before: tuple[str, int] | None = None,
        order_by: str | None = None,
        descending: bool = False,
        limit: int | None = None,
    ) -> list[F]:
        """See ports.Transaction."""
        known = self._kinds[kind]
        values: dict[str, Any] = {}
        filters = _filters(known, where, values)
        if filters is None:
            return []
        if after:
            values["after"] = after[1]
        if before:
            values["before"] = before[1]
        if limit is not None:
            values["row_limit"] = limit
        shape = _Shape(
            filters,
            after and after[0],
            before and before[0],
            order_by,
            descending,
            limit is not None,
        )
        statement = known.finds.get(shape)
        if statement is None:
            statement = known.finds[shape] = _find(known, shape)
        return [known.codec.from_row(row) for row in self._connection.execute(statement, values)]

    def count(self, kind: type[Fact], where: Mapping[str, Any] | None = None) -> int:
        """See ports.Transaction."""
        known = self._kinds[kind]
        values: dict[str, Any] = {}
        filters = _filters(known, where, values)
        if filters is None:
            return 0
        statement = known.counts.get(filters)
        if statement is None:
            counted = select(func.count()).select_from(known.table)
            statement = known.counts[filters] = _where(known, counted, filters)
        return int(self._connection.execute(statement, values).scalar_one())

    def put(self, fact: Fact) -> None:
        """A snapshot is read-only: raises TypeError, as do add, delete and next."""
        raise TypeError("a snapshot is read-only; begin a transaction")

    def put_all(self, facts: Sequence[Fact]) -> None:
        """Raises TypeError."""
        raise TypeError("a snapshot is read-only; begin a transaction")

    def add(self, fact: Fact) -> None:
        """Raises TypeError."""
        self.put(fact)

    def delete(self, kind: type[Fact], *key: str | int) -> None:
        """Raises TypeError."""
        raise TypeError("a snapshot is read-only; begin a transaction")

    def delete_all(self, facts: Sequence[Fact]) -> None:
        """Raises TypeError."""
        raise TypeError("a snapshot is read-only; begin a transaction")

    def next(self, counter: str) -> int:
        """Raises TypeError."""
        raise TypeError("a snapshot is read-only; begin a transaction")

    def after_commit(self, action: Callable[[], None]) -> None:
        """Raises TypeError."""
        raise TypeError("a snapshot commits nothing; begin a transaction")


class SqlWriter(SqlReader):
    """The transaction that writes."""

    def __init__(
        self, connection: Connection, kinds: Mapping[type[Fact], _Kind], counter: Executable
    ) -> None:
        super().__init__(connection, kinds)
        self._counter = counter
        self.actions: list[Callable[[], None]] = []

    def put(self, fact: Fact) -> None:
        """See ports.Transaction. Raises RuleBroken where the database forbids the change."""
        known = self._kinds[type(fact)]
        self._connection.execute(known.put, known.codec.to_row(fact))

    def put_all(self, facts: Sequence[Fact]) -> None:
        """See ports.Transaction."""
        if facts:
            known = self._kinds[type(facts[0])]
            self._connection.execute(known.put, [known.codec.to_row(fact) for fact in facts])

    def add(self, fact: Fact) -> None:
        """See ports.Transaction; after AlreadyThere the transaction may go on."""
        known = self._kinds[type(fact)]
        done = self._connection.execute(known.add, known.codec.to_row(fact))
        if done.rowcount == 0:
            key = ", ".join(str(getattr(fact, name)) for name in fact.KEY)
            raise AlreadyThere(f"{type(fact).__name__} {key} is there already")

    def delete(self, kind: type[Fact], *key: str | int) -> None:
        """See ports.Transaction."""
        known = self._kinds[kind]
        self._connection.execute(known.delete, known.key_values(key))

    def delete_all(self, facts: Sequence[Fact]) -> None:
        """See ports.Transaction."""
        if facts:
            known = self._kinds[type(facts[0])]
            keys = [tuple(getattr(fact, name) for name in fact.KEY) for fact in facts]
            self._connection.execute(known.delete, [known.key_values(key) for key in keys])

    def next(self, counter: str) -> int:
        """See ports.Transaction."""
        return int(self._connection.execute(self._counter, {"id": counter}).scalar_one())

    def after_commit(self, action: Callable[[], None]) -> None:
        """See ports.Transaction."""
        self.actions.append(action)


class SqlStore:
    """ports.Store on an SQL database that has been migrated (migrations.migrate)."""

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        """Open it. `read_only` is for other processes than the broker's: snapshots only.

        Raises database.DatabaseUnsupported for a URL that can't be used.
        """
        self.url = url
        self._engine: Engine = connect_engine(url, read_only=read_only)
        self._dialect = self._engine.dialect.name
        self._read_only = read_only
        self._kinds = {kind: _Kind(kind, self._dialect) for kind in ROWS}
        self._lock = FifoLock()
        self._writer: int | None = None
        self._stamps: Callable[[], Mapping[str, int]] | None = None
        insert = postgresql.insert if self._dialect == "postgresql" else sqlite.insert
        counter = self._kinds[CounterFact].table
        first = insert(counter).values(id=bindparam("id"), value=1)
        self._counter: Executable = first.on_conflict_do_update(
            index_elements=["id"], set_={"value": counter.c.value + 1}
        ).returning(counter.c.value)
        greatest = "GREATEST" if self._dialect == "postgresql" else "MAX"
        self._stamping = text(
            "INSERT INTO counter (id, value) VALUES (:id, :value) ON CONFLICT (id) DO UPDATE "
            f"SET value = {greatest}(counter.value, excluded.value)"
        )

    def stamp_commits(self, stamps: Callable[[], Mapping[str, int]]) -> None:
        """Keep `stamps()` as counters with each commit, where they are higher than what is there.

        For the clock's high-water mark.
        """
        self._stamps = stamps

    @contextmanager
    def transaction(self) -> Iterator[SqlWriter]:
        """See ports.Store. Raises RuleBroken and StorageFull; then nothing was changed. Raises
        StoreAway.

        Raises RuntimeError when the calling thread is in a transaction of this store already.
        """
        if self._read_only:
            raise TypeError("this store was opened read-only")
        me = threading.get_ident()
        if self._writer == me:
            raise RuntimeError("a transaction within a transaction: pass the first one on")
        to_commit: SqlWriter | None = None
        try:
            with self._lock:
                self._writer = me
                try:
                    with _translated(writing=True), self._begin_writing() as connection:
                        writer = SqlWriter(connection, self._kinds, self._counter)
                        yield writer
                        if self._stamps is not None:
                            kept = [{"id": i, "value": v} for i, v in self._stamps().items()]
                            connection.execute(self._stamping, kept)
                        to_commit = writer
                finally:
                    self._writer = None
        finally:
            # Also where the commit failed: a connection that breaks over it tells neither yes nor
            # no. Who is woken for nothing looks, and finds nothing.
            for action in to_commit.actions if to_commit is not None else ():
                action()

    @contextmanager
    def snapshot(self) -> Iterator[SqlReader]:
        """See ports.Store. Raises StoreAway."""
        with _translated(writing=False), self._engine.connect() as connection:
            if self._dialect == "postgresql":
                connection = connection.execution_options(
                    isolation_level="REPEATABLE READ", postgresql_readonly=True
                )
            with connection.begin():
                yield SqlReader(connection, self._kinds)

    def close(self) -> None:
        """Give all connections back; an SQLite file is checkpointed by its last one."""
        self._engine.dispose()

    @contextmanager
    def _begin_writing(self) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            connection = connection.execution_options(begin="BEGIN IMMEDIATE")
            with connection.begin():
                if self._dialect == "postgresql":
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})")
                yield connection


def _filters(
    known: _Kind, where: Mapping[str, Any] | None, values: dict[str, Any]
) -> _Filters | None:
    """Return the shape of `where` and fill `values`; None if nothing can match."""
    shape: list[tuple[str, str, bool]] = []
    for name, value in (where or {}).items():
        to_column = known.codec.by_name[name].to_column
        if isinstance(value, _ANY_OF):
            some = [to_column(item) for item in value if item is not None]
            has_none = len(some) != len(value)
            if not some and not has_none:
                return None
            shape.append((name, "any", has_none))
            values[f"w_{name}"] = some
        elif value is None:
            shape.append((name, "none", True))
        else:
            shape.append((name, "is", False))
            values[f"w_{name}"] = to_column(value)
    return tuple(shape)


def _where(known: _Kind, statement: Select[Any], filters: _Filters) -> Select[Any]:
    for name, how, with_none in filters:
        column = known.table.c[name]
        if how == "none":
            statement = statement.where(column.is_(None))
        elif how == "is":
            statement = statement.where(column == bindparam(f"w_{name}"))
        else:
            among = column.in_(bindparam(f"w_{name}", expanding=True))
            statement = statement.where(or_(column.is_(None), among) if with_none else among)
    return statement


def _find(known: _Kind, shape: _Shape) -> Select[Any]:
    statement = _where(known, select(*known.columns), shape.filters)
    if shape.after:
        statement = statement.where(known.table.c[shape.after] > bindparam("after"))
    if shape.before:
        statement = statement.where(known.table.c[shape.before] < bindparam("before"))
    ordered = [known.table.c[shape.order_by]] if shape.order_by else []
    for column in (*ordered, *(c for c in known.key if c.name != shape.order_by)):
        by: Any = column.desc() if shape.descending else column.asc()
        if column.nullable:  # SQLite and PostgreSQL disagree about where NULL stands
            by = by.nulls_last() if shape.descending else by.nulls_first()
        statement = statement.order_by(by)
    return statement.limit(bindparam("row_limit")) if shape.limited else statement


@contextmanager
def _translated(*, writing: bool) -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        raise RuleBroken(f"the database refused it: {error.orig}") from error
    except DBAPIError as error:
        if _is_full(error):
            raise StorageFull("the broker's disk is full: free some space on it") from error
        if writing and _is_failing(error):
            raise StorageFailing("the broker's disk can't be written: see its log") from error
        if _is_away(error):
            raise StoreAway("the database doesn't answer: see its server") from error
        raise


def _is_failing(error: DBAPIError) -> bool:
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF  # without the kind of the kind
    return code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)


def _is_away(error: DBAPIError) -> bool:
    """Say whether the server was not to be reached, went away, or is starting."""
    state = getattr(error.orig, "sqlstate", None) or ""
    # The driver gives no state where it is the one who noticed.
    driver = type(error.orig).__module__.startswith("psycopg") and not state
    unreachable = driver and isinstance(error, OperationalError)
    return error.connection_invalidated or unreachable or state.startswith(_AWAY_SQLSTATES)


def _is_full(error: DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None)
    return state in _DISK_FULL_SQLSTATES or "disk is full" in str(error.orig)
