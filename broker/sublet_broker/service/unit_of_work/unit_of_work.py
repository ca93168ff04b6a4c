"""One unit of work: a transaction with what every use-case does in it.

Facts, the events that tell of them, the messages they cause, ledger and log entries are committed
together or not at all. What the outside is told (hooks, the verifier) is told after the commit.
The match engine is told by the next tick of the scheduler, which reads the truth once more then.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

from sublet_broker.market import ledger
from sublet_broker.market.facts import (
    AccountFact,
    EventFact,
    Fact,
    JobFact,
    LeaseFact,
    LogEntryFact,
    OutboxFact,
    PendingFact,
    RunFact,
    TallyFact,
    TransferFact,
)
from sublet_broker.market.running import is_over
from sublet_broker.market.signs_of_life import Signs
from sublet_broker.service.ports import Clock, Transaction
from sublet_broker.service.unit_of_work.heartbeats import Heartbeats
from sublet_broker.service.unit_of_work.tallies import TALLIES_OF, Tally
from sublet_broker.service.unit_of_work.waiting_line import Standing, WaitingLine
from sublet_contracts.amounts import format_credits
from sublet_contracts.keys import SigningKey
from sublet_contracts.reasons import Reason
from sublet_contracts.states import LeaseState, RunState
from sublet_contracts.wire import Message, RunStall, RunUpload, RunUsage

F = TypeVar("F", bound=Fact)


def _key_of(fact: Fact) -> tuple[str | int, ...]:
    return tuple(getattr(fact, name) for name in fact.KEY)


@dataclass
class Dirty:
    """What is to be looked at after commits. Ordered sets, filled by any thread."""

    providers: dict[str, None] = field(default_factory=dict)
    """Providers of whose offers the scheduler has to tell the match engine."""
    open_offers: dict[str, None] = field(default_factory=dict)
    """Providers whose offers in memory (open_offers.py) have to be read anew."""
    jobs: dict[str, None] = field(default_factory=dict)
    """Jobs of which the scheduler has to tell the match engine."""
    ended: dict[str, None] = field(default_factory=dict)
    """Leases whose runs have exited: settling closes them."""
    set_aside: dict[str, int] = field(default_factory=dict)
    """Providers that are set aside, and until when: then their offers are to be looked at."""
    last_run_change: object = None
    """The token of the last transaction that put a run or a lease: supervision looks at them."""

    def offer_changed(self, provider: str) -> None:
        """Note that a provider's offer, or what is free of it, is another now."""
        self.providers[provider] = None
        self.open_offers[provider] = None


class _Accounts:
    def __init__(self, tx: Transaction) -> None:
        self._tx = tx

    def account(self, id: str) -> AccountFact | None:
        return self._tx.get(AccountFact, id)

    def transfer(self, id: str) -> TransferFact | None:
        return self._tx.get(TransferFact, id)

    def pending(self, id: str) -> PendingFact | None:
        return self._tx.get(PendingFact, id)


class UnitOfWork:
    """A transaction, its time, and the acts that belong to it."""

    def __init__(
        self,
        tx: Transaction,
        clock: Clock,
        key: SigningKey,
        dirty: Dirty,
        heartbeats: Heartbeats,
        waiting_line: WaitingLine,
    ) -> None:
        self.tx = tx
        self._clock = clock
        self._now_ms: int | None = None
        self._stopwatch_ms: int | None = None
        self.key = key
        self.accounts = _Accounts(tx)
        self.jobs_with_news: dict[str, None] = {}
        self.parties_with_mail: dict[str, None] = {}
        self.notices: list[tuple[str, Message]] = []
        self._dirty = dirty
        self._heartbeats = heartbeats
        self._waiting_line = waiting_line
        self.token = object()
        """Tells what this transaction puts from what others do."""
        self.moves = False
        """Whether it puts runs or leases."""

    @property
    def now_ms(self) -> int:
        """The broker's clock, read once."""
        if self._now_ms is None:
            self._now_ms = self._clock.now_ms()
        return self._now_ms

    @property
    def stopwatch_ms(self) -> int:
        """The stopwatch beside it, read once."""
        if self._stopwatch_ms is None:
            self._stopwatch_ms = self._clock.stopwatch_ms()
        return self._stopwatch_ms

    def get(self, kind: type[F], *key: str | int) -> F | None:
        """Return a fact; a run with what its agent said last."""
        fact = self.tx.get(kind, *key)
        if isinstance(fact, RunFact):
            return cast(F, self._heartbeats.with_newest(fact))
        return fact

    def must(self, kind: type[F], *key: str | int) -> F:
        """Return a fact that another one promises to be there."""
        fact = self.get(kind, *key)
        if fact is None:
            raise LookupError(f"{kind.__name__} {key} is missing: the database has been damaged")
        return fact

    def find(
        self, kind: type[F], where: Mapping[str, Any] | None = None, **options: Any
    ) -> list[F]:
        """Return facts (see ports.Transaction.find); runs with what their agents said last."""
        found = self.tx.find(kind, where, **options)
        if kind is RunFact:
            return cast(
                list[F], [self._heartbeats.with_newest(cast(RunFact, fact)) for fact in found]
            )
        return found

    def usage(self, lease: str) -> tuple[int, RunUsage] | None:
        """Return what a run uses of its machine, and when that was measured; None: not known."""
        return self._heartbeats.usage(lease)

    def stall(self, lease: str) -> RunStall | None:
        """Return for how long saving has held a run's loop, as it said last."""
        return self._heartbeats.stall(lease)

    def upload(self, lease: str) -> tuple[int, RunUpload] | None:
        """Return what of a run is on its way here, and when that was measured; None: nothing."""
        return self._heartbeats.upload(lease)

    def signs(self, lease: str) -> Signs | None:
        """Return what is known of a run's life; None: nothing yet."""
        return self._heartbeats.signs(lease)

    def standing(self, job: str) -> Standing | None:
        """Return where a queued job stands in the line for a machine; None: not known."""
        return self._waiting_line.standing(job)

    def put(self, fact: F, *, before: F | None = None) -> None:
        """Insert or replace a fact. `before`: as it stands in the database, where that is known."""
        if type(fact) in TALLIES_OF:
            known = before or self.tx.get(type(fact), *_key_of(fact))
            self._keep_tallies((known,) if known is not None else (), (fact,))
        self.tx.put(fact)
        self._heartbeats.changed(fact, self.token)
        if isinstance(fact, RunFact | LeaseFact):
            self.moves = True
            over = is_over(fact) if isinstance(fact, RunFact) else fact.state is LeaseState.CLOSED
            if over:
                self.tx.after_commit(partial(self._heartbeats.forget, fact.id))

    def put_all(self, facts: Sequence[F], *, before: Sequence[F] = ()) -> None:
        """Insert or replace facts of one kind that is neither a run nor a lease, each once.
        `before`: those of them that stand in the database, as they do."""
        if facts and type(facts[0]) in TALLIES_OF:
            self._keep_tallies(before, facts)
        self.tx.put_all(facts)

    def add(self, fact: Fact) -> None:
        """Insert a fact. Raises AlreadyThere."""
        self.tx.add(fact)
        self._keep_tallies((), (fact,))
        if isinstance(fact, RunFact | LeaseFact):
            self.moves = True

    def delete(self, fact: Fact) -> None:
        """Remove a fact, given as it stands in the database."""
        self.tx.delete(type(fact), *_key_of(fact))
        self._keep_tallies((fact,), ())

    def delete_all(self, facts: Sequence[Fact]) -> None:
        """Remove facts of one kind, given as they stand in the database."""
        self.tx.delete_all(facts)
        self._keep_tallies(facts, ())

    def tally(self, tally: Tally[Any], group: str = "") -> int:
        """Return a sum that is kept, as this transaction leaves it."""
        known = self.tx.get(TallyFact, tally.id(group))
        return known.value if known else 0

    def _keep_tallies(self, before: Sequence[Fact], after: Sequence[Fact]) -> None:
        changes: dict[str, int] = {}
        for facts, sign in ((before, -1), (after, 1)):
            for fact in facts:
                for tally in TALLIES_OF.get(type(fact), ()):
                    id, amount = tally.counts(fact)
                    changes[id] = changes.get(id, 0) + sign * amount
        for id, change in changes.items():
            if not change:
                continue
            known = self.tx.get(TallyFact, id)
            value = (known.value if known else 0) + change
            if value:
                self.tx.put(TallyFact(id, value))
            else:
                self.tx.delete(TallyFact, id)

    def event(
        self,
        kind: str,
        job: str,
        *,
        lease: str = "",
        epoch: int = 0,
        before: str = "",
        after: str = "",
        reason: Reason | None = None,
        detail: str = "",
    ) -> None:
        """Append to the history."""
        self.add(
            EventFact(
                self.tx.next("event"),
                self.now_ms,
                job,
                lease,
                epoch,
                kind,
                before,
                after,
                reason,
                detail[:2048],
            )
        )
        self.jobs_with_news[job] = None

    def record(self, document: str) -> None:
        """Append a document to the Merkle log: called once, when it is accepted."""
        self.add(LogEntryFact(self.tx.next("log") - 1, document))

    def send(self, recipient: str, message: Message) -> None:
        """Put a reliable message into the outbox."""
        order = self.tx.next("outbox")
        self.tx.add(
            OutboxFact(
                f"b-{order}", order, recipient, message.TYPE, message.model_dump_json(), self.now_ms
            )
        )
        self.parties_with_mail[recipient] = None

    def notice(self, recipient: str, message: Message) -> None:
        """Send an unreliable message after the commit."""
        self.notices.append((recipient, message))
        self.parties_with_mail[recipient] = None

    def touch_offer(self, provider: str) -> None:
        """Note that what this provider has free, or its offer, is another now."""
        self.tx.after_commit(partial(self._dirty.offer_changed, provider))

    def set_aside(self, provider: str, until_ms: int) -> None:
        """Note that this provider's machine is set aside until then."""
        self.tx.after_commit(lambda: self._dirty.set_aside.__setitem__(provider, until_ms))
        self.touch_offer(provider)

    def touch_job(self, job: str) -> None:
        """Note that this job may want a machine now, or want one no longer."""
        self.tx.after_commit(lambda: self._dirty.jobs.__setitem__(job, None))

    def touch_ended(self, lease: str) -> None:
        """Note that this lease's run has exited."""
        self.tx.after_commit(lambda: self._dirty.ended.__setitem__(lease, None))

    def add_job(self, job: JobFact) -> None:
        """Add a job that has just been accepted."""
        self.add(job)
        self.event("job", job.id, after=job.state, detail=f"{format_credits(job.budget_ucr)} held")
        self.touch_job(job.id)

    def put_job(self, before: JobFact, after: JobFact, *, lease: str = "") -> JobFact:
        """Replace a job, with an event if its state changes."""
        self.put(after, before=before)
        self.touch_job(after.id)
        if after.state is not before.state:
            self.event(
                "job",
                after.id,
                lease=lease,
                epoch=after.epoch,
                before=before.state,
                after=after.state,
                reason=after.reason,
                detail=after.detail,
            )
        return after

    def put_run(self, before: RunFact, after: RunFact) -> RunFact:
        """Replace a run, with an event if its state or what is wanted of it changes. Its warnings
        are over with it."""
        if is_over(after):
            after = self.warn(after, {}, lambda code: "its run has ended")
        self.put(after)
        if after.state is RunState.EXITED:
            self.touch_ended(after.id)
        if after.state is not before.state:
            self.event(
                "run",
                after.job,
                lease=after.id,
                epoch=after.epoch,
                before=before.state,
                after=after.state,
                reason=after.reason,
                detail=after.detail,
            )
        if after.desired is not before.desired:
            self.event(
                "order",
                after.job,
                lease=after.id,
                epoch=after.epoch,
                before=before.desired,
                after=after.desired,
                reason=after.order_reason,
            )
        return after

    def warn(self, run: RunFact, warnings: dict[str, int], says: Callable[[str], str]) -> RunFact:
        """Return the run with these warnings, with an event for each that begins or is over;
        `says` words one by its code. The run is not put."""
        if warnings == run.warnings:
            return run
        over = [(code, "over") for code in run.warnings if code not in warnings]
        begun = [("", code) for code in warnings if code not in run.warnings]
        for before, after in over + begun:
            self.event(
                "warning",
                run.job,
                lease=run.id,
                epoch=run.epoch,
                before=before,
                after=after,
                detail=says(before or after),
            )
        return replace(run, warnings=warnings)

    def post(self, moves: Sequence[ledger.Move]) -> None:
        """Post transfers. Raises ledger.Overdrawn, before anything is written."""
        for fact in ledger.post(self.accounts, moves, self.now_ms):
            self._append_or_put(fact)

    def reserve(self, id: str, account: str, amount_ucr: int, cites: str) -> None:
        """Reserve an amount."""
        for fact in ledger.reserve(self.accounts, id, account, amount_ucr, cites, self.now_ms):
            self._append_or_put(fact)

    def resolve(self, id: str, moves: Sequence[ledger.Move]) -> None:
        """Resolve a reservation by posting transfers, or void it."""
        for fact in ledger.resolve(self.accounts, id, moves, self.now_ms):
            self._append_or_put(fact)

    def _append_or_put(self, fact: Fact) -> None:
        if isinstance(fact, TransferFact):
            self.add(fact)
        else:
            self.put(fact)
