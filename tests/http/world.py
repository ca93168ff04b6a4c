"""A broker in memory behind a real server on a free port, and clients that sign."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from sublet_broker.adapters.http.agent_socket import Hub
from sublet_broker.adapters.http.edge import Edge, Probe
from sublet_broker.adapters.http.server import bind, compose, serve, url_of
from sublet_broker.adapters.memory.blobs import MemoryBlobs
from sublet_broker.adapters.memory.matcher import InProcessMatcher
from sublet_broker.adapters.memory.store import MemoryStore
from sublet_broker.adapters.memory.verifier import InProcessVerifier
from sublet_broker.service.broker import Broker, Ports, Settings
from sublet_broker.service.ports import Addresses, BlobStore
from sublet_contracts.auth import sign_request
from sublet_contracts.digests import is_digest
from sublet_contracts.documents import (
    Deposit,
    Device,
    Document,
    Job,
    KeyDocument,
    Offer,
    Resources,
    sign_document,
)
from sublet_contracts.keys import SigningKey

GIB = 1024**3
CREDIT = 1_000_000
PRICE_UCR = 400_000
WAIT_S = 120


class SystemClock:
    """The machine's clock, which a test may put forward."""

    ahead_ms = 0

    def now_ms(self) -> int:
        """See ports.Clock."""
        return time.time_ns() // 1_000_000 + self.ahead_ms

    def stopwatch_ms(self) -> int:
        """See ports.Clock."""
        return self.now_ms()


class Randomness:
    """See ports.Entropy."""

    def hex(self, count_bytes: int) -> str:
        """See ports.Entropy."""
        return os.urandom(count_bytes).hex()


def now_ms() -> int:
    """Return the time."""
    return time.time_ns() // 1_000_000


async def until(check: Callable[[], Awaitable[bool]] | Callable[[], bool]) -> None:
    """Wait until `check` holds; give up after WAIT_S."""
    async with asyncio.timeout(WAIT_S):
        while True:
            held = check()
            if held if isinstance(held, bool) else await held:
                return
            await asyncio.sleep(0.01)


def nonce() -> str:
    """Return a fresh nonce."""
    return os.urandom(16).hex()


@dataclass
class World:
    """A running broker."""

    broker: Broker
    edge: Edge
    hub: Hub
    url: str
    store: MemoryStore
    blobs: BlobStore
    clock: SystemClock
    http: httpx.AsyncClient
    stop: asyncio.Event
    operator: SigningKey

    @property
    def id(self) -> str:
        """The broker's party id."""
        return self.broker.party

    def party(self) -> Party:
        """Return a new party that the broker doesn't know yet."""
        return Party(self, SigningKey.generate())

    async def renter(self, credits: int = 10) -> Party:
        """Return a party that is known and has money."""
        party = self.party()
        await party.introduce()
        deposit = Deposit(
            broker=self.id,
            party=party.id,
            amount_ucr=credits * CREDIT,
            memo="test",
            nonce=nonce(),
            issued_ms=self.clock.now_ms(),
        )
        answer = await Party(self, self.operator).post("/v1/deposits", deposit)
        assert answer.status_code == 200, answer.text
        return party

    @property
    def ws_url(self) -> str:
        """The agents' door."""
        return self.url.replace("http://", "ws://") + "/v1/agent"


@dataclass
class Party:
    """A client with a key."""

    world: World
    key: SigningKey
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The party id."""
        return self.key.party

    def sign(
        self, method: str, target: str, body: bytes = b"", /, *, key: str = "", **changes: Any
    ) -> dict[str, str]:
        """Return the headers of a signed request."""
        parts: dict[str, Any] = {
            "broker": self.world.id,
            "method": method,
            "target": target,
            "body": body,
            "time_ms": self.world.clock.now_ms(),
            "nonce": nonce(),
            "idempotency_key": key,
        }
        named = target.rpartition("/")[2]
        if method == "PUT" and is_digest(named):
            parts["body_digest"] = named
        return sign_request(self.key, **(parts | changes))

    async def call(
        self, method: str, target: str, body: bytes = b"", *, key: str = "", **headers: str
    ) -> httpx.Response:
        """Send a signed request. `headers`: with _ for -."""
        signed = self.sign(method, target, body, key=key)
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.world.http.request(
            method, self.world.url + target, content=body, headers=signed | more
        )

    async def get(self, target: str) -> httpx.Response:
        """Send a signed GET."""
        return await self.call("GET", target)

    async def post(
        self, target: str, document: Document, *, key: str = "", signer: SigningKey | None = None
    ) -> httpx.Response:
        """Send a document that this party (or `signer`) signs."""
        return await self.call("POST", target, signed_body(document, signer or self.key), key=key)

    async def introduce(self) -> httpx.Response:
        """Tell the broker this party's key."""
        document = KeyDocument(
            party=self.id,
            broker=self.world.id,
            name="somebody",
            issued_ms=self.world.clock.now_ms(),
        )
        answer = await self.post("/v1/keys", document)
        assert answer.status_code == 200, answer.text
        return answer

    def job(self, **changes: Any) -> Job:
        """Return a job of this party's."""
        issued = self.world.clock.now_ms()
        fields: dict[str, Any] = {
            "renter": self.id,
            "broker": self.world.id,
            "nonce": nonce(),
            "name": "ft",
            "image": "python:3",
            "command": ("python", "train.py"),
            "env": {},
            "resources": Resources(devices=1, device_kind="gpu", memory_bytes=GIB, disk_bytes=GIB),
            "max_price_ucr_per_device_hour": PRICE_UCR,
            "budget_ucr": CREDIT,
            "checkpoint_interval_ms": 60_000,
            "patience_ms": 20_000,
            "inputs": (),
            "accept_receipts_up_to_ucr": CREDIT,
            "issued_ms": issued,
            "expires_ms": issued + 3_600_000,
        }
        return Job(**(fields | changes))

    def offer(self, sequence: int = 1, **changes: Any) -> Offer:
        """Return an offer of this party's: one GPU."""
        issued = self.world.clock.now_ms()
        device = Device(
            id="GPU-1", kind="gpu", name="T4", memory_bytes=16 * GIB, hardware_class="t4"
        )
        fields: dict[str, Any] = {
            "provider": self.id,
            "broker": self.world.id,
            "sequence": sequence,
            "name": "machine",
            "devices": (device,),
            "price_ucr_per_device_hour": PRICE_UCR,
            "cpu_millis": 4000,
            "memory_bytes": 16 * GIB,
            "disk_bytes": 100 * GIB,
            "region": "here",
            "runner": "docker",
            "image_policy": "any",
            "egress": False,
            "accepts": (),
            "grace_ms": 30_000,
            "issued_ms": issued,
            "expires_ms": issued + 3_600_000,
        }
        return Offer(**(fields | changes))


def signed_body(document: Document, key: SigningKey) -> bytes:
    """Return a SignedRequest's bytes."""
    envelope = sign_document(document, key).envelope
    return json.dumps({"envelope": envelope.model_dump(mode="json")}).encode()


@asynccontextmanager
async def running(
    probes: tuple[Probe, ...] = (),
    settings: Settings | None = None,
    blobs: BlobStore | None = None,
    addresses: Addresses | None = None,
) -> AsyncIterator[World]:
    """Run a broker until the block ends."""
    store, clock = MemoryStore(), SystemClock()
    blobs = MemoryBlobs() if blobs is None else blobs
    operator = SigningKey.generate()
    ports = Ports(
        store=store,
        blobs=blobs,
        clock=clock,
        entropy=Randomness(),
        matcher=InProcessMatcher(store, clock),
        verifier=InProcessVerifier(blobs),
        key=operator,
        addresses=addresses,
    )
    broker = Broker(ports, settings or Settings())
    edge, hub = compose(broker, "test", probes)
    sock = bind("127.0.0.1", 0)
    url = url_of(sock)
    stop, ready = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(serve(edge, hub, sock, stop=stop, on_ready=ready.set))
    try:
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        async with httpx.AsyncClient(timeout=120) as http:
            yield World(broker, edge, hub, url, store, blobs, clock, http, stop, operator)
    finally:
        stop.set()
        await serving
