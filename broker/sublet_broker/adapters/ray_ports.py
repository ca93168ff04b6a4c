"""Matcher, Verifier and Settler on Ray: how the use-cases reach the engine without waiting for it.

Nothing waits for Ray: where it doesn't answer, as while it starts, jobs are matched, checkpoints
verified and settlements decided by the same code in this process.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from sublet_broker.adapters.ray_engine import EngineAway, EngineConfig, RayEngine
from sublet_broker.adapters.ray_work import Change, Shard, ShardReply, settle_batch, shard_of
from sublet_broker.adapters.verifying import check_checkpoint
from sublet_broker.market.facts import JobFact, ShardFact
from sublet_broker.market.matching import BookEntry
from sublet_broker.market.settling import SettlementCase, SettlementDecision
from sublet_broker.service.ports import (
    BlobStore,
    Proposal,
    Store,
    VerifyResult,
    VerifyTask,
)

log = logging.getLogger("sublet.ray")

ANSWER_WITHIN_S = 1.0
REBUILD_LIMIT_S = 10.0
SETTLE_LIMIT_S = 10.0
VERIFY_IN_FLIGHT = 4
VERIFY_ATTEMPTS = 5


class _Answer:
    """What comes of one question."""

    def __init__(self) -> None:
        self.is_there = threading.Event()
        self.succeeded = False
        self.value: Any = None

    def take(self, succeeded: bool, value: Any) -> None:
        self.succeeded, self.value = succeeded, value
        self.is_there.set()


class RayMatcher:
    """ports.Matcher. Changes are kept here and go along with the next propose(), so that telling it
    something costs a transaction nothing.

    For a shard that doesn't answer in time one in this process stands in until it does. A shard
    that is new here, of whichever kind, gets a new epoch: what the other still proposes is void.
    """

    def __init__(self, engine: RayEngine, store: Store) -> None:
        self._engine = engine
        self._store = store
        self._lock = threading.Lock()
        self._changes: dict[tuple[str, str], Change] = {}
        self._life = 0
        self._incarnations: dict[int, str] = {}
        self._epochs: dict[str, int] = {}
        self._asked: _Answer | None = None
        self._stand_ins: dict[int, Shard] = {}
        engine.before_start.append(self._begin)

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
        shards = self._engine.config.shards
        with self._lock:
            changes, self._changes = list(self._changes.values()), {}
            life, stand_ins = self._life, self._stand_ins
        # A job may fit any pool; an offer lies in one.
        mine = [
            [c for c in changes if not c.pool or shard_of(c.pool, shards) == number]
            for number in range(shards)
        ]
        try:
            replies: list[ShardReply | None] = self._ask(mine, now_ms)
        except EngineAway as error:
            log.debug("matching here: %s", error)
            replies = [None] * shards
            with self._lock:
                # If it was only slow it has them: twice does no harm, and lost would. A new life
                # has read newer facts than these.
                for change in changes if life == self._life else ():
                    self._changes.setdefault(_key(change), change)
        proposals: list[Proposal] = []
        try:
            for number, answer in enumerate(replies):
                if answer is None:
                    reply = self._stand_in(stand_ins, number).propose(mine[number], now_ms)
                else:
                    reply = answer
                    stand_ins.pop(number, None)
                proposals += [
                    Proposal(m.job, m.offer, m.device_ids, m.pool, self._epochs[m.pool])
                    for m in self._current(number, reply).matches
                ]
        except BaseException:
            stand_ins.clear()  # Some may not have heard of the changes: new ones read them.
            raise
        return proposals

    def rebuild(self) -> None:
        """See ports.Matcher: the shards are replaced by ones that read the database."""
        self._begin()
        try:
            self._engine.call("rebuild", timeout_s=REBUILD_LIMIT_S)
        except EngineAway as error:
            log.debug("the shards are rebuilt when Ray is back: %s", error)

    def stands_in(self) -> bool:
        """Say whether this process matches for a shard that does not answer."""
        return bool(self._stand_ins)

    def _ask(self, changes: list[list[Change]], now_ms: int) -> list[ShardReply | None]:
        """Return what Ray's shards reply. Raises EngineAway, also where they are not done with what
        they were asked before: nobody waits for them for long."""
        if self._asked is not None and not self._asked.is_there.is_set():
            raise EngineAway("Ray has not answered yet")
        asked = self._asked = _Answer()
        try:
            self._engine.ask("propose", changes, now_ms, then=asked.take)
        except EngineAway:
            self._asked = None
            raise
        if not asked.is_there.wait(ANSWER_WITHIN_S):
            raise EngineAway(f"Ray did not answer within {ANSWER_WITHIN_S} s")
        if not asked.succeeded:
            raise EngineAway(f"Ray failed: {asked.value}")
        replies: list[ShardReply | None] = asked.value
        return replies

    def _stand_in(self, stand_ins: dict[int, Shard], number: int) -> Shard:
        shard = stand_ins.get(number)
        if shard is None:
            config = self._engine.config
            log.info("matching for shard %d in the broker's own process", number)
            shard = stand_ins[number] = Shard(config.database_url, number, config.shards)
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
            self._life += 1

    def _current(self, number: int, reply: ShardReply) -> ShardReply:
        """Give a shard that was built anew a new epoch for each of its pools."""
        anew = self._incarnations.get(number) != reply.incarnation
        raised = [pool for pool in reply.pools if anew or pool not in self._epochs]
        if raised:
            with self._store.transaction() as tx:
                for pool in raised:
                    before = tx.get(ShardFact, pool)
                    after = ShardFact(pool, before.epoch + 1 if before else 1)
                    tx.put(after)
                    self._epochs[pool] = after.epoch
        if anew:
            self._incarnations[number] = reply.incarnation
            log.info("shard %d is up with %d pools", number, len(reply.pools))
        return reply


class RayVerifier:
    """ports.Verifier. At most VERIFY_IN_FLIGHT checkpoints are being read at once."""

    def __init__(self, engine: RayEngine, blobs: BlobStore) -> None:
        self._engine = engine
        self._blobs = blobs
        self._changed = threading.Condition()
        self._waiting: deque[VerifyTask] = deque()
        self._known: set[str] = set()
        self._attempts: dict[str, int] = {}
        self._in_flight = 0
        self._done: list[VerifyResult] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._feed, name="verifier", daemon=True)
        self._thread.start()

    def submit(self, task: VerifyTask) -> None:
        """See ports.Verifier."""
        with self._changed:
            if task.checkpoint in self._known:
                return
            self._known.add(task.checkpoint)
            self._waiting.append(task)
            self._changed.notify_all()

    def collect(self) -> list[VerifyResult]:
        """See ports.Verifier."""
        with self._changed:
            done, self._done = self._done, []
            for result in done:
                self._known.discard(result.checkpoint)
                self._attempts.pop(result.checkpoint, None)
            return done

    def stop(self) -> None:
        """Take up no more work."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _feed(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._may_go)
                if self._stopping:
                    return
                task = self._waiting.popleft()
                self._in_flight += 1
            try:
                self._engine.ask("verify", task, then=partial(self._end, task))
            except EngineAway:
                self._here(task)

    def _may_go(self) -> bool:
        return self._stopping or bool(self._waiting and self._in_flight < VERIFY_IN_FLIGHT)

    def _here(self, task: VerifyTask) -> None:
        try:
            result: VerifyResult | str = check_checkpoint(task, self._blobs)
        except OSError as error:
            result = f"{type(error).__name__}: {error}"
        self._end(task, isinstance(result, VerifyResult), result)

    def _end(self, task: VerifyTask, succeeded: bool, value: VerifyResult | str) -> None:
        """Keep a result; what failed for a reason of ours is tried again, then given up for now."""
        with self._changed:
            self._in_flight -= 1
            if isinstance(value, VerifyResult) and succeeded:
                self._done.append(value)
            else:
                attempts = self._attempts[task.checkpoint] = (
                    self._attempts.get(task.checkpoint, 0) + 1
                )
                log.warning("verifying %s failed: %s", task.checkpoint, value)
                if attempts < VERIFY_ATTEMPTS:
                    self._waiting.append(task)
                else:
                    detail = f"it could not be read: {value}"
                    self._done.append(
                        VerifyResult(task.checkpoint, ok=False, detail=detail, permanent=False)
                    )
            self._changed.notify_all()


class RaySettler:
    """ports.Settler: batches of settlements as a task."""

    def __init__(self, engine: RayEngine) -> None:
        self._engine = engine

    def decide(self, cases: Sequence[SettlementCase]) -> list[SettlementDecision]:
        """See ports.Settler. Never raises MatcherAway: without Ray it decides here."""
        try:
            made: list[SettlementDecision] = self._engine.call(
                "settle", list(cases), timeout_s=SETTLE_LIMIT_S
            )
        except EngineAway as error:
            log.info("settling in the broker's own process: %s", error)
            return settle_batch(cases)
        return made


@dataclass(frozen=True)
class RayPorts:
    """The engine with its three ports, for the composition root."""

    engine: RayEngine
    matcher: RayMatcher
    verifier: RayVerifier
    settler: RaySettler

    @classmethod
    def over(cls, config: EngineConfig, store: Store, blobs: BlobStore) -> Self:
        """Compose them; start() brings Ray up."""
        engine = RayEngine(config)
        return cls(
            engine, RayMatcher(engine, store), RayVerifier(engine, blobs), RaySettler(engine)
        )

    def start(self) -> None:
        """Begin to bring Ray up, and return at once."""
        self.engine.start()

    def stop(self) -> None:
        """Take Ray down."""
        self.verifier.stop()
        self.engine.stop()


def _key(change: Change) -> tuple[str, str]:
    return change.what.partition("_")[0], change.id
