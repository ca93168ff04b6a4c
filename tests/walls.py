"""Doubles that hold the wall: nothing asks the outside while a write transaction is open.

A blob store, a match engine or a socket that hangs would otherwise hold up everybody who wants to
write. `Walls` wraps a store and the other ports; a call from inside a write transaction raises.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar, cast

from sublet_broker.service.broker import Ports
from sublet_broker.service.ports import Store, Transaction

P = TypeVar("P")


class OutsideAsked(AssertionError):
    """A port was called while this thread had a write transaction open."""


class Walls:
    """Knows which threads write, and stands before the ports."""

    def __init__(self) -> None:
        self._writing = threading.local()

    def around(self, ports: Ports) -> Ports:
        """Return the same ports behind the wall."""
        return replace(
            ports,
            store=cast(Store, WalledStore(ports.store, self)),
            blobs=self.before(ports.blobs),
            matcher=self.before(ports.matcher),
            verifier=self.before(ports.verifier),
            settler=ports.settler and self.before(ports.settler),
        )

    def before(self, port: P) -> P:
        """Return a port whose every method raises OutsideAsked inside a write transaction."""
        return cast(P, _WalledPort(port, self.check))

    def check(self, what: str) -> None:
        """Raise OutsideAsked if this thread writes."""
        if self.writes:
            raise OutsideAsked(f"{what} was called while a write transaction was open")

    @property
    def writes(self) -> bool:
        """Whether this thread has a write transaction open."""
        return getattr(self._writing, "depth", 0) > 0

    def enter(self) -> None:
        """A write transaction begins on this thread."""
        self._writing.depth = getattr(self._writing, "depth", 0) + 1

    def leave(self) -> None:
        """It ends: what it tells after its commit is told outside of it."""
        self._writing.depth -= 1


class _WalledPort:
    def __init__(self, port: object, check: Callable[[str], None]) -> None:
        self._port = port
        self._check = check

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._port, name)
        if not callable(found):
            return found

        def called(*args: Any, **named: Any) -> Any:
            self._check(f"{type(self._port).__name__}.{name}")
            return found(*args, **named)

        return called


class WalledStore:
    """A store that says when it writes."""

    def __init__(self, store: Store, walls: Walls) -> None:
        self._store = store
        self._walls = walls

    def transaction(self) -> AbstractContextManager[Transaction]:
        """Begin a transaction behind the wall."""
        return _Walled(self._store.transaction(), self._walls)

    def snapshot(self) -> AbstractContextManager[Transaction]:
        """Begin to read: that holds nobody up."""
        return self._store.snapshot()


class _Walled:
    def __init__(self, transaction: AbstractContextManager[Transaction], walls: Walls) -> None:
        self._transaction = transaction
        self._walls = walls

    def __enter__(self) -> Transaction:
        tx = self._transaction.__enter__()
        self._walls.enter()
        return tx

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        self._walls.leave()
        return self._transaction.__exit__(kind, error, traceback)
