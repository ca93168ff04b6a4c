"""One conversation between a broker and an agent, without any IO: both sides run this same table.

    phase      who sends   message            next phase
    greeting   broker      hello              joining
    joining    agent       join               answering
    answering  broker      welcome            live
    answering  broker      refused            closed
    joining    broker      refused            closed
    live       broker      refused            closed
    live       (each side the messages that are its own; see wire.py)   live

Rules:
- Whatever is not in the table is a protocol error: the session closes and says why.
- The agent proves itself by signing the broker's nonce, the broker's id and its own instance; the
  proof is of no use on another connection, at another broker, or later.
- The agent learns the broker's id from `hello` and checks it against the one that it expects; what
  the broker sends that matters (leases, settlements) is signed by that id besides.
- Each side says which versions of documents it reads. A side that couldn't read what it would be
  sent is refused here; else the other writes the newest that it reads (versions.py).
- A clock that is off by more than MAX_SKEW_MS is refused here, where the cause can be named,
  instead of later, as documents that seem to have expired.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Literal

from pydantic import Field

from sublet_contracts.documents import (
    Checkpoint,
    Document,
    DocumentRefused,
    Job,
    Lease,
    Offer,
    Receipt,
    Settlement,
    read_document,
    sign_document,
    versions_read,
)
from sublet_contracts.fields import Broker, Issued, Nonce, Party, Text
from sublet_contracts.keys import SigningKey, short
from sublet_contracts.versions import NoCommonVersion, Reads, newest_that, versions_of
from sublet_contracts.wire import (
    PROTOCOL_VERSION,
    FrameRefused,
    Hello,
    Join,
    Message,
    Refused,
    Welcome,
    decode_frame,
    encode_frame,
)

MAX_SKEW_MS = 300_000
MAX_SLEW = 0.5
"""A broker's clock that is off meets the right time without a jump: by this part of the time it
goes faster or slower at most."""

Role = Literal["broker", "agent"]


class Phase(StrEnum):
    """Where the conversation stands."""

    GREETING = "greeting"
    JOINING = "joining"
    ANSWERING = "answering"
    LIVE = "live"
    CLOSED = "closed"


HANDSHAKE: dict[tuple[Phase, Role, str], Phase] = {
    (Phase.GREETING, "broker", Hello.TYPE): Phase.JOINING,
    (Phase.JOINING, "agent", Join.TYPE): Phase.ANSWERING,
    (Phase.JOINING, "broker", Refused.TYPE): Phase.CLOSED,
    (Phase.ANSWERING, "broker", Welcome.TYPE): Phase.LIVE,
    (Phase.ANSWERING, "broker", Refused.TYPE): Phase.CLOSED,
    (Phase.LIVE, "broker", Refused.TYPE): Phase.CLOSED,
}
_HANDSHAKE_TYPES = {kind for _, _, kind in HANDSHAKE}

TO_BROKER: tuple[type[Document], ...] = (Offer, Lease, Checkpoint, Receipt)
TO_AGENT: tuple[type[Document], ...] = (Job, Lease, Checkpoint, Settlement)
"""The kinds that go from one side to the other: whoever gets them must read some version of each
that the other side writes."""


class SessionProof(Document):
    """Signed by the agent in `join`; lives as long as the connection."""

    KIND: ClassVar[str] = "session"
    SIGNED_BY: ClassVar[str] = "the provider"

    party: Party = Field(description="the provider: its public key")
    broker: Broker
    nonce: Nonce = Field(description="the one in the broker's hello")
    instance: Nonce = Field(description="this start of the agent")
    agent_version: Text = Field(description="for people")
    issued_ms: Issued


class SessionCode(StrEnum):
    """Why a session itself is refused. A broker refuses by problems.py's codes besides."""

    CLOCK = "clock"
    VERSION = "version"
    OTHER_BROKER = "other_broker"
    BAD_PROOF = "bad_proof"
    BAD_FRAME = "bad_frame"
    OUT_OF_TURN = "out_of_turn"


class SessionError(Exception):
    """The other side broke the protocol (or isn't who it should be). The session is closed.

    `code`: a SessionCode, a ProblemCode, or what a newer peer knows; `detail`: what is so."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


@dataclass(frozen=True)
class Received:
    """A message that arrived in its place, with the mid to acknowledge once it is on disk."""

    message: Message
    mid: str | None


def next_phase(phase: Phase, sender: Role, message: Message | type[Message]) -> Phase | None:
    """Return the phase after `sender` sends `message`, or None if it may not."""
    if message.TYPE in _HANDSHAKE_TYPES:
        return HANDSHAKE.get((phase, sender, message.TYPE))
    if phase is Phase.LIVE and message.SENDER in (sender, "both"):
        return Phase.LIVE
    return None


class _Session:
    role: Role
    other: Role

    def __init__(self, reads: Reads | None) -> None:
        self.phase = Phase.GREETING
        self._reads = {
            kind: tuple(versions)
            for kind, versions in (versions_read() if reads is None else reads).items()
        }

    def _send(self, message: Message, mid: str | None = None) -> bytes:
        after = next_phase(self.phase, self.role, message)
        if after is None:
            raise SessionError(
                SessionCode.OUT_OF_TURN, f"{message.TYPE} can't be sent while {self.phase}"
            )
        frame = encode_frame(message, mid)
        self.phase = after
        return frame

    def send(self, message: Message, mid: str | None = None) -> bytes:
        """Return the frame of a message of ours. Raises SessionError when it's out of turn."""
        return self._send(message, mid)

    def _receive(self, frame: bytes) -> Received:
        try:
            message, mid = decode_frame(frame)
        except FrameRefused as error:
            raise self._broken(SessionCode.BAD_FRAME, str(error)) from error
        after = next_phase(self.phase, self.other, message)
        if after is None:
            raise self._broken(
                SessionCode.OUT_OF_TURN, f"{message.TYPE} may not come while {self.phase}"
            )
        self.phase = after
        return Received(message, mid)

    def _broken(self, code: str, detail: str) -> SessionError:
        self.phase = Phase.CLOSED
        return SessionError(code, detail)


class BrokerSession(_Session):
    """The broker's side of one connection."""

    role: Role = "broker"
    other: Role = "agent"

    def __init__(self, broker: str, nonce: str, *, reads: Reads | None = None) -> None:
        """`reads`: the versions of documents that it reads, if not those that this program does."""
        super().__init__(reads)
        self._broker = broker
        self._nonce = nonce
        self.proof: SessionProof | None = None

    def hello(self, now_ms: int) -> bytes:
        """Return the first frame of the conversation."""
        return self._send(
            Hello(
                broker=self._broker,
                nonce=self._nonce,
                versions=(PROTOCOL_VERSION,),
                time_ms=now_ms,
                reads=self._reads,
            )
        )

    def receive(self, frame: bytes, now_ms: int) -> Received:
        """Take a frame of the agent's. After `join`, `proof` says who it is; answer with
        `welcome` or `refuse`. Raises SessionError: send `refuse(error)` if it's not None, close.
        """
        received = self._receive(frame)
        if isinstance(received.message, Join):
            try:
                self.proof = self._prove(received.message, now_ms)
            except SessionError as error:
                raise self._broken(error.code, error.detail) from error
        return received

    def refuse(self, error: SessionError) -> bytes:
        """Return the frame that tells the agent why it is turned away."""
        self.phase = Phase.CLOSED
        return encode_frame(Refused(code=error.code, detail=error.detail[:1024]))

    def _prove(self, join: Join, now_ms: int) -> SessionProof:
        if join.version != PROTOCOL_VERSION:
            raise SessionError(
                SessionCode.VERSION,
                f"this broker speaks protocol {PROTOCOL_VERSION}, the agent {join.version}",
            )
        try:
            proof = read_document(join.proof, SessionProof, signed_by=())
        except (DocumentRefused, TypeError) as error:
            raise SessionError(SessionCode.BAD_PROOF, str(error)) from error
        if proof.broker != self._broker or proof.nonce != self._nonce:
            raise SessionError(SessionCode.BAD_PROOF, "the proof was made for another connection")
        check_clock(proof.issued_ms, now_ms)
        check_versions("agent", TO_AGENT, join.reads)
        return proof


class AgentSession(_Session):
    """The agent's side of one connection."""

    role: Role = "agent"
    other: Role = "broker"

    def __init__(
        self,
        key: SigningKey,
        *,
        instance: str,
        agent_version: str,
        broker: str | None,
        reads: Reads | None = None,
    ) -> None:
        """`reads`: the versions of documents that it reads, if not those that this program does."""
        super().__init__(reads)
        self._key = key
        self._instance = instance
        self._version = agent_version
        self.broker = broker
        self.broker_ahead_ms = 0
        """How far the broker's clock is ahead of ours, less the way of its hello: at most 300 s."""
        self.broker_reads: Reads = {}
        """The versions of documents that the broker reads; nothing until it has said hello."""

    def receive(self, frame: bytes, now_ms: int) -> tuple[Received, bytes | None]:
        """Take a frame of the broker's; return it and the frame to answer with, if any.

        Raises SessionError, also for `refused`.
        """
        received = self._receive(frame)
        match received.message:
            case Hello() as hello:
                return received, self._join(hello, now_ms)
            case Refused() as refused:
                raise self._broken(refused.code, refused.detail)
        return received, None

    def _join(self, hello: Hello, now_ms: int) -> bytes:
        if self.broker is not None and hello.broker != self.broker:
            raise self._broken(
                SessionCode.OTHER_BROKER,
                f"this is broker {short(hello.broker)}, not {short(self.broker)}, which this "
                "agent's state folder belongs to",
            )
        if PROTOCOL_VERSION not in hello.versions:
            raise self._broken(
                SessionCode.VERSION,
                f"the broker speaks protocol {list(hello.versions)}, this agent {PROTOCOL_VERSION}",
            )
        try:
            check_clock(now_ms, hello.time_ms)
            check_versions("broker", TO_BROKER, hello.reads)
        except SessionError as error:
            raise self._broken(error.code, error.detail) from error
        self.broker = hello.broker
        self.broker_ahead_ms = hello.time_ms - now_ms
        self.broker_reads = hello.reads
        proof = SessionProof(
            party=self._key.party,
            broker=hello.broker,
            nonce=hello.nonce,
            instance=self._instance,
            agent_version=self._version,
            issued_ms=now_ms,
        )
        signed = sign_document(proof, self._key)
        return self._send(Join(proof=signed.envelope, version=PROTOCOL_VERSION, reads=self._reads))


def check_versions(whose: Role, kinds: Iterable[type[Document]], reads: Reads) -> None:
    """Refuse a peer that can't read what it would be sent. Raises SessionError."""
    for kind in kinds:
        try:
            # Who doesn't name a kind that it is sent doesn't know it.
            newest_that(kind, {kind.KIND: reads.get(kind.KIND, ())})
        except NoCommonVersion as error:
            raise SessionError(
                SessionCode.VERSION,
                f"the {whose} reads versions {list(reads.get(kind.KIND, ()))} of the document "
                f"{kind.KIND!r}; what it would be sent is {list(versions_of(kind))}",
            ) from error


def check_clock(agent_ms: int, broker_ms: int) -> None:
    """Refuse an agent whose clock is too far off. Raises SessionError."""
    skew_ms = agent_ms - broker_ms
    if abs(skew_ms) > MAX_SKEW_MS:
        direction = "ahead of" if skew_ms > 0 else "behind"
        raise SessionError(
            SessionCode.CLOCK,
            f"this machine's clock is {abs(skew_ms) // 1000} s {direction} the broker's",
        )
