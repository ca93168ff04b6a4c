"""A Store in memory: transactional with rollback, serialisable, deterministic. For tests and the
simulator, and the reference for what the others must do.

A transaction writes into its own sheet, over the committed facts, and is laid onto them as one
piece when it ends well. Transactions exclude one another. A snapshot holds no writer up: whoever
commits over it leaves what was there before on the snapshot's sheet. Fields that are searched by
are indexed, from the first search on.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from sublet_broker.market.facts import CounterFact, Fact
from sublet_broker.service.ports import AlreadyThere

F = TypeVar("F", bound=Fact)
Key = tuple[str | int, ...]
_ANY_OF = (tuple, set, frozenset)


def key_of(fact: Fact) -> Key:
    """Return the values of the fact's KEY."""
    return tuple(getattr(fact, name) for name in fact.KEY)


class _Table:
    """All committed facts of one kind."""

    def __init__(self) -> None:
        self.facts: dict[Key, Fact] = {}
        self._indexes: dict[str, dict[Any, dict[Key, None]]] = {}

    def set(self, key: Key, fact: Fact | None) -> None:
        before = self.facts.pop(key, None)
        for field, index in self._indexes.items():
            if before is not None:
                index[getattr(before, field)].pop(key, None)
            if fact is not None:
                index.setdefault(getattr(fact, field), {})[key] = None
        if fact is not None:
            self.facts[key] = fact

    def candidates(self, where: Mapping[str, Any]) -> Iterable[Key]:
        """Return the keys of a superset of the facts that match: the smallest that an index has."""
        best: list[dict[Key, None]] | None = None
        fewest = 0
        for field, value in where.items():
            index = self._index(field)
            values = dict.fromkeys(value) if isinstance(value, _ANY_OF) else (value,)
            found = [index[v] for v in values if v in index]
            count = sum(map(len, found))
            if best is None or count < fewest:
                best, fewest = found, count
        if best is None:
            return list(self.facts)
        return [key for keys in best for key in keys]

    def _index(self, field: str) -> dict[Any, dict[Key, None]]:
        index = self._indexes.get(field)
        if index is None:
            index = self._indexes[field] = {}
            for key, fact in self.facts.items():
                index.setdefault(getattr(fact, field), {})[key] = None
        return index


class MemoryTransaction:
    """One atomic change of a MemoryStore (see ports.Transaction)."""

    def __init__(
        self, tables: dict[type[Fact], _Table], lock: threading.RLock, *, writable: bool
    ) -> None:
        self._tables = tables
        self._lock = lock
        self._writable = writable
        self.sheet: dict[type[Fact], dict[Key, Fact | None]] = {}
        self.actions: list[Callable[[], None]] = []

    def get(self, kind: type[F], *key: str | int) -> F | None:
        """Return the fact with that key."""
        if len(key) != len(kind.KEY):
            raise TypeError(f"{kind.__name__} is found by {kind.KEY}")
        with self._lock:
            return self._get(kind, key)

    def keep_before(self, kind: type[Fact], key: Key, fact: Fact | None) -> None:
        """Note what stood there before a commit that this snapshot must not see."""
        self.sheet.setdefault(kind, {}).setdefault(key, fact)

    def _get(self, kind: type[F], key: Key) -> F | None:
        changed = self.sheet.get(kind)
        if changed is not None and key in changed:
            return cast("F | None", changed[key])
        return cast("F | None", self._tables[kind].facts.get(key))

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
        """Return the facts that match, ordered."""
        asked = where or {}
        with self._lock:
            changed = self.sheet.get(kind, {})
            table = self._tables[kind]
            matching = [table.facts[key] for key in table.candidates(asked) if key not in changed]
        if len(asked) > 1:  # by one field an index finds exactly those that match
            matching = [fact for fact in matching if _meets_all(fact, asked)]
        matching += [
            fact for fact in changed.values() if fact is not None and _meets_all(fact, asked)
        ]
        if after is not None:
            matching = [fact for fact in matching if _beyond(getattr(fact, after[0]), after[1])]
        if before is not None:
            matching = [fact for fact in matching if _beyond(before[1], getattr(fact, before[0]))]

        def rank(fact: Fact) -> tuple[Any, ...]:
            value = getattr(fact, order_by) if order_by else None
            return (value is not None, value if value is not None else 0, key_of(fact))

        if len(matching) > 1:
            matching.sort(key=rank, reverse=descending)
        return cast("list[F]", matching[:limit])

    def count(self, kind: type[Fact], where: Mapping[str, Any] | None = None) -> int:
        """Return how many facts match."""
        if not where:
            with self._lock:
                if kind not in self.sheet:
                    return len(self._tables[kind].facts)
        return len(self.find(kind, where))

    def put(self, fact: Fact) -> None:
        """Insert or replace the fact."""
        self._check_writable()
        self.sheet.setdefault(type(fact), {})[key_of(fact)] = fact

    def add(self, fact: Fact) -> None:
        """Insert the fact. Raises AlreadyThere."""
        if self.get(type(fact), *key_of(fact)) is not None:
            raise AlreadyThere(f"{type(fact).__name__} {key_of(fact)}")
        self.put(fact)

    def delete(self, kind: type[Fact], *key: str | int) -> None:
        """Remove the fact, if it is there."""
        self._check_writable()
        if len(key) != len(kind.KEY):
            raise TypeError(f"{kind.__name__} is found by {kind.KEY}")
        self.sheet.setdefault(kind, {})[key] = None

    def next(self, counter: str) -> int:
        """Return the counter's next number."""
        known = self.get(CounterFact, counter)
        value = known.value + 1 if known else 1
        self.put(CounterFact(counter, value))
        return value

    def after_commit(self, action: Callable[[], None]) -> None:
        """Run `action` once the transaction is committed."""
        self.actions.append(action)

    def _check_writable(self) -> None:
        if not self._writable:
            raise TypeError("a snapshot can't be written to")


def _meets_all(fact: Fact, asked: Mapping[str, Any]) -> bool:
    return all(_meets(getattr(fact, field), wanted) for field, wanted in asked.items())


def _meets(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, _ANY_OF):
        return value in wanted
    return bool(value == wanted)


def _beyond(value: Any, bound: Any) -> bool:
    return value is not None and bound is not None and value > bound


class MemoryStore:
    """The database in memory."""

    def __init__(self) -> None:
        self._tables: dict[type[Fact], _Table] = _Tables()
        self._writing = threading.RLock()
        self._lock = threading.RLock()
        """Held while the tables are read or changed: briefly, and always inside _writing."""
        self._snapshots: list[MemoryTransaction] = []
        self._busy = False

    @contextmanager
    def transaction(self) -> Iterator[MemoryTransaction]:
        """Begin a transaction; it commits when the block ends without an exception."""
        with self._writing:
            if self._busy:
                raise RuntimeError("a transaction inside a transaction of the same thread")
            self._busy = True
            try:
                tx = MemoryTransaction(self._tables, self._lock, writable=True)
                yield tx
                self._commit(tx)
            finally:
                self._busy = False
        for action in tx.actions:
            action()

    def _commit(self, tx: MemoryTransaction) -> None:
        with self._lock:
            for kind, changed in tx.sheet.items():
                table = self._tables[kind]
                for key, fact in changed.items():
                    for snapshot in self._snapshots:
                        snapshot.keep_before(kind, key, table.facts.get(key))
                    table.set(key, fact)

    @contextmanager
    def snapshot(self) -> Iterator[MemoryTransaction]:
        """Begin a read-only transaction on what is committed."""
        tx = MemoryTransaction(self._tables, self._lock, writable=False)
        with self._lock:
            self._snapshots.append(tx)
        try:
            yield tx
        finally:
            with self._lock:
                self._snapshots = [other for other in self._snapshots if other is not tx]


class _Tables(dict[type[Fact], _Table]):
    def __missing__(self, kind: type[Fact]) -> _Table:
        table = self[kind] = _Table()
        return table
