"""The broker's process and its disk: the real Broker, its loops, its agents' door, and crashes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sublet_broker.adapters.clock import SteadyClock
from sublet_broker.adapters.memory.verifier import InProcessVerifier
from sublet_broker.market.facts import LogEntryFact
from sublet_broker.service.broker import Broker, Ports
from sublet_broker.service.errors import NotYet, Refusal, StaleInstance
from sublet_broker.service.ports import (
    BlobStore,
    MatcherAway,
    VerifyResult,
    VerifyTask,
)
from sublet_contracts.documents import DocumentRefused
from sublet_contracts.problems import ProblemCode
from sublet_contracts.session import BrokerSession, SessionError
from sublet_contracts.wire import Ack, Announce, Heartbeat, Join, Logs, Message
from tests.simulation.by_address import Puts, chosen
from tests.simulation.disk import SimBlobs, SimDisk
from tests.simulation.engine import BEGIN_MS, Crashed, Quartz
from tests.simulation.network import Wire
from tests.simulation.shards import SimMatcher, SimRay
from tests.simulation.store import UNKEPT, SimStore
from tests.simulation.store_by_address import StoreByAddress
from tests.walls import Walls

if TYPE_CHECKING:
    from tests.simulation.market import Market

RESEND_MS = 10_000
WINDOW = 100
PAUSE_MS = 10
T = TypeVar("T")


class BrokerAway(Exception):
    """Nobody answers."""


TROUBLES = {
    ProblemCode.BUSY,
    ProblemCode.MATCHER_AWAY,
    ProblemCode.DATABASE_AWAY,
    ProblemCode.BLOBS_AWAY,
    ProblemCode.STORAGE_FULL,
    ProblemCode.STORAGE_FAILING,
}
"""Refusals for which the asker can do nothing but ask again later."""


class SimVerifier(InProcessVerifier):
    """The verifier: takes its time, and its worker may die."""

    def __init__(self, market: Market, blobs: BlobStore, ready: Callable[[], None]) -> None:
        super().__init__(blobs)
        self._market = market
        self._ready = ready
        self._arrived: dict[str, VerifyTask] = {}

    def submit(self, task: VerifyTask) -> None:
        engine = self._market.engine

        def begin() -> None:
            super(SimVerifier, self).submit(task)
            self._ready()

        # Large checkpoints take long: longer than some runs live.
        slow = engine.happens(0.1)
        engine.after(engine.draw_ms(5, 60_000 if slow else 400), begin)

    def collect(self) -> list[VerifyResult]:
        results = super().collect()
        for result in results:
            self._market.verified_ms[result.checkpoint] = self._market.engine.now_ms
        if self._market.verifier_dies and results:
            self._market.verifier_dies = False
            return [
                VerifyResult(r.checkpoint, False, "the worker died", permanent=False)
                for r in results
            ]
        return results


class SimEntropy:
    """Randomness out of the one seed."""

    def __init__(self, market: Market) -> None:
        self._random = market.engine.random

    def hex(self, count_bytes: int) -> str:
        return self._random.randbytes(count_bytes).hex()


class Door:
    """The broker's side of one connection, as adapters/http/agent_socket.py has it."""

    def __init__(self, host: BrokerHost, wire: Wire) -> None:
        self.host = host
        self.number = host.started
        self.wire = wire
        self.session = BrokerSession(host.broker.party, host.entropy.hex(16))
        self.party = ""
        self.instance = ""
        self.heard_ms = host.engine.now_ms
        self.sent: dict[str, int] = {}
        self.gone = False
        wire.on_broker_closed = self.closed
        wire.down.send(self.session.hello(host.now_ms()))
        self.silent_ms = max(15_000, 5 * host.market.settings.heartbeat_ms)
        host.engine.after(self.silent_ms, self._check_silence)

    def arrive(self, frame: bytes) -> None:
        """A frame of the agent's."""
        host = self.host
        if self.gone or not host.is_current(self):
            return
        self.heard_ms = host.engine.now_ms
        try:
            received = self.session.receive(frame, host.now_ms())
        except SessionError as error:
            self.refuse(error)
            return
        if isinstance(received.message, Join):
            self._join()
        else:
            self._take(received.message, received.mid)

    def _join(self) -> None:
        proof = self.session.proof
        assert proof is not None
        try:
            welcome = self.host.call(self.host.broker.sessions.joined, proof)
        except (BrokerAway, *UNKEPT):
            self.wire.close()
            return
        except Refusal as refusal:
            self.refuse(SessionError(refusal.code, refusal.detail))
            return
        self.party, self.instance = proof.party, proof.instance
        older = self.host.doors.get(self.party)
        self.host.doors[self.party] = self
        if older is not None and older is not self:
            older.gone = True
            older.wire.close(late=False)
        self.host.market.auditor.joined(self.party)
        self._send(welcome)
        self.host.wake("scheduling")
        self.pump()

    def _take(self, message: Message, mid: str | None) -> None:
        host = self.host
        agents = host.broker.sessions
        try:
            replies = host.call(agents.receive, self.party, self.instance, message)
        except BrokerAway:
            return
        except (NotYet, *UNKEPT):
            return
        except StaleInstance as stale:
            self.refuse(SessionError(stale.code, stale.detail))
            return
        except (Refusal, DocumentRefused) as error:
            if isinstance(error, Refusal) and error.code in TROUBLES:
                return
            host.engine.say(f"broker refuses {message.TYPE} of {host.name(self.party)}: {error}")
            if isinstance(message, Announce):
                code = error.code if isinstance(error, Refusal) else "refused"
                self.refuse(SessionError(code, str(error)))
                return
            replies = []
        else:
            host.market.auditor.heard(self.party, message)
        if not host.up or self.gone:
            return
        for reply in replies:
            self._send(reply)
        if mid is not None:
            self._send(Ack(mids=(mid,)))
        if isinstance(message, Ack):
            for done in message.mids:
                self.sent.pop(done, None)
            self.pump()
        if not isinstance(message, (Ack, Heartbeat, Logs)):
            host.wake(*host.broker.stirred())

    def pump(self) -> None:
        """Send what waits for this agent."""
        host = self.host
        if self.gone or not host.up or host.doors.get(self.party) is not self:
            return
        now_ms = host.engine.now_ms
        for notice in host.broker.outbox.notices(self.party):
            self._send(notice)
        try:
            waiting = host.broker.outbox.pending(self.party, WINDOW)
        except UNKEPT:
            host.engine.after(RESEND_MS, self.pump)
            return
        for mid, message in waiting:
            if now_ms - self.sent.get(mid, -RESEND_MS) >= RESEND_MS:
                self._send(message, mid)
                self.sent[mid] = now_ms
        if self.sent:
            host.engine.after(RESEND_MS, self.pump)

    def _send(self, message: Message, mid: str | None = None) -> None:
        self.wire.down.send(self.session.send(message, mid))

    def refuse(self, error: SessionError) -> None:
        """Say why and close."""
        self.wire.down.send(self.session.refuse(error))
        self.gone = True
        self.host.engine.after(200, self.wire.close)
        self._left()

    def closed(self) -> None:
        """The connection has ended."""
        if not self.gone:
            self.gone = True
            self._left()

    def _left(self) -> None:
        host = self.host
        if not host.is_current(self) or host.doors.get(self.party) is not self:
            return
        del host.doors[self.party]
        try:
            host.call(host.broker.sessions.left, self.party, self.instance)
        except (BrokerAway, Refusal, *UNKEPT):
            return  # The sweeper finds out by the silence.

    def _check_silence(self) -> None:
        if self.gone or not self.host.is_current(self):
            return
        silent_ms = self.host.engine.now_ms - self.heard_ms
        if silent_ms >= self.silent_ms:
            self.wire.close()
            self.closed()
        else:
            self.host.engine.after(self.silent_ms - silent_ms, self._check_silence)


class BrokerHost:
    """The machine that the broker runs on."""

    def __init__(self, market: Market) -> None:
        self.market = market
        self.engine = market.engine
        self.store = SimStore(market)
        self.disk = SimDisk(market)
        self.blobs = SimBlobs(self.disk)
        self.addressed = StoreByAddress(self.blobs)
        self.puts = Puts(market)
        self.entropy = SimEntropy(market)
        self.clock = Quartz(self.engine)
        self.wall_offset_ms = 0
        self.up = False
        self.doing = ""
        """What the process was asked to do last: names its crash points."""
        self.started = 0
        self.doors: dict[str, Door] = {}
        self.broker: Broker
        self.ray: SimRay
        self.matcher: SimMatcher
        self._due: dict[str, int] = {}
        self._loops: dict[str, tuple[Callable[[], Any], int, tuple[str, ...]]] = {}

    def start(self) -> None:
        """Start the process on what is on its disk."""
        if self.up:
            return
        self.started += 1
        clock = SteadyClock(
            self.store.mark,
            wall_ms=lambda: BEGIN_MS + self.engine.now_ms + self.wall_offset_ms,
            since_boot_ms=self.clock.now_ms,
        )
        self.store.clock = clock
        self.now_ms = clock.now_ms
        self.ray = SimRay(self.market)
        self.matcher = SimMatcher(self.ray, self.store)
        number = self.started
        self.store.failed_ms = 0
        self.disk.boot()
        self.blobs = SimBlobs(self.disk)
        self.addressed = StoreByAddress(self.blobs)
        verifier = SimVerifier(self.market, self.blobs, lambda: self._wake_of(number, "verdicts"))
        self.broker = Broker(
            Walls().around(
                Ports(
                    store=self.store,
                    blobs=self.blobs,
                    clock=clock,
                    entropy=self.entropy,
                    matcher=self.matcher,
                    verifier=verifier,
                    key=self.market.broker_key,
                    addresses=self.addressed if chosen(self.market.seed) else None,
                )
            ),
            self.market.settings,
        )
        self.broker.outbox.on_new = self._new_for
        self.blobs.sweep = self._sweep_files
        self.up = True
        self.doors = {}
        self.engine.say(f"broker starts (start {number})")
        self.market.auditor.broker_started(self.now_ms())
        self.ray.start()
        try:
            self.call(self.blobs.prepare)
            self.call(self.broker.supervision.started)
        except (BrokerAway, OSError, *UNKEPT):
            if self.up:
                self.die(5_000)
            return
        market = ("scheduling", "settling", "verdicts")
        self._loops = {
            "scheduling": (self.broker.scheduling.tick, 2_000, ()),
            "supervision": (self.broker.supervision.sweep, 2_000, market),
            "verdicts": (self.broker.supervision.verdicts, 5_000, market),
            "settling": (self.broker.settling.settle_due, 2_000, market),
            "tidying": (self.broker.idempotency.forget_old, 60_000, ()),
            "retention": (self.broker.retention.sweep, 60_000, ()),
            "uploads": (self.broker.uploads.sweep, 60_000, ()),
            "scrub": (self.broker.packs.scrub, 60_000, ()),
        }
        self._due = {}
        for name in self._loops:
            self._plan(number, name, PAUSE_MS)

    def _sweep_files(self) -> None:
        """Look at all files at once: what no row names goes, unless somebody counts on it."""
        self.broker.retention.begin_files()
        while self.broker.retention.sweep_files():
            pass

    def die(self, back_after_ms: int) -> None:
        """The process is gone; all that it had in memory too."""
        if not self.up:
            return
        self.up = False
        self.store.doom.countdown = 0
        self.disk.died()
        doors, self.doors = self.doors, {}
        for door in doors.values():
            door.gone = True
            door.wire.close()
        self.engine.after(back_after_ms, self.start)

    def call(self, act: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Let the process do something. Raises BrokerAway if it isn't there, or dies doing it."""
        if not self.up:
            raise BrokerAway
        self.doing = act.__qualname__
        if arguments and isinstance(arguments[-1], Message):
            self.doing = f"a {arguments[-1].TYPE}"
        try:
            return act(*arguments, **named)
        except Crashed as crash:
            self.die(self.engine.draw_ms(300, 20_000))
            raise BrokerAway from crash

    def tamper_with_log(self) -> str:
        """Change what was logged, as a broker might that has something to hide; return how."""
        entries: dict[Any, Any] = self.store._tables[LogEntryFact].facts
        draw = self.engine.random
        one, other = sorted(draw.sample(sorted(entries), 2))
        match draw.choice(("dropped", "swapped", "changed")):
            case "dropped":
                # As if it had never been: what came later moves up.
                for at in range(one[0], len(entries) - 1):
                    entries[at,] = replace(entries[at + 1,], id=at)
                del entries[len(entries) - 1,]
                return f"entry {one[0]} is dropped"
            case "swapped":
                first, second = entries[one], entries[other]
                entries[one] = replace(second, id=first.id)
                entries[other] = replace(first, id=second.id)
                return f"entries {one[0]} and {other[0]} are swapped"
            case _:
                entries[one] = replace(entries[one], document=draw.randbytes(32).hex())
                return f"entry {one[0]} is changed"

    def is_current(self, door: Door) -> bool:
        """Say whether the process that opened this door is still the one that runs."""
        return self.up and door.number == self.started and not door.gone

    def name(self, party: str) -> str:
        """Return what people call a party."""
        return self.market.names.get(party, party[:16])

    def accept(self, wire: Wire) -> Door | None:
        """Take a new connection."""
        return Door(self, wire) if self.up else None

    # -- loops --------------------------------------------------------------------------------

    def wake(self, *names: str) -> None:
        """Let these loops come round now."""
        for name in names:
            if self._due.get(name, 0) > self.engine.now_ms + PAUSE_MS:
                self._plan(self.started, name, PAUSE_MS)

    def _wake_of(self, number: int, name: str) -> None:
        if self.up and number == self.started:
            self.wake(name)

    def _plan(self, number: int, name: str, delay_ms: int) -> None:
        due_ms = self.engine.now_ms + delay_ms
        self._due[name] = due_ms
        self.engine.after(delay_ms, partial(self._come_round, number, name, due_ms))

    def _come_round(self, number: int, name: str, due_ms: int) -> None:
        if self.up and number == self.started and self._due.get(name) == due_ms:
            self._round(number, name)

    def _round(self, number: int, name: str) -> None:
        work, period_ms, then = self._loops[name]
        self._due[name] = 0
        try:
            done = self.call(work)
        except BrokerAway:
            return
        except (MatcherAway, OSError, *UNKEPT):
            done = 0
        self._plan(number, name, period_ms)
        if done:
            self.wake(*then)

    def _new_for(self, party: str) -> None:
        door = self.doors.get(party)
        if door is not None:
            number = self.started

            def later() -> None:
                if self.up and number == self.started:
                    door.pump()

            self.engine.after(1, later)
