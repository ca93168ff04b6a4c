"""The conversation's table, exhaustively, and what a broker or an agent may try against it."""

import itertools
import json
from typing import get_args

import pytest

from sublet_contracts.documents import sign_document, versions_read
from sublet_contracts.session import (
    HANDSHAKE,
    AgentSession,
    BrokerSession,
    Phase,
    Role,
    SessionError,
    SessionProof,
    next_phase,
)
from sublet_contracts.wire import (
    MESSAGES,
    Ack,
    Heartbeat,
    Hello,
    Join,
    Message,
    Refused,
    Welcome,
    encode_frame,
)
from tests.contracts.samples import BROKER, KEYS, NOW_MS, PROVIDER
from tests.contracts.test_wire import messages

NONCE = "ab" * 16
OTHER_NONCE = "cd" * 16
WELCOME = Welcome(heartbeat_ms=3000, fee_bps=500, leases=())
BY_TYPE = {message.TYPE: message for message in messages()}


def agent_session(broker: str | None = None, key: str = "provider") -> AgentSession:
    return AgentSession(KEYS[key], instance="12" * 8, agent_version="0.1.0", broker=broker)


def frame(message: Message) -> bytes:
    return encode_frame(message, "m-1" if message.RELIABLE else None)


def at(phase: Phase, role: Role) -> BrokerSession | AgentSession:
    """Return a session of `role` that stands in `phase`, reached by messages alone."""
    broker, agent = BrokerSession(BROKER, NONCE), agent_session()
    if phase is not Phase.GREETING:
        _, answer = agent.receive(broker.hello(NOW_MS), NOW_MS)
        assert answer is not None
        if phase is Phase.JOINING:
            # The agent answers hello at once, so this phase is seen from outside by brokers only.
            agent = agent_session()
            agent.phase = Phase.JOINING
        else:
            broker.receive(answer, NOW_MS)
    if phase is Phase.LIVE:
        agent.receive(broker.send(WELCOME), NOW_MS)
    if phase is Phase.CLOSED:
        with pytest.raises(SessionError):
            agent.receive(broker.refuse(SessionError("full", "come later")), NOW_MS)
    session = broker if role == "broker" else agent
    assert session.phase is phase
    return session


def expected(phase: Phase, sender: Role, message: Message) -> Phase | None:
    """The table as it stands in the docs, said in another way than in the code."""
    match phase, sender, message.TYPE:
        case (Phase.GREETING, "broker", "hello"):
            return Phase.JOINING
        case (Phase.JOINING, "agent", "join"):
            return Phase.ANSWERING
        case (Phase.ANSWERING, "broker", "welcome"):
            return Phase.LIVE
        case (Phase.JOINING | Phase.ANSWERING | Phase.LIVE, "broker", "refused"):
            return Phase.CLOSED
        case (Phase.LIVE, _, kind) if kind not in ("hello", "join", "welcome", "refused"):
            return Phase.LIVE if message.SENDER in (sender, "both") else None
    return None


CASES = list(itertools.product(Phase, get_args(Role), sorted(MESSAGES)))


@pytest.mark.parametrize(("phase", "sender", "kind"), CASES)
def test_a_message_is_in_the_table_or_closes_the_session(
    phase: Phase, sender: Role, kind: str
) -> None:
    message = BY_TYPE[kind]
    after = expected(phase, sender, message)
    assert next_phase(phase, sender, message) is after

    sending = at(phase, sender)
    if after is None:
        with pytest.raises(SessionError, match=f"{kind} can't be sent while {phase}"):
            sending.send(message, "m-1" if message.RELIABLE else None)
        assert sending.phase is phase
    else:
        sending.send(message, "m-1" if message.RELIABLE else None)
        assert sending.phase is after

    receiving = at(phase, "agent" if sender == "broker" else "broker")
    if after is None:
        with pytest.raises(SessionError, match=f"{kind} may not come while {phase}") as error:
            receiving.receive(frame(message), NOW_MS)
        assert error.value.code == "out_of_turn"
        assert receiving.phase is Phase.CLOSED
    elif phase is Phase.LIVE and after is Phase.LIVE:
        receiving.receive(frame(message), NOW_MS)
        assert receiving.phase is Phase.LIVE


def test_every_edge_of_the_table_is_an_expected_one() -> None:
    assert all(
        expected(before, who, BY_TYPE[kind]) is after
        for (before, who, kind), after in HANDSHAKE.items()
    )


def test_the_handshake_proves_the_agent_to_the_broker() -> None:
    broker, agent = BrokerSession(BROKER, NONCE), agent_session(BROKER)
    _, join = agent.receive(broker.hello(NOW_MS), NOW_MS + 5)
    assert join is not None
    broker.receive(join, NOW_MS + 10)
    assert broker.proof is not None
    assert (broker.proof.party, broker.proof.instance) == (PROVIDER, "12" * 8)
    received, answer = agent.receive(broker.send(WELCOME), NOW_MS + 20)
    assert received.message == WELCOME
    assert answer is None
    mids = broker.receive(agent.send(Ack(mids=("m-7",))), NOW_MS + 30)
    assert mids.message == Ack(mids=("m-7",))
    assert agent.broker == BROKER


def test_a_reliable_message_brings_its_mid() -> None:
    broker = at(Phase.LIVE, "broker")
    received = broker.receive(frame(BY_TYPE["withdraw"]), NOW_MS)
    assert getattr(received, "mid", None) == "m-1"


def joined(proof: SessionProof, *, signer: str = "provider", version: int = 1) -> bytes:
    envelope = sign_document(proof, KEYS[signer]).envelope
    return encode_frame(Join(proof=envelope, version=version, reads=versions_read()))


def proof(**change: object) -> SessionProof:
    plain = {
        "party": PROVIDER,
        "broker": BROKER,
        "nonce": NONCE,
        "instance": "12" * 8,
        "agent_version": "0.1.0",
        "issued_ms": NOW_MS,
    }
    return SessionProof.model_validate(plain | change)


@pytest.mark.parametrize(
    ("join", "code", "detail"),
    [
        (joined(proof(nonce=OTHER_NONCE)), "bad_proof", "made for another connection"),
        (joined(proof(broker=KEYS["stranger"].party)), "bad_proof", "made for another connection"),
        (joined(proof(), signer="stranger"), "bad_proof", "not signed by the provider"),
        (joined(proof(), version=2), "version", "protocol 1, the agent 2"),
        (joined(proof(issued_ms=NOW_MS + 600_000)), "clock", "600 s ahead of the broker's"),
        (joined(proof(issued_ms=NOW_MS - 600_000)), "clock", "600 s behind the broker's"),
        (b'{"type":"join","mid":null,"body":{}}', "bad_frame", "proof"),
        (b"\xff", "bad_frame", "not UTF-8"),
    ],
    ids=["replayed", "other-broker", "stranger", "version", "ahead", "behind", "empty", "bytes"],
)
def test_a_bad_join_closes_the_session_and_can_be_answered(
    join: bytes, code: str, detail: str
) -> None:
    broker, agent = BrokerSession(BROKER, NONCE), agent_session()
    agent.receive(broker.hello(NOW_MS), NOW_MS)
    with pytest.raises(SessionError, match=detail) as error:
        broker.receive(join, NOW_MS)
    assert error.value.code == code
    assert broker.phase is Phase.CLOSED
    assert broker.proof is None
    with pytest.raises(SessionError, match="can't be sent"):
        broker.send(WELCOME)
    with pytest.raises(SessionError, match=detail) as told:
        agent.receive(broker.refuse(error.value), NOW_MS)
    assert told.value.code == code
    assert agent.phase is Phase.CLOSED


def test_a_proof_can_not_be_replayed_on_another_connection() -> None:
    first, agent = BrokerSession(BROKER, NONCE), agent_session()
    _, join = agent.receive(first.hello(NOW_MS), NOW_MS)
    assert join is not None
    first.receive(join, NOW_MS)
    second = BrokerSession(BROKER, OTHER_NONCE)
    second.hello(NOW_MS)
    with pytest.raises(SessionError, match="another connection"):
        second.receive(join, NOW_MS)


def test_another_kind_of_document_is_no_proof() -> None:
    broker = BrokerSession(BROKER, NONCE)
    broker.hello(NOW_MS)
    announce = BY_TYPE["announce"].model_dump(mode="json")["offer"]
    body = {"proof": announce, "version": 1, "reads": versions_read()}
    with pytest.raises(SessionError, match=r"expected .*session") as error:
        broker.receive(json.dumps({"type": "join", "mid": None, "body": body}).encode(), NOW_MS)
    assert error.value.code == "bad_proof"


@pytest.mark.parametrize(
    ("off_ms", "words"), [(600_000, "600 s ahead of"), (-600_000, "600 s behind")]
)
def test_an_agent_whose_clock_is_ten_minutes_off_learns_it_first(off_ms: int, words: str) -> None:
    broker, agent = BrokerSession(BROKER, NONCE), agent_session()
    with pytest.raises(SessionError, match=words) as error:
        agent.receive(broker.hello(NOW_MS), NOW_MS + off_ms)
    assert error.value.code == "clock"
    assert agent.phase is Phase.CLOSED
    assert agent.broker is None


@pytest.mark.parametrize("off_ms", [300_000, -300_000])
def test_a_clock_within_the_bound_is_accepted(off_ms: int) -> None:
    broker, agent = BrokerSession(BROKER, NONCE), agent_session()
    _, join = agent.receive(broker.hello(NOW_MS), NOW_MS + off_ms)
    assert join is not None
    broker.receive(join, NOW_MS)
    assert broker.proof is not None


def test_an_agent_stays_with_its_broker() -> None:
    agent = agent_session(broker=KEYS["stranger"].party)
    with pytest.raises(SessionError, match="state folder belongs to") as error:
        agent.receive(BrokerSession(BROKER, NONCE).hello(NOW_MS), NOW_MS)
    assert error.value.code == "other_broker"
    assert agent.phase is Phase.CLOSED


def test_an_agent_that_is_too_old_is_told_what_is_spoken() -> None:
    agent = agent_session()
    hello = Hello(
        broker=BROKER, nonce=NONCE, versions=(2, 3), time_ms=NOW_MS, reads=versions_read()
    )
    with pytest.raises(SessionError, match=r"protocol \[2, 3\], this agent 1") as error:
        agent.receive(encode_frame(hello), NOW_MS)
    assert error.value.code == "version"
    assert agent.phase is Phase.CLOSED


def test_the_broker_cannot_be_made_to_say_too_much() -> None:
    refusal = BrokerSession(BROKER, NONCE).refuse(SessionError("bad_frame", "x" * 100_000))
    assert len(json.loads(refusal)["body"]["detail"]) == 1024


def test_after_the_end_nothing_comes_and_nothing_goes() -> None:
    broker = at(Phase.CLOSED, "broker")
    with pytest.raises(SessionError):
        broker.receive(frame(Heartbeat(runs=())), NOW_MS)
    with pytest.raises(SessionError):
        broker.send(Refused(code="x", detail="y"))
