"""The one port: bound first, so that a taken port is found out before anything is touched; then
uvicorn serves the app on it until it is asked to stop."""

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from sublet_broker.adapters.http.agent_socket import Hub
from sublet_broker.adapters.http.app import build_app
from sublet_broker.adapters.http.edge import Edge, Probe
from sublet_broker.adapters.http.large_bodies import LargeBodies, keep_freed_memory
from sublet_broker.adapters.http.ledger_check import Audits
from sublet_broker.adapters.http.loops import Loop, Loops
from sublet_broker.adapters.http.metrics import (
    AGENT_CONNECTIONS,
    LOG_STREAMS,
    LOOP_FAILURES,
    LOOP_IN_TROUBLE,
    LOOP_ROUNDS,
    REQUESTS_IN_FLIGHT,
    Metrics,
)
from sublet_broker.adapters.http.wakeups import Feeds
from sublet_broker.service.broker import Broker
from sublet_broker.service.content.retention import ROWS_AT_ONCE
from sublet_broker.service.unit_of_work.metrics import Sample
from sublet_contracts.wire import MAX_FRAME_BYTES

log = logging.getLogger("sublet.broker")

GRACEFUL_S = 5
LEAST_AWAY_S = 5.0
"""Sweeps that are further apart mean that the broker stood still: suspended, or starved."""
BACKLOG = 1024
SWEEPS_A_ROUND = 20


class CannotListen(Exception):
    """The address isn't ours or the port is taken; the message says what to do."""


def parse_listen(text: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT, [IPv6]:PORT or :PORT. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT, as in 127.0.0.1:8470 (port 0: any free one)")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises CannotListen."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise CannotListen(
            f"--listen {host}:{port}: no such host ({error.strerror}); name one of this machine"
        ) from error
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        match error.errno:
            case errno.EADDRINUSE:
                why = (
                    f"port {port} on {host} is taken; see who holds it with "
                    f"\"ss -ltnp 'sport = :{port}'\", or choose another: --listen {host}:{port + 1}"
                )
            case errno.EACCES:
                why = f"port {port} is for root only; choose one above 1023: --listen {host}:8470"
            case errno.EADDRNOTAVAIL:
                why = f"{host} is not an address of this machine; see: ip address"
            case _:
                why = f"can't listen on {host}:{port}: {error.strerror}"
        raise CannotListen(why) from error
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket) -> str:
    """Return the URL by which this machine reaches it."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Watch:
    """How long it is since the last reset; a sleep of the machine counts."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._at_s = time.clock_gettime(time.CLOCK_BOOTTIME)

    def silent_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self._at_s


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say when it has started."""
        await super().startup(sockets)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are main's business."""
        yield


def compose(broker: Broker, version: str, probes: Sequence[Probe] = ()) -> tuple[Edge, Hub]:
    """Connect the use-cases with the edges, on the running event loop."""
    metrics = Metrics()
    feeds = Feeds(asyncio.get_running_loop())
    audits = Audits(broker)
    loops = Loops(_loops(broker, metrics, audits))
    edge = Edge(broker, version, loops, metrics, feeds, tuple(probes))
    hub = Hub(edge)
    broker.on_job = feeds.post
    broker.outbox.on_new = hub.wake
    metrics.add_source(broker.metrics.samples)
    metrics.add_source(audits.samples)
    metrics.add_source(lambda: _samples(edge, hub))
    return edge, hub


async def serve(
    edge: Edge,
    hub: Hub,
    sock: socket.socket,
    *,
    stop: asyncio.Event,
    on_ready: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Serve until `stop` is set, then end in order: no new connections, agents told to come back,
    streams ended, loops' rounds finished. `on_stop` runs in a thread while the loops end."""
    keep_freed_memory()
    config = uvicorn.Config(
        build_app(edge, hub),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        http=LargeBodies,
        timeout_graceful_shutdown=GRACEFUL_S,
        ws="websockets-sansio",
        ws_max_size=MAX_FRAME_BYTES,
        ws_per_message_deflate=False,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0,
    )
    server = _Uvicorn(config)
    await asyncio.to_thread(edge.broker.supervision.started)
    edge.loops.start()
    serving = asyncio.create_task(server.serve([sock]), name="uvicorn")
    stopped = asyncio.create_task(stop.wait(), name="stop")
    try:
        up = asyncio.create_task(server.up.wait(), name="up")
        await asyncio.wait({serving, up}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        if not serving.done():
            on_ready()
            await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        edge.stopping.set()
        for listening in server.servers if server.started else ():
            listening.close()
        edge.feeds.wake_all()
        await hub.goodbye()
        server.should_exit = True
        await asyncio.gather(edge.loops.stop(), asyncio.to_thread(on_stop))
        await serving
        edge.close()


def _loops(broker: Broker, metrics: Metrics, audits: Audits) -> list[Loop]:
    def tick() -> int:
        made = broker.scheduling.tick()
        waited = broker.scheduling.waited_ms
        while waited:
            metrics.matched(waited.popleft())
        return made

    swept = _Watch()

    def sweep() -> int:
        if swept.silent_s() > max(LEAST_AWAY_S, broker.context.settings.unknown_after_ms / 1000):
            log.warning("this broker stood still for %.0f s: nobody is given up", swept.silent_s())
            broker.supervision.was_away()
        try:
            broker.supervision.sweep()
        finally:
            swept.reset()
        return 0

    def tidy() -> int:
        broker.idempotency.forget_old()
        for _ in range(SWEEPS_A_ROUND):
            if broker.retention.sweep() < ROWS_AT_ONCE:
                break
        broker.uploads.sweep()
        broker.retention.sweep_files()
        return 0

    def audit() -> int:
        audits.work()
        return 0

    market = ("scheduling", "verdicts", "settling")
    return [
        Loop("scheduling", tick, 0.5),
        Loop("supervision", sweep, 1.0, market),
        Loop("verdicts", broker.supervision.verdicts, 0.1, market),
        Loop("settling", broker.settling.settle_due, 1.0, market),
        Loop("tidying", tidy, 60.0),
        Loop("scrubbing", broker.packs.scrub, 5.0),
        Loop("auditing", audit, 5.0),
    ]


def _samples(edge: Edge, hub: Hub) -> list[Sample]:
    found = [
        Sample(AGENT_CONNECTIONS, len(hub.connections)),
        Sample(LOG_STREAMS, edge.feeds.followers),
        Sample(REQUESTS_IN_FLIGHT, edge.waiting),
    ]
    for loop in edge.loops.all.values():
        label = (loop.name,)
        found += [
            Sample(LOOP_ROUNDS, loop.rounds, label),
            Sample(LOOP_FAILURES, loop.failures, label),
            Sample(LOOP_IN_TROUBLE, bool(loop.trouble()), label),
        ]
    return found
