"""A TCP proxy that does to connections what bad networks do; each decision comes from its seed.

It sits between anybody and the broker, and knows nothing of what it carries. `weather` may be
changed at any time. Connection n makes the same choices in every run with the same seed; which
bytes they hit depends on what is sent when.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Literal, TypeVar

READ_BYTES = 64 * 1024
HELD_CHUNKS = 64
"""So much is on its way at most in each direction: beyond it TCP holds the sender back."""
Direction = Literal["up", "down"]
T = TypeVar("T")


@dataclass(frozen=True)
class Weather:
    """What the network is like. Shares are of 1: of the chunks in one direction, or of new
    connections."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Added to each chunk's delay, up to so much; order is kept, as TCP keeps it."""
    bytes_per_s: float = 0.0
    """Of each connection and direction; 0: no limit."""
    fragments: bool = False
    """Chunks are cut at random places and sent piece by piece, some together with the next."""
    reset_share: float = 0.0
    """The connection is reset in the midst of the chunk: its first bytes still arrive."""
    dead_share: float = 0.0
    """From this chunk on the direction swallows everything, and nobody is told (half-open)."""
    refused_share: float = 0.0
    """New connections are reset at once."""
    silent: bool = False
    """No byte passes in either direction, on any connection; nothing is closed."""


CALM = Weather()


@dataclass(eq=False)
class _Connection:
    near: asyncio.StreamWriter
    far: asyncio.StreamWriter | None = None
    dead: set[str] = field(default_factory=set)


class Proxy:
    """Listens on a port of this machine and passes on to `target`. Runs in a thread of its own."""

    def __init__(self, target: tuple[str, int], seed: int) -> None:
        self.target = target
        self.seed = seed
        self.weather = CALM
        self.counts: Counter[str] = Counter()
        """What was done: connections, chunks, pieces, resets, dead directions, refusals."""
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.open()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        """Listen (again, at the same port)."""
        self._do(self._open)

    def shut(self) -> None:
        """Reset all connections; new ones are refused, as if nobody listened."""
        self._do(self._shut)

    def reset(self) -> int:
        """Reset all connections; say how many. New ones are taken."""
        return self._do(self._reset)

    def deaden(self, direction: Direction) -> int:
        """Make all connections of now half-open: swallow what goes in `direction` ("up": to the
        broker); say how many. New ones are sound."""

        async def deaden() -> int:
            for connection in self._connections:
                connection.dead.add(direction)
            self.counts[f"dead {direction}"] += len(self._connections)
            return len(self._connections)

        return self._do(deaden)

    def close(self) -> None:
        """End it."""
        self.shut()
        self._do(self._ended)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, what: Callable[[], Coroutine[None, None, T]]) -> T:
        return asyncio.run_coroutine_threadsafe(what(), self._loop).result(30)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._reset()

    async def _ended(self) -> None:
        # Their tasks end by themselves once both sides have been cut off.
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(tasks, timeout=10) if tasks else None

    async def _reset(self) -> int:
        hit = list(self._connections)
        for connection in hit:
            _abort(connection)
        self.counts["resets"] += len(hit)
        return len(hit)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts["connections"] += 1
        number = self.counts["connections"]
        chance = random.Random(f"{self.seed}/{number}")
        connection = _Connection(writer)
        self._connections.add(connection)
        try:
            if chance.random() < self.weather.refused_share:
                self.counts["refusals"] += 1
                return
            try:
                far_reader, connection.far = await asyncio.open_connection(*self.target)
            except OSError:
                return  # The broker is down, and so is the caller's connection.
            ways: tuple[tuple[Direction, asyncio.StreamReader, asyncio.StreamWriter], ...] = (
                ("up", reader, connection.far), ("down", far_reader, writer),
            )  # fmt: skip
            try:
                async with asyncio.TaskGroup() as both:
                    for way, source, sink in ways:
                        both.create_task(
                            self._carry(connection, way, source, sink, chance.random())
                        )
            except* (OSError, _Cut):
                pass  # One side is gone, or was cut off: so is the other.
        finally:
            _abort(connection)
            self._connections.discard(connection)

    async def _carry(
        self,
        connection: _Connection,
        way: Direction,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        seed: float,
    ) -> None:
        """Carry one direction: chunks wait in a queue until each is due."""
        chance = random.Random(seed)
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(HELD_CHUNKS)

        async def read() -> None:
            due_s = 0.0
            while True:
                data = await source.read(READ_BYTES)
                weather, now_s = self.weather, self._loop.time()
                due_s = max(due_s, now_s) if weather.bytes_per_s else now_s
                if weather.bytes_per_s:
                    due_s += len(data) / weather.bytes_per_s
                late_s = weather.delay_s + chance.uniform(0, weather.jitter_s)
                await queue.put((due_s + late_s, data))
                if not data:
                    return

        async def write() -> None:
            while True:
                due_s, data = await queue.get()
                await asyncio.sleep(max(0.0, due_s - self._loop.time()))
                if data and (way in connection.dead or self.weather.silent):
                    self.counts["swallowed bytes"] += len(data)
                    continue
                if not data:
                    if way not in connection.dead and not self.weather.silent:
                        sink.write_eof()
                    return
                self.counts["chunks"] += 1
                await self._pass_on(connection, way, sink, data, chance)

        reading = asyncio.ensure_future(read())
        try:
            await write()
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await reading

    async def _pass_on(
        self,
        connection: _Connection,
        way: Direction,
        sink: asyncio.StreamWriter,
        data: bytes,
        chance: random.Random,
    ) -> None:
        weather = self.weather
        if chance.random() < weather.dead_share:
            connection.dead.add(way)
            self.counts[f"dead {way}"] += 1
            return
        if chance.random() < weather.reset_share:
            sink.write(data[: chance.randrange(len(data))])
            await sink.drain()
            self.counts["resets"] += 1
            raise _Cut
        if not weather.fragments:
            sink.write(data)
            await sink.drain()
            return
        start = 0
        while start < len(data):
            size = chance.choice((1, 7, 100, 1400, len(data)))
            sink.write(data[start : start + size])
            start += size
            self.counts["pieces"] += 1
            if chance.random() < 0.5:  # else it goes out together with the next piece
                await sink.drain()
                await asyncio.sleep(0)


class _Cut(Exception):
    """This connection is to be reset."""


def _abort(connection: _Connection) -> None:
    """Reset both sides: RST, not FIN."""
    for writer in (connection.near, connection.far):
        if writer is None:
            continue
        raw = writer.get_extra_info("socket")
        if raw is not None:
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
