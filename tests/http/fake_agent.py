"""The smallest agent: AgentSession over a real websocket, every message written by hand."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal, Self, TypeVar

from websockets.asyncio.client import ClientConnection, connect

from sublet_contracts.digests import digest_of
from sublet_contracts.documents import (
    Checkpoint,
    Job,
    Lease,
    Receipt,
    read_document,
    sign_document,
)
from sublet_contracts.envelope import Envelope
from sublet_contracts.reasons import Reason
from sublet_contracts.rules import charge_ucr
from sublet_contracts.session import AgentSession
from sublet_contracts.tree import Chunk, TreeFile, TreeIndex
from sublet_contracts.wire import (
    Ack,
    Announce,
    Assign,
    CheckpointUploaded,
    CheckpointVerdict,
    Heartbeat,
    LeaseAnswer,
    LogLine,
    Logs,
    LogState,
    LogStates,
    Message,
    ReceiptIssued,
    RunChanged,
    RunReport,
    Welcome,
)
from tests.http.world import WAIT_S, Party, World, nonce, until

M = TypeVar("M", bound=Message)


STREAMS: tuple[Literal["stdout", "stderr"], ...] = ("stdout", "stderr")


class FakeAgent:
    """One connection of one provider."""

    def __init__(self, world: World, party: Party, instance: str | None = None) -> None:
        self.world = world
        self.party = party
        self.instance = instance or nonce()
        self.session = AgentSession(
            party.key, instance=self.instance, agent_version="test", broker=world.id
        )
        self.inbox: list[tuple[Message, str | None]] = []
        self.acknowledged: set[str] = set()
        self.answers_acks = True
        self.number = 0
        self.socket: ClientConnection

    async def __aenter__(self) -> Self:
        self.socket = await connect(self.world.ws_url)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.socket.close()

    async def step(self) -> Message:
        """Take one frame; answer what the session answers; acknowledge what is reliable."""
        frame = await asyncio.wait_for(self.socket.recv(), WAIT_S)
        raw = frame.encode() if isinstance(frame, str) else frame
        received, answer = self.session.receive(raw, self.world.clock.now_ms())
        if answer is not None:
            await self.socket.send(answer.decode())
        if isinstance(received.message, Ack):
            self.acknowledged.update(received.message.mids)
        self.inbox.append((received.message, received.mid))
        if received.mid is not None and self.answers_acks:
            await self.send(Ack(mids=(received.mid,)))
        return received.message

    async def join(self) -> Welcome:
        """Speak the handshake. Raises SessionError when refused."""
        return await self.wait_for(Welcome)

    async def until_closed(self) -> None:
        """Listen until the conversation ends. Raises SessionError or ConnectionClosed."""
        while True:
            await self.step()

    async def send(self, message: Message) -> str | None:
        """Send a message; return its mid."""
        mid = None
        if message.RELIABLE:
            self.number += 1
            mid = f"{self.instance}-{self.number}"
        await self.socket.send(self.session.send(message, mid).decode())
        return mid

    async def deliver(self, message: Message) -> None:
        """Send a reliable message and wait until it is acknowledged."""
        mid = await self.send(message)
        while mid not in self.acknowledged:
            await self.step()

    async def wait_for(self, kind: type[M]) -> M:
        """Return the next message of that kind, which may have come already."""
        while True:
            for position, (message, _) in enumerate(self.inbox):
                if isinstance(message, kind):
                    del self.inbox[position]
                    return message
            await self.step()

    async def offer(self, **changes: Any) -> None:
        """Announce an offer, and wait until the broker has it."""
        signed = sign_document(self.party.offer(**changes), self.party.key)
        await self.send(Announce(offer=signed.envelope))

        async def is_there() -> bool:
            return bool((await self.party.get("/v1/offers")).json()["offers"])

        await until(is_there)

    async def accept(self) -> Run:
        """Wait for a lease and sign it."""
        assign = await self.wait_for(Assign)
        lease = read_document(assign.lease, Lease, signed_by=(self.world.id,))
        job = read_document(assign.job, Job)
        assert job.broker == self.world.id
        signed = assign.lease.countersigned(self.party.key)
        await self.deliver(LeaseAnswer(lease=assign.lease.id, signed=signed))
        return Run(self, assign, lease)


class Run:
    """One run, step by step."""

    def __init__(self, agent: FakeAgent, assign: Assign, lease: Lease) -> None:
        self.agent = agent
        self.lease = lease
        self.id = assign.lease.id
        self.device_ms = 0
        self.durable = (lease.start_step, None, 0)
        self.sequence = 0
        self.previous: str | None = None
        self.lines = 0

    async def state(self, state: Any, **changes: Any) -> None:
        """Report a state."""
        await self.agent.deliver(
            RunChanged(
                lease=self.id,
                epoch=self.lease.epoch,
                state=state,
                cum_device_ms=self.device_ms,
                **changes,
            )
        )

    async def heartbeat(self, step: int) -> None:
        """Say that it runs."""
        report = RunReport(
            lease=self.id,
            epoch=self.lease.epoch,
            state="running",
            cum_device_ms=self.device_ms,
            step=step,
            total_steps=100,
            metrics={"loss": 0.5},
        )
        await self.agent.send(Heartbeat(runs=(report,)))

    async def log(self, *texts: str) -> None:
        """Print lines."""
        lines = tuple(
            LogLine(
                number=self.lines + i,
                time_ms=self.agent.world.clock.now_ms(),
                stream="stdout",
                text=text,
            )
            for i, text in enumerate(texts)
        )
        self.lines += len(lines)
        await self.agent.send(Logs(lease=self.id, epoch=self.lease.epoch, lines=lines))

    async def stands(self, *texts: str) -> None:
        """Write lines that are not finished."""
        states = tuple(
            LogState(
                number=self.lines,
                time_ms=self.agent.world.clock.now_ms(),
                stream=stream,
                text=text,
            )
            for stream, text in zip(STREAMS, texts, strict=False)
        )
        await self.agent.send(LogStates(lease=self.id, epoch=self.lease.epoch, states=states))

    async def checkpoint(self, step: int, data: bytes, kind: Any = "checkpoint") -> Any:
        """Upload a checkpoint of one file; return the verdict."""
        sha = digest_of(data)
        chunk = Chunk(digest=sha, size_bytes=len(data))
        file = TreeFile(path="weights.bin", size_bytes=len(data), chunks=(chunk,))
        index = TreeIndex(files=(file,)).to_bytes()
        index_sha = digest_of(index)
        for name, content in ((sha, data), (index_sha, index)):
            answer = await self.put(name, content)
            assert answer.status_code == 204, answer.text
        party = self.agent.party
        document = Checkpoint(
            provider=party.id,
            job=self.lease.job,
            lease=self.id,
            epoch=self.lease.epoch,
            kind=kind,
            step=step,
            index_digest=index_sha,
            total_bytes=len(data),
            cum_device_ms=self.device_ms,
            issued_ms=self.agent.world.clock.now_ms(),
        )
        signed = sign_document(document, party.key)
        await self.agent.deliver(CheckpointUploaded(checkpoint=signed.envelope))
        verdict = await self.agent.wait_for(CheckpointVerdict)
        if verdict.durable and kind == "checkpoint":
            self.durable = (step, signed.id, self.device_ms)
        return verdict

    async def put(self, sha: str, content: bytes) -> Any:
        """Upload a chunk under this run's epoch."""
        target = f"/v1/jobs/{self.lease.job}/blobs/{sha}"
        return await self.agent.party.call(
            "PUT", target, content, Sublet_Epoch=str(self.lease.epoch)
        )

    async def receipt(self, *, final: Reason | None = None) -> Envelope:
        """Issue the next receipt."""
        self.sequence += 1
        step, checkpoint, durable_ms = self.durable
        charge = charge_ucr(self.lease.price_ucr_per_device_hour, self.device_ms)
        document = Receipt(
            provider=self.lease.provider,
            job=self.lease.job,
            lease=self.id,
            epoch=self.lease.epoch,
            sequence=self.sequence,
            previous=self.previous,
            cum_device_ms=self.device_ms,
            reached_step=step,
            durable_step=step,
            durable_checkpoint=checkpoint,
            durable_device_ms=durable_ms,
            charge_ucr=min(charge, self.lease.hold_ucr),
            final=final is not None,
            reason=final,
            issued_ms=self.agent.world.clock.now_ms(),
        )
        signed = sign_document(document, self.agent.party.key)
        self.previous = signed.id
        await self.agent.deliver(ReceiptIssued(receipt=signed.envelope))
        return signed.envelope


def lines_of(text: str) -> list[dict[str, Any]]:
    """Return the NDJSON lines of a log stream; heartbeats are left out."""
    return [json.loads(line) for line in text.splitlines() if line]
