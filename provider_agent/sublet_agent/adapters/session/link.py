"""The one connection: dials out, proves itself, resends what isn't acknowledged, comes back.

Everything that matters is decided in contracts' AgentSession and in the core; here are only the
socket, the backoff, and the order "commit, then acknowledge".
"""

import asyncio
import errno
import random
import socket
import sqlite3
import ssl
from collections.abc import Callable
from typing import Protocol

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)

from sublet_agent.adapters.options import UsageError
from sublet_agent.adapters.session.clock import SteadyClock
from sublet_agent.adapters.session.journal import Journal
from sublet_agent.adapters.session.journal_writer import JournalWriter
from sublet_agent.core.effects import UNEXPECTED
from sublet_agent.core.fixes import with_fix
from sublet_agent.core.status import Connection
from sublet_contracts.keys import SigningKey
from sublet_contracts.problems import ProblemCode
from sublet_contracts.session import AgentSession, Phase, SessionCode, SessionError
from sublet_contracts.versions import Reads
from sublet_contracts.wire import MAX_FRAME_BYTES, Ack, FrameRefused, Message

VERSION = "0.1.0"
BACKOFF_FIRST_S = 0.2
BACKOFF_MOST_S = 3.0
"""Less than the least patience that a job may have: a broker that was away gives one period of it,
and its agents have to be back within that."""
RESEND_S = 5.0
ANSWER_S = 10.0
PING_S = 4.0
SILENCE_S = 8.0
"""A connection on which no pong comes for so long is as good as gone. Where only this connection is
dead (half-open), it's replaced within any job's default patience, 20 s."""


class Replaced(Exception):
    """Another agent with our key is the broker's from now on. To come back would only drive that
    one away, which would come back as well."""


class Listener(Protocol):
    """Who takes what comes over the link. `arrived` returns once it is on disk."""

    def joined(self, broker: str, broker_ahead_ms: int, broker_reads: Reads) -> None: ...

    def arrived(self, message: Message) -> None: ...

    async def written(self) -> None: ...

    def disconnected(self) -> None: ...

    def say(self, text: str) -> None: ...


class Link:
    """Keeps a session with the broker."""

    def __init__(
        self,
        url: str,
        key: SigningKey,
        instance: str,
        journal: Journal,
        writer: JournalWriter,
        listener: Listener,
        clock: SteadyClock,
        broker: Callable[[], str],
    ) -> None:
        self._url = _websocket_url(url)
        self._key = key
        self._instance = instance
        self._journal = journal
        self._writer = writer
        self._listener = listener
        self._clock = clock
        self._broker = broker
        self._session: AgentSession | None = None
        self._was_live = False
        self._sent_up_to = 0
        self._outbox_wake = asyncio.Event()
        self._acknowledged = asyncio.Event()
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1000)
        self.connection = Connection(connected=False, since_ms=clock.now_ms())

    @property
    def live(self) -> bool:
        """Whether messages pass at the moment."""
        return self._session is not None and self._session.phase is Phase.LIVE

    def send(self, message: Message) -> bool:
        """Send an unreliable message; False if it was dropped, because no session is live."""
        if self._session is None or not self.live:
            return False
        try:
            self._outgoing.put_nowait(self._session.send(message))
        except (asyncio.QueueFull, FrameRefused) as error:
            self._listener.say(f"dropped a {message.TYPE}: {error or 'the line is full'}")
            return False
        return True

    async def flushed(self) -> None:
        """Return once the outbox is empty, or no session is live that could empty it."""
        while self.live and self._journal.pending(limit=1):
            self._acknowledged.clear()
            await self._acknowledged.wait()

    def outbox_grew(self) -> None:
        """There are reliable messages to send."""
        self._outbox_wake.set()

    async def run(self) -> None:
        """Hold the session until cancelled. Raises Replaced."""
        delay_s = BACKOFF_FIRST_S
        last = ""
        while True:
            try:
                await self._hold_session()
                says = "the broker closed the connection"
            except SessionError as error:
                says = f"refused ({error.code}): {with_fix(error.code, error.detail)}"
                if error.code == ProblemCode.STALE_INSTANCE:
                    raise Replaced(says) from error
                if error.code == SessionCode.CLOCK:
                    # It may have been set since it was read, or the machine has slept.
                    self._clock.set()
            except InvalidURI as error:
                raise UsageError(f"--broker: {error}") from error
            except (OSError, InvalidHandshake, WebSocketException, TimeoutError) as error:
                says = _no_connection(error, self._url)
            except sqlite3.Error:
                raise
            except Exception as error:  # noqa: BLE001 - an odd frame ends a session, not the agent
                says = f"{UNEXPECTED}: the session: {type(error).__name__}: {error}"
            self._changed(connected=False, trouble=says)
            if self._was_live:
                delay_s = BACKOFF_FIRST_S
            if says != last:
                self._listener.say(f"{says}; trying again (runs go on)")
                last = says
            await asyncio.sleep(random.uniform(delay_s / 2, delay_s))  # jitter, not a secret
            delay_s = min(delay_s * 2, BACKOFF_MOST_S)
            if self._was_live:
                last = ""

    def _changed(self, *, connected: bool, trouble: str = "") -> None:
        before = self.connection
        same = before.connected == connected
        since_ms = before.since_ms if same else self._clock.now_ms()
        self.connection = Connection(connected=connected, since_ms=since_ms, trouble=trouble)

    async def _hold_session(self) -> None:
        self._was_live = False
        async with connect(
            self._url,
            max_size=MAX_FRAME_BYTES,
            open_timeout=ANSWER_S,
            ping_interval=PING_S,
            ping_timeout=SILENCE_S,
            close_timeout=2,
            compression=None,
            proxy=None,
        ) as wire:
            session = AgentSession(
                self._key,
                instance=self._instance,
                agent_version=VERSION,
                broker=self._broker() or None,
            )
            self._session = session
            self._outgoing = asyncio.Queue(maxsize=1000)
            self._sent_up_to = 0
            tasks: list[asyncio.Task[None]] = []
            try:
                while session.phase is not Phase.LIVE:
                    frame = await asyncio.wait_for(wire.recv(), ANSWER_S)
                    received, answer = session.receive(_bytes(frame), self._clock.now_ms())
                    if answer is not None:
                        await wire.send(answer.decode())
                self._was_live = True
                self._changed(connected=True)
                self._listener.joined(
                    session.broker or "", session.broker_ahead_ms, session.broker_reads
                )
                tasks = [
                    asyncio.create_task(self._write(wire)),
                    asyncio.create_task(self._resend()),
                ]
                self._listener.arrived(received.message)
                async for frame in wire:
                    received, _ = session.receive(_bytes(frame), self._clock.now_ms())
                    await self._take(received.message, received.mid)
            finally:
                self._session = None
                self._acknowledged.set()
                try:
                    await _cancel_all(tasks)
                finally:
                    self._listener.disconnected()

    async def _take(self, message: Message, mid: str | None) -> None:
        if isinstance(message, Ack):
            self._forget(message.mids)
            return
        self._listener.arrived(message)
        if mid is not None:
            await self._listener.written()
            self.send(Ack(mids=(mid,)))

    def _forget(self, mids: tuple[str, ...]) -> None:
        self._writer.write(self._journal.rows_of_acknowledged(mids), self._acknowledged.set)

    async def _write(self, wire: ClientConnection) -> None:
        while True:
            frame = await self._outgoing.get()
            await wire.send(frame.decode())

    async def _resend(self) -> None:
        """Send the outbox in order; what isn't acknowledged for a while goes out again."""
        while True:
            self._outbox_wake.clear()
            session = self._session
            if session is None:
                return
            for pending in self._journal.pending(after=self._sent_up_to):
                if pending.message is None:
                    self._drop(pending.mid, "what was written of it can't be read any more")
                    continue
                try:
                    frame = session.send(pending.message, pending.mid)
                except FrameRefused as error:
                    self._drop(pending.mid, str(error))
                    continue
                await self._outgoing.put(frame)
                self._sent_up_to = pending.number
            try:
                await asyncio.wait_for(self._outbox_wake.wait(), RESEND_S)
            except TimeoutError:
                self._sent_up_to = 0

    def _drop(self, mid: str, why: str) -> None:
        """Never send a message that keeps all that come after it from being sent."""
        self._listener.say(f"{UNEXPECTED}: message {mid} is not sent: {why}")
        self._forget((mid,))


async def _cancel_all(tasks: list[asyncio.Task[None]]) -> None:
    """End them. Raises what one of them raised, unless the line was the reason; and the caller's
    own cancellation, which `suppress(CancelledError)` around an `await task` would lose."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception) and not isinstance(result, WebSocketException):
            raise result


def _no_connection(error: Exception, url: str) -> str:
    """Say why the broker can't be reached."""
    where = url.split("/")[2]
    match error:
        case OSError() if f"[Errno {errno.ECONNREFUSED}]" in str(error):
            why = f"nothing answers at {where}"
        case socket.gaierror():
            why = f"there is no host of that name: {where}"
        case ssl.SSLCertVerificationError():
            why = f"the certificate of {where} is not to be trusted: {error.verify_message}"
        case ssl.SSLError():
            why = f"{where} doesn't speak https, as it seems: does its URL begin with http://?"
        case TimeoutError():
            why = f"{where} gave no answer within {ANSWER_S:.0f} s"
        case ConnectionClosed():
            why = f"{where} went away"
        case InvalidStatus():
            why = f"{where} answered HTTP {error.response.status_code} instead of a session"
        case InvalidHandshake():
            why = f"{where} does not answer as a broker does ({error})"
        case _:
            why = f"{where}: {type(error).__name__}: {error}"
    return f"no connection: {why}"


def _bytes(frame: str | bytes) -> bytes:
    return frame.encode() if isinstance(frame, str) else frame


def _websocket_url(url: str) -> str:
    base = url.rstrip("/")
    for http, ws in (("http://", "ws://"), ("https://", "wss://")):
        if base.startswith(http):
            return ws + base[len(http) :] + "/v1/agent"
    raise UsageError(f"--broker {url!r}: must start with http:// or https://")
