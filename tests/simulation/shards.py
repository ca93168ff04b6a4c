"""Ray as the broker's process has it, simulated: a host process and its match shards.

The matcher, the shards and the rule by which a shard is replaced are the real ones; what is played
here is Ray's part: processes that start, read the database when they get to it, are slow, hang,
die, and answer when it is too late. Nobody waits: what is not answered at once is answered by a
later action of the engine, and counts as late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sublet_broker.adapters.ray.engine import EngineAway
from sublet_broker.adapters.ray.matcher import Changes, RayMatcher
from sublet_broker.adapters.ray.shards import (
    SHARD_ANSWER_S,
    Change,
    Shard,
    ShardKeeper,
    ShardReply,
    Silence,
)
from sublet_broker.market.facts import ShardFact
from sublet_broker.service.ports import Proposal, Store, StoreAway, Transaction
from tests.simulation.doom import Doom

if TYPE_CHECKING:
    from tests.simulation.market import Market

ANSWER_MS = int(SHARD_ANSWER_S * 1000)
START_MS = (2_500, 6_000)
BUILD_MS = (300, 3_000)


class SimShard(Shard):
    """A real shard, which notes what it proposed last for: for the auditor."""

    def __init__(self, ray: SimRay, tx: Transaction, number: int) -> None:
        ray.built += 1
        super().__init__(tx, number, ray.count, f"{ray.life}-{ray.built}")
        self._ray = ray

    def propose(self, changes: Sequence[Change], now_ms: int) -> ShardReply:
        reply = super().propose(changes, now_ms)
        for match in reply.matches:
            self._ray.proposer[match.pool] = self.incarnation
        return reply


class SimAsked:
    """A question of the matcher's."""

    def __init__(self) -> None:
        self.succeeded = False
        self.value: Any = None
        self._is_there = False

    def take(self, succeeded: bool, value: Any) -> None:
        """The answer; only the first one counts."""
        if not self._is_there:
            self._is_there, self.succeeded, self.value = True, succeeded, value

    def answered(self, within_s: float) -> bool:
        return self._is_there


class Call:
    """One question as the host puts it to all shards."""

    def __init__(self, host: Host, changes: Changes, now_ms: int, asked: SimAsked) -> None:
        self.host = host
        self.changes = changes
        self.now_ms = now_ms
        self.asked = asked
        self.heard: list[ShardReply | Silence] = [Silence.LATE] * len(changes)
        self.left = len(changes)
        self.over = False

    def take(self, number: int, answer: ShardReply | Silence) -> None:
        """What one shard says; after its time is over nobody listens."""
        if self.over:
            return
        self.heard[number] = answer
        self.left -= 1
        if not self.left:
            self.end()

    def end(self) -> None:
        """All have answered, or their time is over."""
        if not self.over:
            self.over = True
            self.host.answer(self)


class SimActor:
    """The process of one shard."""

    def __init__(self, ray: SimRay, number: int) -> None:
        self._ray = ray
        self._number = number
        self._waiting: list[Call] = []
        self._held: list[tuple[Call, ShardReply]] = []
        self.shard: SimShard | None = None
        self.dead = False
        self.slow_until_ms = 0
        self.slow_to_say = False
        """Slow after its work is done: what it says then is old."""
        ray.later(ray.engine.draw_ms(*BUILD_MS), self._build)

    def _build(self) -> None:
        if self.dead:
            return
        if self._ray.dies("shard while it reads the database"):
            self.die()
            return
        try:
            self.shard = self._ray.read(self._number)
        except StoreAway:
            self.die()
            return
        self.go_on()

    def hear(self, call: Call) -> None:
        """Its propose() is called. Calls are worked off in order."""
        if self.dead:
            call.take(self._number, Silence.DEAD)
        elif self.shard is None or self._waiting or self._is_slow():
            self._waiting.append(call)
            if self.slow_to_say:
                self._work()
        else:
            self._answer(call, self.shard)

    def _is_slow(self) -> bool:
        return self.slow_until_ms > self._ray.engine.now_ms

    def be_slow(self, span_ms: int, *, to_say: bool) -> None:
        """Answer nothing for a while."""
        self.slow_until_ms = self._ray.engine.now_ms + span_ms
        self.slow_to_say = to_say
        self._ray.later(span_ms, self.go_on)

    def go_on(self) -> None:
        """It has been built, or is slow no longer."""
        if self.dead or self._is_slow():
            return
        self.slow_to_say = False
        held, self._held = self._held, []
        for call, reply in held:
            call.take(self._number, reply)
        self._work()

    def _work(self) -> None:
        while self._waiting and self.shard is not None and not self.dead:
            self._answer(self._waiting.pop(0), self.shard)

    def _answer(self, call: Call, shard: SimShard) -> None:
        changes = call.changes[self._number]
        ray = self._ray
        if changes and ray.dies("shard before it takes changes"):
            self._waiting.insert(0, call)
            self.die()
            return
        reply = shard.propose(changes, call.now_ms)
        if self.slow_to_say:
            self._held.append((call, reply))
            return
        if not changes and not reply.matches:
            call.take(self._number, reply)
            return
        if ray.dies("shard after it took changes" if changes else "shard before its proposals"):
            self._waiting.insert(0, call)
            self.die()
            return
        call.take(self._number, reply)
        if ray.dies("shard after a reply"):
            self.die()

    def die(self) -> None:
        """The process is gone; whoever waits for it is told."""
        self.dead = True
        waiting = [call for call, _ in self._held] + self._waiting
        self._held, self._waiting = [], []
        for call in waiting:
            call.take(self._number, Silence.DEAD)


class Host:
    """One life of the host process."""

    def __init__(self, ray: SimRay) -> None:
        self._ray = ray
        self._open: list[Call] = []
        self.hangs = False
        self.gone = False
        self.keeper = ShardKeeper(
            ray.count, lambda number: SimActor(ray, number), lambda actor: actor.die()
        )

    def ask(self, changes: Changes, now_ms: int) -> SimAsked:
        """Ask all shards."""
        if any(changes):
            self._ray.stumble()
        asked = SimAsked()
        call = Call(self, changes, now_ms, asked)
        self._open.append(call)
        if self.hangs or (any(changes) and self._dies("Ray's host before it asks")):
            return asked
        for actor in tuple(self.keeper.actors):
            actor.hear(call)
        if not call.over:
            self._ray.later(ANSWER_MS, call.end)
        return asked

    def answer(self, call: Call) -> None:
        """What the shards said goes to the broker."""
        if self.gone or self.hangs:
            return
        replies = self.keeper.judge(call.heard)
        busy = any(call.changes) or any(reply is None or reply.matches for reply in replies)
        if busy and self._dies("Ray's host before it answers"):
            return
        self._open.remove(call)
        call.asked.take(True, replies)
        if busy:
            self._dies("Ray's host after it answered")

    def _dies(self, where: str) -> bool:
        if not self._ray.host_dies(where):
            return False
        self._ray.lose_host()
        return True

    def die(self) -> None:
        """It is gone with its shards, and the broker sees its socket close."""
        self.gone = True
        for actor in self.keeper.actors:
            actor.dead = True
        for call in self._open:
            call.over = True
            call.asked.take(False, "its host process ended")


class SimRay:
    """ray_matcher.Shards for one life of the broker's process, which is Ray's life too."""

    def __init__(self, market: Market) -> None:
        self.market = market
        self.engine = market.engine
        self.count = market.shards
        self.life: int = market.broker.started
        self.before_start: list[Callable[[], None]] = []
        self.built: int = 0
        self.proposer: dict[str, str] = {}
        """By pool the incarnation of the shard that proposed for it last."""
        self.doom = Doom(market.points)
        """A shard's: of whichever comes to it."""
        self.host_doom = Doom(market.points)
        self.back_after_ms = 0
        """If the host dies at a crash point, so long it stays away."""
        self.stumbles_ms = 0
        """Told something next, all shards are late by so long, and the connection to the database
        breaks over the commit by which others take their pools over; 0: they aren't."""
        self.host: Host | None = None

    # -- what the matcher asks for ------------------------------------------------------------

    def ask(self, changes: Changes, now_ms: int) -> SimAsked:
        """See ray_matcher.Shards."""
        if self.host is None:
            raise EngineAway("the simulated Ray is away")
        return self.host.ask(changes, now_ms)

    def rebuild(self) -> None:
        """See ray_matcher.Shards."""
        if self.host is None:
            raise EngineAway("the simulated Ray is away")
        self.host.keeper.rebuild()

    def stand_in(self, number: int) -> Shard:
        """See ray_matcher.Shards."""
        return self.read(number)

    def read(self, number: int) -> SimShard:
        """Return a shard that has read the database as it is now."""
        with self.market.broker.store.snapshot() as tx:
            return SimShard(self, tx, number)

    # -- its processes ------------------------------------------------------------------------

    def later(self, delay_ms: int, action: Callable[[], None]) -> None:
        """Do it later, if this Ray is still there."""

        def act() -> None:
            broker = self.market.broker
            if broker.up and broker.ray is self:
                action()

        self.engine.after(delay_ms, act)

    def start(self) -> None:
        """Begin to bring the host up, as RayEngine does."""
        for begin in self.before_start:
            begin()
        self.later(self.engine.draw_ms(*START_MS), self._up)

    def _up(self) -> None:
        if self.host_dies("Ray's host while it starts"):
            self.later(self.back_after_ms, self.start)
            return
        self.host = Host(self)

    def lose_host(self) -> None:
        """The host dies; it is started again after a while."""
        host, self.host = self.host, None
        if host is not None:
            host.die()
            # A host that is just gone is started again at once: the matcher may be in the middle
            # of its question. Ray may fail to start a few times, though.
            if self.back_after_ms:
                self.later(self.back_after_ms, self.start)
            else:
                self.start()

    def hang(self, span_ms: int) -> None:
        """The host answers nothing any more, until the broker has seen it and ends it."""
        host = self.host
        if host is not None and not host.hangs:
            host.hangs = True
            self.later(span_ms, lambda: self.lose_host() if self.host is host else None)

    def stumble(self) -> None:
        """Something is told to the shards: see `stumbles_ms`."""
        span_ms, self.stumbles_ms = self.stumbles_ms, 0
        if span_ms and self.host is not None:
            for actor in self.host.keeper.actors:
                actor.be_slow(span_ms, to_say=False)
            # They answer again before the database does: it is they who go on.
            store = self.market.broker.store
            store.breaks_at = ShardFact
            store.breaks_for_ms = span_ms + self.engine.draw_ms(0, span_ms)

    def dies(self, where: str) -> bool:
        """Say whether a shard dies at this point."""
        return self.doom.strikes(where) and self._died(where)

    def host_dies(self, where: str) -> bool:
        """Say whether the host dies at this point."""
        return self.host_doom.strikes(where) and self._died(where)

    def _died(self, where: str) -> bool:
        self.engine.say(f"dies: {where}")
        return True


class SimMatcher(RayMatcher):
    """The real matcher. The auditor hears what each proposal was made under, and a shard that was
    replaced and does not know it may propose as well, under the epoch that it had."""

    def __init__(self, ray: SimRay, store: Store) -> None:
        super().__init__(ray, store)
        self._ray = ray
        self._zombie: SimShard | None = None
        self._zombies_epochs: dict[str, int] = {}
        self._until_ms = 0
        self._said: set[str] = set()

    def haunt(self, span_ms: int) -> None:
        """A shard is replaced and lives on: it hears of everything, and proposes for a while."""
        host = self._ray.host
        if self._zombie is not None or host is None:
            return
        number = self._ray.engine.random.randrange(self._ray.count)
        actor = host.keeper.actors[number]
        shard = actor.shard
        if shard is None:
            return
        self._zombie = shard
        self._zombies_epochs = {
            pool: epoch
            for pool, (maker, epoch) in self._epochs.items()
            if maker == shard.incarnation
        }
        self._until_ms, self._said = self._ray.engine.now_ms + span_ms, set()
        actor.shard = None
        actor.die()

    def propose(self, now_ms: int) -> list[Proposal]:
        zombie = self._zombie
        changes = list(self._changes.values()) if zombie else []
        proposals = super().propose(now_ms)
        proposer = self._ray.proposer
        said = [(p, proposer[p.pool]) for p in proposals]
        if zombie is not None:
            old = self._haunt(zombie, zombie.propose(changes, now_ms))
            # It is quicker than the shards of today, once for each job.
            ahead = {p.job for p in old}
            said = [(p, zombie.incarnation) for p in old] + [
                s for s in said if s[0].job not in ahead
            ]
            proposals = [p for p, _ in said]
        if said:
            self._ray.market.matching.proposed(said)
        return proposals

    def _haunt(self, zombie: SimShard, reply: ShardReply) -> list[Proposal]:
        if self._ray.engine.now_ms > self._until_ms:
            self._zombie = None
        old = [
            Proposal(m.job, m.offer, m.device_ids, m.pool, self._zombies_epochs[m.pool])
            for m in reply.matches
            if m.job not in self._said and m.pool in self._zombies_epochs
        ]
        for proposal in old:
            self._said.add(proposal.job)
            self._ray.engine.say(f"a shard of the past proposes for {proposal.pool}")
        return old
