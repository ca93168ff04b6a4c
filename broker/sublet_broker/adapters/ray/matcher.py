"""The match engine as the scheduler sees it: shards on Ray, and who stands in for them.

Nothing here knows Ray: what it needs of it is the port below, which RayShards (ports.py)
implements, and the simulator.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sublet_broker.adapters.ray.engine import EngineAway
from sublet_broker.adapters.ray.shards import Change, Shard, ShardReply, shard_of
from sublet_broker.market.facts import JobFact, ShardFact
from sublet_broker.market.matching import BookEntry
from sublet_broker.service.ports import Proposal, Store

log = logging.getLogger("sublet.ray")

ANSWER_WITHIN_S = 1.0
REST_MS = 10_000
"""Shards that proposed nothing are asked again after so long, though nothing has changed: one that
has died meanwhile is seen then."""
_NONE = ("", 0)

Changes = Sequence[Sequence[Change]]
"""For each shard what it has to know."""


class Asked(Protocol):
    """A question to Ray's shards, and once it is answered, what came of it."""

    succeeded: bool
    value: Any
    """The replies (None for a shard without one), or why there are none."""

    def answered(self, within_s: float) -> bool:
        """Wait at most so long. Return whether the answer is there."""
        ...


class Shards(Protocol):
    """The match shards on Ray, and how one is made that stands in for another."""

    count: int
    before_start: list[Callable[[], None]]
    """Called just before Ray starts anew and its shards read the database."""

    def ask(self, changes: Changes, now_ms: int) -> Asked:
        """Ask all of them for their proposals. Raises EngineAway."""
        ...

    def rebuild(self) -> None:
        """Have them all replaced by new ones. Raises EngineAway."""
        ...

    def stand_in(self, number: int) -> Shard:
        """Return a shard in this process that has read the database."""
        ...


class RayMatcher:
    """ports.Matcher. Changes are kept here and go along with the next propose(), so that telling it
    something costs a transaction nothing.

    For a shard that doesn't answer in time one in this process stands in until it does. A shard
    that is new here, of whichever kind, gets a new epoch: what the other still proposes is void.
    """

    def __init__(self, shards: Shards, store: Store) -> None:
        self._shards = shards
        self._store = store
        self._lock = threading.Lock()
        self._changes: dict[tuple[str, str], Change] = {}
        self._life = 0
        self._epochs: dict[str, tuple[str, int]] = {}
        """For each pool the shard's incarnation that has it, and its epoch."""
        self._asked: Asked | None = None
        self._stand_ins: dict[int, Shard] = {}
        self._nothing_new: Changes = [[] for _ in range(shards.count)]
        self._rests_until_ms = 0
        """Before this no shard proposes anything unless something changes."""
        shards.before_start.append(self._begin)

    def offer_changed(self, entry: BookEntry) -> None:
        """See ports.Matcher."""
        self._note(Change("offer", entry.offer.id, entry.offer.pool, entry=entry))

    def offer_gone(self, offer: str, pool: str) -> None:
        """See ports.Matcher."""
        self._note(Change("offer_gone", offer, pool))

    def job_queued(self, job: JobFact) -> None:
        """See ports.Matcher."""
        self._note(Change("job", job.id, job=job))

    def job_gone(self, job: str) -> None:
        """See ports.Matcher."""
        self._note(Change("job_gone", job))

    def propose(self, now_ms: int) -> list[Proposal]:
        """See ports.Matcher. Call it outside of a transaction: a rebuilt shard gets a new epoch."""
        with self._lock:
            if not self._changes and now_ms < self._rests_until_ms:
                return []
            changes, self._changes = list(self._changes.values()), {}
            self._rests_until_ms = 0
            life, stand_ins = self._life, self._stand_ins
        mine = self._share_out(changes) if changes else self._nothing_new
        try:
            replies: list[ShardReply | None] = self._ask(mine, now_ms)
        except EngineAway as error:
            log.debug("matching here: %s", error)
            replies = [None] * self._shards.count
            with self._lock:
                # If it was only slow it has them: twice does no harm, and lost would. A new life
                # has read newer facts than these.
                for change in changes if life == self._life else ():
                    self._changes.setdefault(_key(change), change)
        proposals: list[Proposal] = []
        rests_until_ms = now_ms + REST_MS
        try:
            for number, answer in enumerate(replies):
                if answer is None:
                    rests_until_ms = 0
                    reply = self._stand_in(stand_ins, number).propose(mine[number], now_ms)
                else:
                    reply = answer
                    stand_ins.pop(number, None)
                if reply.due_ms is not None:
                    rests_until_ms = min(rests_until_ms, reply.due_ms)
                proposals += [
                    Proposal(m.job, m.offer, m.device_ids, m.pool, self._epochs[m.pool][1])
                    for m in self._current(number, reply).matches
                ]
        except BaseException:
            stand_ins.clear()  # Some may not have heard of the changes: new ones read them.
            raise
        with self._lock:
            if not proposals and life == self._life:
                self._rests_until_ms = rests_until_ms
        return proposals

    def rebuild(self) -> None:
        """See ports.Matcher: the shards are replaced by ones that read the database."""
        self._begin()
        try:
            self._shards.rebuild()
        except EngineAway as error:
            log.debug("the shards are rebuilt when Ray is back: %s", error)

    def stands_in(self) -> bool:
        """Say whether this process matches for a shard that does not answer."""
        return bool(self._stand_ins)

    def _share_out(self, changes: list[Change]) -> Changes:
        # A job may fit any pool; an offer lies in one.
        count = self._shards.count
        return [
            [c for c in changes if not c.pool or shard_of(c.pool, count) == number]
            for number in range(count)
        ]

    def _ask(self, changes: Changes, now_ms: int) -> list[ShardReply | None]:
        """Return what Ray's shards reply. Raises EngineAway, also where they are not done with what
        they were asked before: nobody waits for them for long."""
        if self._asked is not None and not self._asked.answered(0):
            raise EngineAway("Ray has not answered yet")
        self._asked = None
        asked = self._asked = self._shards.ask(changes, now_ms)
        if not asked.answered(ANSWER_WITHIN_S):
            raise EngineAway(f"Ray did not answer within {ANSWER_WITHIN_S} s")
        if not asked.succeeded:
            raise EngineAway(f"Ray failed: {asked.value}")
        replies: list[ShardReply | None] = asked.value
        return replies

    def _stand_in(self, stand_ins: dict[int, Shard], number: int) -> Shard:
        shard = stand_ins.get(number)
        if shard is None:
            log.info("matching for shard %d in the broker's own process", number)
            shard = stand_ins[number] = self._shards.stand_in(number)
        return shard

    def _note(self, change: Change) -> None:
        key = _key(change)
        with self._lock:
            self._changes.pop(key, None)
            self._changes[key] = change

    def _begin(self) -> None:
        with self._lock:
            # What was committed up to now the new shards read from the database.
            self._changes = {}
            self._stand_ins = {}
            self._rests_until_ms = 0
            self._life += 1

    def _current(self, number: int, reply: ShardReply) -> ShardReply:
        """Give a shard that was built anew a new epoch for each of its pools, whenever they come:
        one that it begins with may be empty, and be the old one's again later."""
        raised = [
            pool for pool in reply.pools if self._epochs.get(pool, _NONE)[0] != reply.incarnation
        ]
        if raised:
            epochs: dict[str, tuple[str, int]] = {}
            # Known once it is committed, and not before: else what they propose is void. Until then
            # nobody knows: a connection that breaks over a commit doesn't say whether it was made.
            for pool in raised:
                self._epochs.pop(pool, None)
            with self._store.transaction() as tx:
                for pool in raised:
                    before = tx.get(ShardFact, pool)
                    after = ShardFact(pool, before.epoch + 1 if before else 1)
                    tx.put(after)
                    epochs[pool] = (reply.incarnation, after.epoch)
            self._epochs.update(epochs)
            log.info("shard %d holds %s now", number, ", ".join(raised))
        return reply


def _key(change: Change) -> tuple[str, str]:
    return change.what.partition("_")[0], change.id
