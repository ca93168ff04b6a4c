"""A Store in memory: transactional with rollback, serialisable, deterministic. For tests and the
simulator, and the reference for what the others must do.

A transaction writes into its own sheet, over the committed facts, and is laid onto them as one
piece when it ends well. Transactions exclude one another. A snapshot holds no writer up: whoever
commits over it leaves what was there before on the snapshot's sheet. Fields that are searched by
are indexed, from the first search on.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from sublet_broker.market.facts import CounterFact, Fact
from sublet_broker.service.ports import AlreadyThere

F = TypeVar("F", bound=Fact)
Key = tuple[str | int, ...]
_ANY_OF = (tuple, set, frozenset)
_NONE: dict[Key, None] = {}


def key_of(fact: Fact) -> Key:
    """Return the values of the fact's KEY."""
    key = fact.KEY
    if len(key) == 1:
        return (getattr(fact, key[0]),)
    return tuple([getattr(fact, name) for name in key])


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
        if not where:
            return self.facts
        best: Iterable[Key] = ()
        fewest: int | None = None
        for field, value in where.items():
            index = self._indexes.get(field)
            if index is None:
                index = self._index(field)
            if isinstance(value, _ANY_OF):
                found = [index[v] for v in dict.fromkeys(value) if v in index]
                count = sum(map(len, found))
                if fewest is None or count < fewest:
                    best, fewest = [key for keys in found for key in keys], count
            else:
                one: dict[Key, None] = index.get(value, _NONE)
                if fewest is None or len(one) < fewest:
                    best, fewest = one, len(one)
            if not fewest:
                break
        return best

    def _index(self, field: str) -> dict[Any, dict[Key, None]]:
        index = self._indexes[field] = {}
        for key, fact in self.facts.items():
            index.setdefault(getattr(fact, field), {})[key] = None
        return index


class MemoryTransaction:
    """One atomic change of a MemoryStore (see ports.Transaction), or a look at it."""

    def __init__(self, store: "MemoryStore", *, writable: bool) -> None:
        self._store = store
        self._tables = store._tables
        self._lock = store._lock
        self._writable = writable
        self.sheet: dict[type[Fact], dict[Key, Fact | None]] = {}
        self.actions: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        if self._writable:
            self._store._begin()
        else:
            self._store._watch(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._writable:
            self._store._unwatch(self)
            return
        try:
            if kind is None:
                self._store._commit(self)
        finally:
            self._store._end()
        # They refer to who holds this transaction: let go of, neither waits for the collector.
        actions, self.actions = self.actions, []
        if kind is None:
            for action in actions:
                action()

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
        asked = where or _EVERYTHING
        with self._lock:
            changed = self.sheet.get(kind)
            table = self._tables[kind]
            facts = table.facts
            if changed:
                keys = table.candidates(asked)
                matching = [facts[key] for key in keys if key not in changed]
            else:
                matching = [facts[key] for key in table.candidates(asked)]
        if len(asked) > 1:  # by one field an index finds exactly those that match
            matching = [fact for fact in matching if _meets_all(fact, asked)]
        if changed:
            matching += [
                fact for fact in changed.values() if fact is not None and _meets_all(fact, asked)
            ]
        if after is not None:
            field, bound = after
            matching = [
                fact
                for fact in matching
                if (value := getattr(fact, field)) is not None and value > bound
            ]
        if before is not None:
            field, bound = before
            matching = [
                fact
                for fact in matching
                if (value := getattr(fact, field)) is not None and value < bound
            ]
        if len(matching) < 2:
            return cast("list[F]", matching[:limit])

        def rank(fact: Fact) -> tuple[Any, ...]:
            value = getattr(fact, order_by) if order_by else None
            return (value is not None, value if value is not None else 0, key_of(fact))

        matching.sort(key=rank if order_by else key_of, reverse=descending)
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

    def put_all(self, facts: Sequence[Fact]) -> None:
        """Insert or replace these facts."""
        for fact in facts:
            self.put(fact)

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

    def delete_all(self, facts: Sequence[Fact]) -> None:
        """Remove these facts."""
        for fact in facts:
            self.delete(type(fact), *key_of(fact))

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


_EVERYTHING: Mapping[str, Any] = {}


def _meets_all(fact: Fact, asked: Mapping[str, Any]) -> bool:
    return all(_meets(getattr(fact, field), wanted) for field, wanted in asked.items())


def _meets(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, _ANY_OF):
        return value in wanted
    return bool(value == wanted)


class MemoryStore:
    """The database in memory."""

    def __init__(self) -> None:
        self._tables: dict[type[Fact], _Table] = _Tables()
        self._writing = threading.RLock()
        self._lock = threading.RLock()
        """Held while the tables are read or changed: briefly, and always inside _writing."""
        self._snapshots: list[MemoryTransaction] = []
        self._busy = False

    def transaction(self) -> MemoryTransaction:
        """Begin a transaction; it commits when the block ends without an exception."""
        return MemoryTransaction(self, writable=True)

    def snapshot(self) -> MemoryTransaction:
        """Begin a read-only transaction on what is committed."""
        return MemoryTransaction(self, writable=False)

    def _begin(self) -> None:
        self._writing.acquire()
        if self._busy:
            self._writing.release()
            raise RuntimeError("a transaction inside a transaction of the same thread")
        self._busy = True

    def _end(self) -> None:
        self._busy = False
        self._writing.release()

    def _commit(self, tx: MemoryTransaction) -> None:
        with self._lock:
            for kind, changed in tx.sheet.items():
                table = self._tables[kind]
                for key, fact in changed.items():
                    for snapshot in self._snapshots:
                        snapshot.keep_before(kind, key, table.facts.get(key))
                    table.set(key, fact)

    def _watch(self, snapshot: MemoryTransaction) -> None:
        with self._lock:
            self._snapshots.append(snapshot)

    def _unwatch(self, snapshot: MemoryTransaction) -> None:
        with self._lock:
            self._snapshots = [other for other in self._snapshots if other is not snapshot]


class _Tables(dict[type[Fact], _Table]):
    def __missing__(self, kind: type[Fact]) -> _Table:
        table = self[kind] = _Table()
        return table
