"""Matcher, Verifier and Settler on Ray: how the use-cases reach the engine without waiting for it.

Nothing waits for Ray: where it doesn't answer, as while it starts, jobs are matched, checkpoints
verified and settlements decided by the same code in this process. Where it is off, always.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from sublet_broker.adapters.blobs.verifying import check_checkpoint
from sublet_broker.adapters.ray.engine import EngineAway, EngineConfig, RayEngine
from sublet_broker.adapters.ray.matcher import Asked, Changes, RayMatcher, Shards
from sublet_broker.adapters.ray.shards import Shard
from sublet_broker.adapters.ray.tasks import ShardActor, settle_batch
from sublet_broker.market.facts import ContentFact
from sublet_broker.market.settling import SettlementCase, SettlementDecision
from sublet_broker.service.content.pack_work import OwnPackWork
from sublet_broker.service.ports import (
    BlobStore,
    PackVerdict,
    PackWork,
    Store,
    VerifyResult,
    VerifyTask,
)

log = logging.getLogger("sublet.ray")

REBUILD_LIMIT_S = 10.0
SETTLE_LIMIT_S = 10.0
PACK_LIMIT_S = 120.0
VERIFY_IN_FLIGHT = 4
VERIFY_ATTEMPTS = 5


class _Asked:
    """A question, and what comes of it (matcher.Asked)."""

    def __init__(self) -> None:
        self._is_there = threading.Event()
        self.succeeded = False
        self.value: Any = None

    def take(self, succeeded: bool, value: Any) -> None:
        self.succeeded, self.value = succeeded, value
        self._is_there.set()

    def answered(self, within_s: float) -> bool:
        return self._is_there.wait(within_s)


class RayShards:
    """matcher.Shards: the engine's shards, and those that this process makes itself."""

    def __init__(self, engine: RayEngine) -> None:
        self._engine = engine
        self.count = engine.config.shards
        self.before_start = engine.before_start

    def ask(self, changes: Changes, now_ms: int) -> Asked:
        """See matcher.Shards."""
        asked = _Asked()
        self._engine.ask("propose", changes, now_ms, then=asked.take)
        return asked

    def rebuild(self) -> None:
        """See matcher.Shards."""
        self._engine.call("rebuild", timeout_s=REBUILD_LIMIT_S)

    def stand_in(self, number: int) -> Shard:
        """See matcher.Shards."""
        return ShardActor(self._engine.config.database_url, number, self.count)


class OwnShards:
    """matcher.Shards in this process: one, for a broker that runs without Ray."""

    count = 1

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        self._shard: Shard | None = None
        self.before_start: list[Callable[[], None]] = []

    def ask(self, changes: Changes, now_ms: int) -> Asked:
        """See matcher.Shards. What it raises leaves no half-told shard behind."""
        shard, self._shard = self._shard or self.stand_in(0), None
        asked = _Asked()
        asked.take(True, [shard.propose(changes[0], now_ms)])
        self._shard = shard
        return asked

    def rebuild(self) -> None:
        """See matcher.Shards."""
        self._shard = None

    def stand_in(self, number: int) -> Shard:
        """See matcher.Shards."""
        return ShardActor(self._database_url, number, self.count)


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
            level = logging.DEBUG if self._engine.off else logging.INFO
            log.log(level, "settling in the broker's own process: %s", error)
            return settle_batch(cases)
        return made


class RayPackWork:
    """ports.PackWork as tasks, for a store that every process reaches by itself."""

    def __init__(self, engine: RayEngine, blobs: BlobStore) -> None:
        self._engine = engine
        self._own = OwnPackWork(blobs)

    def check(self, pack: str, name: str, table: bytes, size_bytes: int) -> PackVerdict:
        """See ports.PackWork."""
        try:
            found: PackVerdict = self._engine.call(
                "check_pack", pack, name, table, size_bytes, timeout_s=PACK_LIMIT_S
            )
        except EngineAway as error:
            self._tell(error)
            return self._own.check(pack, name, table, size_bytes)
        return found

    def whole(self, contents: Sequence[ContentFact]) -> list[bool]:
        """See ports.PackWork."""
        try:
            found: list[bool] = self._engine.call(
                "whole_in_packs", list(contents), timeout_s=PACK_LIMIT_S
            )
        except EngineAway as error:
            self._tell(error)
            return self._own.whole(contents)
        return found

    def move(self, contents: Sequence[ContentFact], to: str) -> list[bool]:
        """See ports.PackWork."""
        try:
            found: list[bool] = self._engine.call(
                "move_packs", list(contents), to, timeout_s=PACK_LIMIT_S
            )
        except EngineAway as error:
            # What a task may still write, it writes the same way, or not at all.
            self._tell(error)
            return self._own.move(contents, to)
        return found

    def _tell(self, error: EngineAway) -> None:
        level = logging.DEBUG if self._engine.off else logging.INFO
        log.log(level, "a pack is read in the broker's own process: %s", error)


@dataclass(frozen=True)
class RayPorts:
    """The engine with its three ports, for the composition root."""

    engine: RayEngine
    matcher: RayMatcher
    verifier: RayVerifier
    settler: RaySettler
    pack_work: PackWork

    @classmethod
    def over(cls, config: EngineConfig, store: Store, blobs: BlobStore) -> Self:
        """Compose them; start() brings Ray up."""
        engine = RayEngine(config)
        own = OwnShards(config.database_url)
        shards: Shards = own if engine.off else RayShards(engine)
        matcher = RayMatcher(shards, store)
        # A folder has one writer, and reading it costs no journey.
        work = RayPackWork(engine, blobs) if config.s3 else OwnPackWork(blobs)
        return cls(engine, matcher, RayVerifier(engine, blobs), RaySettler(engine), work)

    def start(self) -> None:
        """Begin to bring Ray up, and return at once."""
        self.engine.start()

    def stop(self) -> None:
        """Take Ray down."""
        self.verifier.stop()
        self.engine.stop()
