"""The session without IO: two ends, a line that loses, doubles and breaks, and nothing is taken
twice or lost.

Rules in DESIGN.md and wire.py: what has a mid is sent again until it is acknowledged, on this
connection or the next, and is acted upon once. Both ends here keep what a real one keeps on disk
(its unacknowledged messages, the mids it took); the session table is the real one.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sublet_contracts import wire
from sublet_contracts.reasons import Reason
from sublet_contracts.session import (
    MAX_SKEW_MS,
    AgentSession,
    BrokerSession,
    Phase,
    SessionError,
)
from sublet_contracts.wire import Ack, Hello, Join, Message
from tests.contracts.samples import KEYS, LEASE_ID, NOW_MS
from tests.histories.profiles import profile

BROKER, AGENT = KEYS["broker"].party, KEYS["provider"].party


class End:
    """One end's disk: what it has to tell, what it took, in order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.told = 0
        self.unacked: dict[str, Message] = {}
        self.taken: list[int] = []
        self.seen: set[str] = set()

    def tell(self) -> None:
        """Something happens that the other end must hear of, whatever comes."""
        self.told += 1
        mid = f"{self.name}-{self.told}"
        if self.name == "agent":
            self.unacked[mid] = wire.Withdraw(offer_sequence=self.told)
        else:
            self.unacked[mid] = wire.Order(
                lease=LEASE_ID, epoch=self.told, desired="stop", reason=Reason.CANCELLED, grace_ms=0
            )

    def take(self, message: Message, mid: str) -> None:
        if mid in self.seen:
            return
        self.seen.add(mid)
        match message:
            case wire.Withdraw():
                self.taken.append(message.offer_sequence)
            case wire.Order():
                self.taken.append(message.epoch)
            case _:
                raise AssertionError(f"{message.TYPE} has a mid")


class Conversation(RuleBasedStateMachine):
    """A broker and an agent, and whoever sits on the line between them."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = {"agent": End("agent"), "broker": End("broker")}
        self.now_ms = NOW_MS
        self.connections = 0
        self.recorded: list[bytes] = []
        self.connect()

    def connect(self) -> None:
        """Dial: a new socket, new sessions, and the handshake; what was in flight is gone."""
        self.connections += 1
        self.dialled_ms = self.now_ms
        nonce = f"{self.connections:032x}"
        self.broker = BrokerSession(BROKER, nonce)
        self.agent = AgentSession(
            KEYS["provider"], instance="cd" * 16, agent_version="0", broker=BROKER
        )
        self.line: dict[str, list[bytes]] = {"agent": [], "broker": []}
        """By the end that is to receive: the frames on their way."""
        self.closed = False
        self.line["agent"].append(self.broker.hello(self.now_ms))

    def break_off(self) -> None:
        self.closed = True
        self.line = {"agent": [], "broker": []}

    # -- what happens ------------------------------------------------------------------------------

    @rule(name=st.sampled_from(("agent", "broker")))
    def news(self, name: str) -> None:
        self.ends[name].tell()

    @precondition(lambda self: not self.closed)
    @rule(name=st.sampled_from(("agent", "broker")))
    def send(self, name: str) -> None:
        """An end sends all that isn't acknowledged, as both do after a connect and now and then."""
        session = self.agent if name == "agent" else self.broker
        other = "broker" if name == "agent" else "agent"
        if session.phase is not Phase.LIVE:
            return
        for mid, message in self.ends[name].unacked.items():
            self.line[other].append(session.send(message, mid))

    @precondition(lambda self: not self.closed)
    @rule(name=st.sampled_from(("agent", "broker")), count=st.integers(1, 4))
    def deliver(self, name: str, count: int) -> None:
        for _ in range(count):
            if self.line[name]:
                self.arrive(name, self.line[name].pop(0))

    @precondition(lambda self: not self.closed)
    @rule(name=st.sampled_from(("agent", "broker")), at=st.integers(0, 10))
    def double(self, name: str, at: int) -> None:
        """A reliable message comes twice, as after a lost ack."""
        frames = [f for f in self.line[name] if b'"mid":null' not in f]
        if frames:
            self.line[name].append(frames[at % len(frames)])

    @precondition(lambda self: not self.closed)
    @rule(name=st.sampled_from(("agent", "broker")), at=st.integers(0, 10))
    def lose(self, name: str, at: int) -> None:
        """A frame is lost: once live, that hurts nobody; in the handshake the line is dead."""
        if self.line[name]:
            frame = self.line[name].pop(at % len(self.line[name]))
            if Phase.LIVE not in (self.agent.phase, self.broker.phase) or b'"welcome"' in frame:
                self.break_off()

    @rule()
    def reconnect(self) -> None:
        self.break_off()
        self.connect()

    @rule(by_ms=st.integers(1, 2 * MAX_SKEW_MS))
    def time_passes(self, by_ms: int) -> None:
        self.now_ms += by_ms

    # -- what hostile peers do ---------------------------------------------------------------------

    @precondition(lambda self: bool(self.recorded))
    @rule(which=st.integers(0, 10))
    def replay_a_join(self, which: int) -> None:
        """A proof that was overheard is of no use on another connection."""
        other = BrokerSession(BROKER, f"{10**6 + self.connections:032x}")
        other.hello(self.now_ms)
        self.refused(other, self.recorded[which % len(self.recorded)])
        assert other.proof is None

    @rule(name=st.sampled_from(("agent", "broker")))
    def out_of_turn(self, name: str) -> None:
        """Before the handshake is over nothing else is heard."""
        if name == "agent":
            fresh = BrokerSession(BROKER, "ef" * 16)
            fresh.hello(self.now_ms)
            self.refused(fresh, wire.encode_frame(wire.Heartbeat(runs=())))
        else:
            agent = AgentSession(
                KEYS["provider"], instance="cd" * 16, agent_version="0", broker=BROKER
            )
            self.refused(agent, wire.encode_frame(wire.Unprepare(job=LEASE_ID)))

    def refused(self, session: BrokerSession | AgentSession, frame: bytes) -> None:
        try:
            session.receive(frame, self.now_ms)
        except SessionError:
            assert session.phase is Phase.CLOSED
            return
        raise AssertionError(f"{frame[:80]!r} was taken")

    # -- the two ends ------------------------------------------------------------------------------

    def arrive(self, name: str, frame: bytes) -> None:
        try:
            self.receive(name, frame)
        except SessionError as error:
            # Only time can be against an honest frame: five minutes on its way, in the handshake.
            if error.code != "clock" or self.now_ms - self.dialled_ms <= MAX_SKEW_MS:
                raise
            self.break_off()

    def receive(self, name: str, frame: bytes) -> None:
        if name == "agent":
            received, answer = self.agent.receive(frame, self.now_ms)
            if isinstance(received.message, Hello):
                assert answer is not None
                self.recorded.append(answer)
                self.line["broker"].append(answer)
                return
            session: AgentSession | BrokerSession = self.agent
        else:
            received = self.broker.receive(frame, self.now_ms)
            if isinstance(received.message, Join):
                assert self.broker.proof is not None
                assert self.broker.proof.party == AGENT
                welcome = wire.Welcome(heartbeat_ms=3_000, fee_bps=500, leases=())
                self.line["agent"].append(self.broker.send(welcome))
                return
            session = self.broker
        match received.message:
            case Ack(mids=mids):
                for mid in mids:
                    self.ends[name].unacked.pop(mid, None)
            case message if received.mid is not None:
                self.ends[name].take(message, received.mid)
                other = "broker" if name == "agent" else "agent"
                self.line[other].append(session.send(Ack(mids=(received.mid,))))
            case _:
                pass

    # -- what must hold ----------------------------------------------------------------------------

    @invariant()
    def nothing_twice_and_nothing_lost(self) -> None:
        for name, other in (("agent", "broker"), ("broker", "agent")):
            sender, receiver = self.ends[name], self.ends[other]
            assert len(receiver.taken) == len(set(receiver.taken)), "taken twice"
            waiting = {int(mid.rpartition("-")[2]) for mid in sender.unacked}
            assert waiting | set(receiver.taken) == set(range(1, sender.told + 1)), "lost"

    @invariant()
    def live_means_proven(self) -> None:
        if self.broker.phase is Phase.LIVE:
            assert self.broker.proof is not None
            assert self.broker.proof.nonce == f"{self.connections:032x}"

    def teardown(self) -> None:
        """Once the line is good everything arrives, in a connection."""
        self.reconnect()
        for _ in range(4):
            self.send("agent")
            self.send("broker")
            while self.line["agent"] or self.line["broker"]:
                self.deliver("agent", 1)
                self.deliver("broker", 1)
        assert self.agent.phase is self.broker.phase is Phase.LIVE
        for name, other in (("agent", "broker"), ("broker", "agent")):
            assert not self.ends[name].unacked
            assert sorted(self.ends[other].taken) == list(range(1, self.ends[name].told + 1))


Conversation.TestCase.settings = profile(examples=60, steps=40)
TestConversation = Conversation.TestCase
