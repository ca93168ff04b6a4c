"""Many agents in one process, each on a websocket of its own: what a big market looks like to it.

An agent here speaks the protocol as a real one does (contracts' AgentSession; pings, resending and
coming back as in the agent's link), signs leases and receipts with its own key, and runs nothing: a
run ends well after RUN_S. What it costs is therefore what the conversation costs, and it is the
same whether the agent is one of ten or one of a thousand.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from sublet_agent.adapters.session.link import ANSWER_S, BACKOFF_MOST_S, PING_S, RESEND_S, SILENCE_S
from sublet_contracts.documents import Device, Lease, Offer, Receipt, read_document, sign_document
from sublet_contracts.keys import SigningKey
from sublet_contracts.reasons import Reason
from sublet_contracts.rules import charge_ucr
from sublet_contracts.session import AgentSession, Phase, SessionError
from sublet_contracts.wire import (
    MAX_FRAME_BYTES,
    Ack,
    Announce,
    Assign,
    Heartbeat,
    LeaseAnswer,
    Message,
    Order,
    ReceiptIssued,
    RunChanged,
    RunReport,
    SettlementNotice,
    Welcome,
)

GIB = 1024**3
RUN_S = 0.5
JOINING_AT_ONCE = 32
"""Below the broker's bound for connections that haven't joined yet."""
DEVICES_EACH = 8
REGIONS = 10
"""The small market has one machine in each: where jobs ask for a region, as many agents are busy in
a large market as in a small one, and neither has all of its traffic on one connection."""
MODELS = (("Tesla T4", "t4", 16), ("A100-SXM4-40GB", "a100", 40))
"""Name, hardware class and GiB: the one kind in every second region, the other in the rest."""


def region_of(number: int) -> str:
    """Return where the machine of this number stands."""
    return f"region-{number % REGIONS}"


@dataclass(frozen=True)
class FleetConfig:
    """What the agents' process needs to know. Times in seconds."""

    ws_url: str
    broker: str
    count: int
    idle_beats: int
    """An agent that runs nothing reports at every so many heartbeats."""
    seed: int


@dataclass(frozen=True)
class FleetReport:
    """What the agents saw since they were asked last (`ordered_ns`: since the start)."""

    ordered_ns: dict[str, int]
    """Per job: CLOCK_MONOTONIC when an agent had read its first assignment."""
    thrown_out: dict[str, int]
    """How a connection ended that nobody had asked to end, and how often."""
    settled: int
    stopped: int
    """Runs that the broker ended."""
    busy_devices_most: int
    busy: int
    """Runs that go on, and messages that the broker has not acknowledged, at this moment."""
    heartbeats: int
    beat_late_s: float
    """How late a heartbeat went out at worst: the agents' own process being short of CPU."""
    cpu_s: float


@dataclass
class _Seen:
    ordered_ns: dict[str, int] = field(default_factory=dict)
    thrown_out: Counter[str] = field(default_factory=Counter)
    settled: int = 0
    stopped: int = 0
    busy_devices: int = 0
    busy_devices_most: int = 0
    heartbeats: int = 0
    beat_late_s: float = 0.0


@dataclass
class _Run:
    lease: Lease
    id: str
    began_s: float
    timer: asyncio.TimerHandle | None = None

    @property
    def device_ms(self) -> int:
        return int((time.monotonic() - self.began_s) * 1000) * len(self.lease.device_ids)


class ScriptedAgent:
    """One provider."""

    def __init__(
        self, config: FleetConfig, number: int, chance: random.Random, seen: _Seen
    ) -> None:
        self._config = config
        self._key = SigningKey.generate()
        self._instance = os.urandom(16).hex()
        self._seen = seen
        self._runs: dict[str, _Run] = {}
        self._taken: set[str] = set()
        self._unacked: dict[str, tuple[Message, float]] = {}
        self._number = 0
        self._session: AgentSession | None = None
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._heartbeat_s = 3.0
        self._phase = chance.random()
        self.joined = asyncio.Event()
        """Set once it has joined for the first time."""
        name, hardware_class, gib = MODELS[number % len(MODELS)]
        issued_ms = time.time_ns() // 1_000_000
        offer = Offer(
            provider=self._key.party,
            broker=config.broker,
            sequence=1,
            name=f"machine {number}",
            devices=tuple(
                Device(
                    id=f"GPU-{number}-{i}",
                    kind="gpu",
                    name=name,
                    memory_bytes=gib * GIB,
                    hardware_class=hardware_class,
                )
                for i in range(DEVICES_EACH)
            ),
            price_ucr_per_device_hour=chance.randrange(300_000, 500_000),
            cpu_millis=4000,
            memory_bytes=32 * GIB,
            disk_bytes=200 * GIB,
            region=region_of(number),
            runner="docker",
            image_policy="any",
            egress=False,
            accepts=(),
            grace_ms=30_000,
            issued_ms=issued_ms,
            expires_ms=issued_ms + 3_600_000,
        )
        self._announce = Announce(offer=sign_document(offer, self._key).envelope)

    @property
    def busy(self) -> int:
        """Runs that go on, and messages that the broker has not acknowledged."""
        return len(self._runs) + len(self._unacked)

    async def live(self, turn: asyncio.Semaphore) -> None:
        """Stay at the broker, and come back whenever the line ends."""
        while True:
            try:
                how = await self._converse(turn)
            except ConnectionClosed as error:
                how = f"closed: {error}"
            except SessionError as error:
                how = f"refused: {error.code}"
            except (OSError, WebSocketException, TimeoutError) as error:
                how = f"no connection: {type(error).__name__}"
            waiting = "with messages unacknowledged" if self._unacked else "idle"
            self._seen.thrown_out[f"{waiting}, {how}"] += 1
            await asyncio.sleep(BACKOFF_MOST_S * (0.5 + self._phase / 2))

    async def _converse(self, turn: asyncio.Semaphore) -> str:
        """Say how it ended, where the broker closed it in order."""
        # `turn` spreads the first rush; what counts here is a market that stands.
        async with turn:
            wire = await connect(
                self._config.ws_url,
                max_size=MAX_FRAME_BYTES,
                open_timeout=ANSWER_S,
                ping_interval=PING_S,
                ping_timeout=SILENCE_S,
                close_timeout=2,
                compression=None,
                proxy=None,
            )
            try:
                session, welcome = await self._join(wire)
            except BaseException:
                await wire.close()
                raise
        async with wire:
            self._session = session
            self._heartbeat_s = welcome.heartbeat_ms / 1000
            self._outgoing = asyncio.Queue()
            self._send(self._announce)
            for mid, (message, _) in list(self._unacked.items()):
                self._send(message, mid)
            self.joined.set()
            try:
                await _first_of(self._read(wire, session), self._write(wire), self._beat())
            finally:
                self._session = None
        return f"closed: {wire.close_code} {wire.close_reason}"

    async def _join(self, wire: ClientConnection) -> tuple[AgentSession, Welcome]:
        session = AgentSession(
            self._key,
            instance=self._instance,
            agent_version="scripted",
            broker=self._config.broker,
        )
        while True:
            frame = await asyncio.wait_for(wire.recv(), ANSWER_S)
            received, answer = session.receive(_bytes(frame), time.time_ns() // 1_000_000)
            if answer is not None:
                await wire.send(answer.decode())
            if session.phase is Phase.LIVE and isinstance(received.message, Welcome):
                return session, received.message

    async def _read(self, wire: ClientConnection, session: AgentSession) -> None:
        async for frame in wire:
            self._take(session, frame)

    async def _write(self, wire: ClientConnection) -> None:
        while True:
            await wire.send((await self._outgoing.get()).decode())

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time() + self._phase * self._heartbeat_s
        turn = 0
        while True:
            await asyncio.sleep(due_s - loop.time())
            self._seen.beat_late_s = max(self._seen.beat_late_s, loop.time() - due_s)
            turn += 1
            if self._runs or turn % self._config.idle_beats == 0:
                self._seen.heartbeats += 1
                self._send(Heartbeat(runs=tuple(map(_report, self._runs.values()))))
            overdue_s = time.monotonic() - RESEND_S
            for mid, (message, sent_s) in list(self._unacked.items()):
                if sent_s < overdue_s:
                    self._send(message, mid)
            due_s += self._heartbeat_s

    def _send(self, message: Message, mid: str | None = None) -> None:
        session = self._session
        if mid is not None:
            self._unacked[mid] = (message, time.monotonic())
        if session is not None and session.phase is Phase.LIVE:
            self._outgoing.put_nowait(session.send(message, mid))

    def _deliver(self, message: Message) -> None:
        """Send a reliable message, until it is acknowledged."""
        self._number += 1
        self._send(message, f"{self._instance}-{self._number}")

    def _take(self, session: AgentSession, frame: str | bytes) -> None:
        received, _ = session.receive(_bytes(frame), time.time_ns() // 1_000_000)
        match received.message:
            case Ack() as ack:
                for mid in ack.mids:
                    self._unacked.pop(mid, None)
            case Assign() as assign:
                self._assigned(assign)
            case Order() as order if order.lease in self._runs:
                self._seen.stopped += 1
                self._end(self._runs[order.lease], order.reason)
            case SettlementNotice():
                self._seen.settled += 1
            case _:
                pass
        if received.mid is not None:
            self._send(Ack(mids=(received.mid,)))

    def _assigned(self, assign: Assign) -> None:
        id = assign.lease.id
        if id in self._taken:
            return
        self._taken.add(id)
        lease = read_document(assign.lease, Lease, signed_by=(self._config.broker,))
        self._seen.ordered_ns.setdefault(lease.job, time.monotonic_ns())
        signed = assign.lease.countersigned(self._key)
        self._deliver(LeaseAnswer(lease=id, signed=signed))
        run = self._runs[id] = _Run(lease, id, time.monotonic())
        self._seen.busy_devices += len(lease.device_ids)
        self._seen.busy_devices_most = max(self._seen.busy_devices_most, self._seen.busy_devices)
        for state in ("pulling", "running"):
            self._deliver(
                RunChanged(lease=id, epoch=lease.epoch, state=state, cum_device_ms=run.device_ms)
            )
        loop = asyncio.get_running_loop()
        run.timer = loop.call_later(RUN_S, self._end, run, Reason.SUCCEEDED)

    def _end(self, run: _Run, reason: Reason) -> None:
        """Say that a run has ended, with its one receipt."""
        if self._runs.pop(run.id, None) is None:
            return
        if run.timer is not None:
            run.timer.cancel()
        lease, device_ms = run.lease, run.device_ms
        self._seen.busy_devices -= len(lease.device_ids)
        self._deliver(
            RunChanged(
                lease=run.id,
                epoch=lease.epoch,
                state="exited",
                cum_device_ms=device_ms,
                reason=reason,
                exit_code=0 if reason is Reason.SUCCEEDED else -15,
            )
        )
        charge = charge_ucr(lease.price_ucr_per_device_hour, device_ms)
        receipt = Receipt(
            provider=lease.provider,
            job=lease.job,
            lease=run.id,
            epoch=lease.epoch,
            sequence=1,
            previous=None,
            cum_device_ms=device_ms,
            reached_step=lease.start_step,
            durable_step=lease.start_step,
            durable_checkpoint=None,
            durable_device_ms=0,
            charge_ucr=min(charge, lease.hold_ucr),
            final=True,
            reason=reason,
            issued_ms=time.time_ns() // 1_000_000,
        )
        self._deliver(ReceiptIssued(receipt=sign_document(receipt, self._key).envelope))


def _report(run: _Run) -> RunReport:
    return RunReport(
        lease=run.id, epoch=run.lease.epoch, state="running", cum_device_ms=run.device_ms
    )


def _bytes(frame: str | bytes) -> bytes:
    return frame.encode() if isinstance(frame, str) else frame


class _Fleet:
    """All of them, and the line to whoever started this process."""

    def __init__(self, config: FleetConfig, pipe: Connection) -> None:
        self._pipe = pipe
        self._seen = _Seen()
        self._cpu_s = 0.0
        chance = random.Random(config.seed)
        self._agents = [
            ScriptedAgent(config, number, chance, self._seen) for number in range(config.count)
        ]

    async def run(self) -> None:
        """Join, say so, and report as often as it is asked; end when the line does."""
        turn = asyncio.Semaphore(JOINING_AT_ONCE)
        asked: asyncio.Queue[str | None] = asyncio.Queue()
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._hear, asked)
        await _first_of(self._answer(asked), *(agent.live(turn) for agent in self._agents))

    async def _answer(self, asked: asyncio.Queue[str | None]) -> None:
        for agent in self._agents:
            await agent.joined.wait()
        self._pipe.send(self._report())
        while await asked.get() is not None:
            self._pipe.send(self._report())

    def _hear(self, asked: asyncio.Queue[str | None]) -> None:
        try:
            asked.put_nowait(self._pipe.recv())
        except EOFError:
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            asked.put_nowait(None)

    def _report(self) -> FleetReport:
        seen, before_s = self._seen, self._cpu_s
        self._cpu_s = time.process_time()
        report = FleetReport(
            ordered_ns=dict(seen.ordered_ns),
            thrown_out=dict(seen.thrown_out),
            settled=seen.settled,
            stopped=seen.stopped,
            busy_devices_most=seen.busy_devices_most,
            busy=sum(agent.busy for agent in self._agents),
            heartbeats=seen.heartbeats,
            beat_late_s=seen.beat_late_s,
            cpu_s=self._cpu_s - before_s,
        )
        seen.thrown_out.clear()
        seen.settled = seen.stopped = seen.heartbeats = 0
        seen.busy_devices_most, seen.beat_late_s = seen.busy_devices, 0.0
        return report


async def _first_of(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all of them until one ends; end the others. Raises what ended it."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def play(config: FleetConfig, pipe: Connection) -> None:
    """The agents' process. It sends a FleetReport once all have joined, and one for each message
    that comes; it ends when the line is closed."""
    asyncio.run(_Fleet(config, pipe).run())
