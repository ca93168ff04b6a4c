"""The agents' websocket, /v1/agent: one connection per provider, spoken as session.py says.

- A newer connection of the same party replaces the older one.
- What an agent sends is acknowledged after the use-case has committed it, in order, one at a time.
  At most MAX_QUEUED messages or MAX_QUEUED_BYTES are read ahead, so that pings behind them are
  answered while we work; beyond that the socket isn't read, and TCP holds the sender back.
- What we send reliably comes from the outbox: on each connection anew, again after RESEND_S, until
  it is acknowledged. At most WINDOW messages are under way.
- Who doesn't join, doesn't read, or says nothing for too long is dropped; it reconnects.
"""

import asyncio
import contextlib
import logging
from collections import deque
from weakref import WeakValueDictionary

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from sublet_broker.adapters.http.edge import Edge
from sublet_broker.adapters.http.problems import STATUS, as_refusal
from sublet_broker.service.errors import NotYet, Refusal, StaleInstance
from sublet_broker.service.ports import StorageFull, StoreAway
from sublet_contracts.documents import DocumentRefused
from sublet_contracts.keys import short
from sublet_contracts.session import (
    BrokerSession,
    Received,
    SessionCode,
    SessionError,
    SessionProof,
)
from sublet_contracts.wire import (
    MAX_FRAME_BYTES,
    Ack,
    Announce,
    Heartbeat,
    Logs,
    LogStates,
    Message,
)

log = logging.getLogger("sublet.agents")

JOIN_S = 15.0
SEND_S = 20.0
RESEND_S = 10.0
BUSY_S = 1.0
"""The outbox of an agent is looked at again after this where the broker could not do so."""
WINDOW = 100
MAX_STRANGERS = 256
"""Connections that haven't joined yet."""
MAX_CONNECTIONS = 5_000
MAX_REPLIES = 1_000
MAX_QUEUED = 256
MAX_QUEUED_BYTES = 1 << 20
"""Of one connection, and one frame more."""
ACK_BATCH = 200
GOING_AWAY, POLICY, RESTART, TRY_LATER = 1001, 1008, 1012, 1013

router = APIRouter()


@router.websocket("/v1/agent")
async def agent(websocket: WebSocket) -> None:
    """The agents' door."""
    hub: Hub = websocket.app.state.hub
    await hub.serve(websocket)


class Hub:
    """All connections. Belongs to one event loop; `wake` may be called from any thread."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._loop = asyncio.get_running_loop()
        self._strangers = 0
        self.connections: dict[str, Connection] = {}
        self._joining: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def wake(self, party: str) -> None:
        """Something is new in the outbox for `party` (service hook: called after a commit)."""
        if party in self.connections and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, party)

    def _wake(self, party: str) -> None:
        connection = self.connections.get(party)
        if connection is not None:
            connection.has_mail()

    async def serve(self, websocket: WebSocket) -> None:
        """Speak with one agent until either side ends it."""
        if self._edge.stopping.is_set():
            await websocket.close(RESTART)
            return
        if self._strangers >= MAX_STRANGERS or len(self.connections) >= MAX_CONNECTIONS:
            await websocket.close(TRY_LATER)
            return
        await websocket.accept()
        nonce = self._edge.broker.context.ports.entropy.hex(16)
        session = BrokerSession(self._edge.broker.party, nonce)
        connection = Connection(self._edge, websocket, session)
        try:
            self._strangers += 1
            try:
                proof = await connection.greet()
            finally:
                self._strangers -= 1
            if proof is not None:
                await self._join_and_talk(connection, proof)
        except (WebSocketDisconnect, SlowPeer) as error:
            log.debug("a connection ended: %s", error or type(error).__name__)

    async def _join_and_talk(self, connection: "Connection", proof: SessionProof) -> None:
        party = proof.party
        lock = self._joining.setdefault(party, asyncio.Lock())
        async with lock:
            try:
                welcome = await self._edge.call(self._edge.broker.sessions.joined, proof)
            except Refusal as refusal:
                await connection.refuse(refusal)
                return
            older = self.connections.get(party)
            self.connections[party] = connection
            connection.begin(proof)
            if older is not None:
                older.replaced_by(proof.instance)
        log.info("agent %s joined", short(party), extra={"party": party})
        self._edge.loops.wake("scheduling")
        try:
            await connection.send(welcome)
            await connection.talk()
        finally:
            await self._left(connection, proof, lock)

    async def _left(
        self, connection: "Connection", proof: SessionProof, lock: asyncio.Lock
    ) -> None:
        party = proof.party
        async with lock:
            if self.connections.get(party) is not connection:
                return
            del self.connections[party]
            if self._edge.stopping.is_set():
                return  # it was us: its runs go on, and it comes back to the next broker
            try:
                await self._edge.must_call(self._edge.broker.sessions.left, party, proof.instance)
            except (StorageFull, StoreAway) as error:
                # The sweeper finds out by the silence.
                log.warning("agent %s left, which could not be noted: %s", short(party), error)
        log.info("agent %s left", short(party), extra={"party": party})

    async def goodbye(self) -> None:
        """Close all connections: the broker restarts and the agents come back by themselves."""
        everybody = list(self.connections.values())
        await asyncio.gather(*(c.end(RESTART, "the broker restarts") for c in everybody))


class SlowPeer(Exception):
    """The other side doesn't read, or says nothing."""


class Connection:
    """One connection."""

    def __init__(self, edge: Edge, websocket: WebSocket, session: BrokerSession) -> None:
        self._edge = edge
        self._websocket = websocket
        self._session = session
        self._replies: deque[Message] = deque()
        self._acks: deque[str] = deque()
        self._sent: dict[str, float] = {}
        """When each message was sent (the loop's time) that hasn't been acknowledged."""
        self._queue: asyncio.Queue[tuple[Received, int]] = asyncio.Queue(MAX_QUEUED)
        self._queued_bytes = 0
        self._taken = asyncio.Event()
        self._sending = asyncio.Lock()
        self._party = ""
        self._instance = ""
        self._final: tuple[str, str] | None = None
        self._mail = True
        """Something may wait in the outbox that hasn't been looked at: after a join, always."""
        self.outgoing = asyncio.Event()

    def begin(self, proof: SessionProof) -> None:
        """It is known who is there."""
        self._party, self._instance = proof.party, proof.instance

    async def greet(self) -> SessionProof | None:
        """Say hello; return who joined, or None when the conversation is over."""
        await self._send_frame(self._session.hello(self._edge.now_ms()))
        received, _ = await self._receive(JOIN_S)
        return self._session.proof if received is not None else None

    async def talk(self) -> None:
        """Read and write until the connection ends."""
        writer = asyncio.create_task(self._write(), name=f"writer {short(self._party)}")
        reader = asyncio.create_task(self._read(), name=f"reader {short(self._party)}")
        worker = asyncio.create_task(self._work(), name=f"worker {short(self._party)}")
        tasks = {reader, writer, worker}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            error = task.exception()
            if isinstance(error, SlowPeer):
                log.info("agent %s dropped: %s", short(self._party), error)
                await self.end(GOING_AWAY, str(error))
            elif error is not None and not isinstance(error, WebSocketDisconnect):
                log.error("agent %s: connection failed", short(self._party), exc_info=error)
                await self.end(1011, "the broker failed; reconnect")

    async def send(self, message: Message, mid: str | None = None) -> None:
        """Send one message."""
        await self._send_frame(self._session.send(message, mid))

    async def refuse(self, refusal: Refusal) -> None:
        """Say why, and close."""
        await self._refuse(SessionError(refusal.code, refusal.detail))

    def replaced_by(self, instance: str) -> None:
        """A newer connection of the party is there: the writer says so and ends this one."""
        if instance == self._instance:
            self._final = ("", "")  # the same process again: this line is dead
        else:
            stale = StaleInstance()
            self._final = (stale.code, stale.detail)
        self.outgoing.set()

    def has_mail(self) -> None:
        """Something is new in the outbox, or a notice."""
        self._mail = True
        self.outgoing.set()

    async def end(self, code: int, why: str) -> None:
        """Close the websocket, if it is still open."""
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
            async with asyncio.timeout(SEND_S):
                await self._websocket.close(code, why[:100])

    async def _read(self) -> None:
        silent_s = max(15.0, self._edge.broker.context.settings.heartbeat_ms * 5 / 1000)
        while True:
            received, size_bytes = await self._receive(silent_s)
            if received is None:
                return
            self._edge.metrics.message(received.message.TYPE)
            if self._queue.empty() and self._is_steady(received.message):
                continue
            self._queued_bytes += size_bytes
            await self._queue.put((received, size_bytes))
            while self._queued_bytes > MAX_QUEUED_BYTES:
                self._taken.clear()
                await self._taken.wait()

    def _is_steady(self, message: Message) -> bool:
        """Take a heartbeat that changes nothing but figures, as most do, without a thread; and how
        unfinished lines stand."""
        if isinstance(message, LogStates):
            self._edge.broker.sessions.log_states(self._party, self._instance, message)
            return True
        return isinstance(message, Heartbeat) and self._edge.broker.sessions.steady(
            self._party, self._instance, message
        )

    async def _work(self) -> None:
        """Let the use-cases act on what was read, in order."""
        while True:
            received, size_bytes = await self._queue.get()
            if not await self._take(received):
                return
            self._queued_bytes -= size_bytes
            self._taken.set()
            if len(self._replies) >= MAX_REPLIES:
                raise SlowPeer(f"{MAX_REPLIES} answers wait for it")

    async def _take(self, received: Received) -> bool:
        """Let the use-cases act on a message. False: the conversation is over."""
        message, mid = received.message, received.mid
        sessions = self._edge.broker.sessions
        try:
            replies = await self._edge.call(sessions.receive, self._party, self._instance, message)
        except NotYet as error:
            log.debug("%s of %s comes again: %s", message.TYPE, short(self._party), error)
            return True
        except StaleInstance as stale:
            await self.refuse(stale)
            return False
        except StorageFull as full:
            # Not acknowledged: it comes again, and nothing is lost.
            log.error("%s: %s of %s waits", full, message.TYPE, short(self._party))
            return True
        except StoreAway:
            log.warning("no database: %s of %s waits", message.TYPE, short(self._party))
            return True
        except (Refusal, DocumentRefused) as error:
            refusal = as_refusal(error)
            if refusal is None or STATUS[refusal.code] == 503:
                return True
            # It will never be right, so it is acknowledged: its sender need not keep it.
            log.warning("%s of agent %s refused: %s", message.TYPE, short(self._party), refusal)
            if isinstance(message, Announce):
                await self.refuse(refusal)
                return False
            replies = []
        self._replies.extend(replies)
        if mid is not None:
            self._acks.append(mid)
        if isinstance(message, Ack):
            for done in message.mids:
                self._sent.pop(done, None)
            self._mail = True  # there may be more than the window held
        if replies or mid is not None or isinstance(message, Ack):
            self.outgoing.set()
        if not isinstance(message, (Ack, Heartbeat, Logs)):
            self._edge.wake_market()
        return True

    async def _write(self) -> None:
        outbox = self._edge.broker.outbox
        while True:
            self.outgoing.clear()
            if self._final is not None:
                await self._say_last(*self._final)
                return
            while self._acks:
                count = min(ACK_BATCH, len(self._acks))
                await self.send(Ack(mids=tuple(self._acks.popleft() for _ in range(count))))
            while self._replies:
                await self.send(self._replies.popleft())
            for notice in outbox.notices(self._party):
                await self.send(notice)
            again_s = await self._send_mail()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(again_s):
                    await self.outgoing.wait()

    async def _send_mail(self) -> float | None:
        """Send what waits in the outbox, if something is new or wasn't acknowledged for long.

        Return after how long to look again, whatever happens; None: nothing waits, so nobody need
        be asked until something is new.
        """
        now_s = asyncio.get_running_loop().time()
        overdue = {mid for mid, at_s in self._sent.items() if now_s - at_s >= RESEND_S}
        if not self._mail and not overdue:
            return self._until_overdue_s(now_s)
        self._mail = False
        outbox, known = self._edge.broker.outbox, self._sent.keys() - overdue
        try:
            waiting = await self._edge.call(outbox.pending, self._party, WINDOW, known)
        except (Refusal, StoreAway) as error:
            # A broker that can't look now is no reason to lose an agent.
            log.debug("the outbox of %s waits: %s", short(self._party), error)
            self._mail = True
            return BUSY_S
        for mid in overdue:
            self._sent.pop(mid, None)  # one that isn't waiting any more was acknowledged elsewhere
        for mid, message in waiting:
            await self.send(message, mid)
            self._sent[mid] = now_s
        return self._until_overdue_s(now_s)

    def _until_overdue_s(self, now_s: float) -> float | None:
        oldest_s = min(self._sent.values(), default=None)
        return None if oldest_s is None else max(0.0, oldest_s + RESEND_S - now_s)

    async def _say_last(self, code: str, detail: str) -> None:
        if code:
            log.info("agent %s: %s", short(self._party), detail)
            await self._refuse(SessionError(code, detail))
        else:
            await self.end(GOING_AWAY, "a newer connection of this agent took over")

    async def _receive(self, within_s: float) -> tuple[Received | None, int]:
        """Return the next message and its bytes; None when the other side broke the protocol (it
        was told)."""
        try:
            async with asyncio.timeout(within_s):
                event = await self._websocket.receive()
        except TimeoutError as error:
            raise SlowPeer(f"nothing came for {within_s:.0f} s") from error
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code", 1005), event.get("reason"))
        text: str | None = event.get("text")
        frame: bytes = text.encode() if text is not None else event.get("bytes") or b""
        try:
            if len(frame) > MAX_FRAME_BYTES:
                raise SessionError(
                    SessionCode.BAD_FRAME, f"{len(frame)} bytes; at most {MAX_FRAME_BYTES}"
                )
            return self._session.receive(frame, self._edge.now_ms()), len(frame)
        except SessionError as error:
            log.info("agent %s refused: %s", short(self._party) or "(unknown)", error)
            await self._refuse(error)
            return None, 0

    async def _refuse(self, error: SessionError) -> None:
        await self._send_frame(self._session.refuse(error))
        await self.end(POLICY, error.code)

    async def _send_frame(self, frame: bytes) -> None:
        async with self._sending:
            try:
                async with asyncio.timeout(SEND_S):
                    await self._websocket.send_text(frame.decode())
            except TimeoutError as error:
                raise SlowPeer(f"it did not read for {SEND_S:.0f} s") from error
            except RuntimeError as error:  # Starlette: the websocket has been closed meanwhile
                raise WebSocketDisconnect(1006, str(error)) from error
