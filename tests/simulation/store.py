"""The broker's database: survives the process, may be full or away; its connection may break."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sublet_broker.adapters.memory.store import Key, MemoryStore, MemoryTransaction
from sublet_broker.market.facts import Fact
from sublet_broker.service.ports import StorageFull, StoreAway
from tests.simulation.auditor import LOOKED_AT
from tests.simulation.doom import Doom
from tests.simulation.engine import Crashed

if TYPE_CHECKING:
    from sublet_broker.adapters.clock import Mark, SteadyClock
    from tests.simulation.market import Market

UNKEPT = (StorageFull, StoreAway)
"""What the broker raises where it can't write."""


class SimTransaction(MemoryTransaction):
    """What is to be told after a commit is told also where the commit failed, as SqlStore does: a
    connection that breaks over it says neither yes nor no."""

    def __init__(self, store: SimStore) -> None:
        super().__init__(store, writable=True)
        self._sim = store

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            super().__exit__(kind, error, traceback)
        except UNKEPT:
            actions, self.actions = self.actions, []
            for action in actions:
                action()
            self._sim.failed()  # after the auditor has looked: what was made was made before
            raise


class SimStore(MemoryStore):
    """The broker's database: survives the process, which may die before or after a commit."""

    def __init__(self, market: Market) -> None:
        super().__init__()
        self._market = market
        self.mark: Mark | None = None
        self.clock: SteadyClock
        self.doom = Doom(market.points)
        self.full_until_ms = 0
        self.away_until_ms = 0
        self.breaks_in = 0
        """So many commits from now the connection breaks over one; 0: it doesn't."""
        self.breaks_at: type[Fact] | None = None
        """Or over the next one that changes a fact of this kind."""
        self.breaks_for_ms = 0
        """And so long nobody gets another one."""
        self.failed_ms = 0
        """When this process last could not write what an agent said, by its clock; 0: it could."""

    @property
    def hindered_until_ms(self) -> int:
        """Until when the broker can't write, or couldn't."""
        return max(self.full_until_ms, self.away_until_ms)

    def transaction(self) -> MemoryTransaction:
        return SimTransaction(self)

    def committed(self, kind: type[Fact]) -> Mapping[Key, Fact]:
        """Return the facts of a kind, by key, as they are now."""
        return self._tables[kind].facts

    def failed(self) -> None:
        """Something could not be written, or nobody knows whether it was."""
        doing = self._market.broker.doing
        if doing.startswith("a ") and doing != "a ack":
            self.failed_ms = self.clock.now_ms()

    def _begin(self) -> None:
        try:
            self._reach()
        except StoreAway:
            self.failed()
            raise
        super()._begin()

    def _reach(self) -> None:
        if self.away_until_ms > self._market.engine.now_ms:
            raise StoreAway("the simulated database is away")

    def _watch(self, snapshot: MemoryTransaction) -> None:
        """There is one thread: nobody commits over a snapshot."""
        self._reach()

    def _unwatch(self, snapshot: MemoryTransaction) -> None:
        """Likewise."""

    def _commit(self, tx: MemoryTransaction) -> None:
        """As in MemoryStore, with a crash point on each side of it."""
        if tx.sheet:
            if self.full_until_ms > self._market.engine.now_ms:
                raise StorageFull("the simulated disk is full")
            self._crash_point("before a commit")
            breaks = self._breaks(tx)
            if breaks and self._market.engine.happens(0.5):
                raise StoreAway("the connection broke before the commit was made")
            before = {
                kind: {key: self._tables[kind].facts.get(key) for key in changed}
                for kind, changed in tx.sheet.items()
                if kind.__name__ in LOOKED_AT
            }
            tx.actions.insert(0, partial(self._committed, tx, before))
            super()._commit(tx)
            if breaks:
                raise StoreAway("the connection broke once the commit was made")

    def _breaks(self, tx: MemoryTransaction) -> bool:
        breaks = self.breaks_at in tx.sheet
        if breaks:
            self.breaks_at = None
        elif self.breaks_in:
            self.breaks_in -= 1
            breaks = not self.breaks_in
        if breaks:
            self.away_until_ms = self._market.engine.now_ms + self.breaks_for_ms
        return breaks

    def _committed(self, tx: MemoryTransaction, before: dict[Any, Any]) -> None:
        self.mark = self.clock.mark()
        self._market.auditor.committed(self.mark.now_ms, before, tx.sheet)
        self._crash_point("after a commit")

    def _crash_point(self, where: str) -> None:
        if self.doom.strikes(f"broker {where} of {self._market.broker.doing}"):
            self._market.engine.say(f"broker dies {where}")
            raise Crashed(where)
