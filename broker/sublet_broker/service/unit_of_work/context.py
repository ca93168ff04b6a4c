"""What the use-cases share: settings, ports, hooks, and the unit of work."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from sublet_broker.service.ports import (
    Addresses,
    BlobStore,
    Clock,
    Entropy,
    Matcher,
    PackWork,
    Settler,
    StorageFull,
    Store,
    StoreAway,
    Transaction,
    Verifier,
)
from sublet_broker.service.settings import Settings
from sublet_broker.service.unit_of_work.heartbeats import Heartbeats
from sublet_broker.service.unit_of_work.outbox import Outbox
from sublet_broker.service.unit_of_work.pins import Pins
from sublet_broker.service.unit_of_work.rate_limits import RateLimits
from sublet_broker.service.unit_of_work.unit_of_work import Dirty, UnitOfWork
from sublet_broker.service.unit_of_work.waiting_line import WaitingLine
from sublet_contracts.keys import SigningKey


@dataclass(frozen=True)
class Ports:
    """What the broker needs of the world."""

    store: Store
    blobs: BlobStore
    clock: Clock
    entropy: Entropy
    matcher: Matcher
    verifier: Verifier
    key: SigningKey
    settler: Settler | None = None
    addresses: Addresses | None = None
    """None: content moves through the broker."""
    pack_work: PackWork | None = None
    """None: in this process."""


class Context:
    """Ports, settings and hooks, and the unit of work."""

    def __init__(self, ports: Ports, settings: Settings) -> None:
        self.ports = ports
        self.settings = settings
        self.party = ports.key.party
        self.on_job: Callable[[str], None] | None = None
        self.outbox = Outbox(ports.store)
        self.rate_limits = RateLimits()
        self.heartbeats = Heartbeats()
        self.dirty = Dirty()
        self.waiting_line = WaitingLine()
        self.pins = Pins()
        self.writes_failed = False
        """Something could not be written down, so maybe what an agent said of its runs: supervision
        must not count its silence before it could say that again."""
        self.started_ms = 0
        """When the broker started: deadlines for what it waits for count from here at the least."""

    def work(self) -> AbstractContextManager[UnitOfWork]:
        """Begin a unit of work; it is committed when the block ends without an exception."""
        return _Unit(self, self.ports.store.transaction(), writes=True)

    def read(self) -> AbstractContextManager[UnitOfWork]:
        """Begin to read one consistent state; nothing may be written."""
        return _Unit(self, self.ports.store.snapshot(), writes=False)

    def _tell(self, work: UnitOfWork) -> None:
        if work.moves:
            self.dirty.last_run_change = work.token
        for recipient, message in work.notices:
            self.outbox.add_notice(recipient, message)
        for party in work.parties_with_mail:
            if self.outbox.on_new is not None:
                self.outbox.on_new(party)
        for job in work.jobs_with_news:
            if job and self.on_job is not None:
                self.on_job(job)


class _Unit:
    """A unit of work around its transaction."""

    def __init__(
        self, context: Context, transaction: AbstractContextManager[Transaction], *, writes: bool
    ) -> None:
        self._context = context
        self._transaction = transaction
        self._writes = writes

    def __enter__(self) -> UnitOfWork:
        context = self._context
        try:
            tx = self._transaction.__enter__()
        except (StorageFull, StoreAway):
            context.writes_failed = True
            raise
        work = UnitOfWork(
            tx,
            context.ports.clock,
            context.ports.key,
            context.dirty,
            context.heartbeats,
            context.waiting_line,
        )
        if self._writes:
            tx.after_commit(partial(context._tell, work))
        return work

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return self._transaction.__exit__(kind, error, traceback)
        except (StorageFull, StoreAway):
            self._context.writes_failed = True
            raise
