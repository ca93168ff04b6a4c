"""Sends a tree's chunks in packs while the rest of the tree is still being read.

Rules:
- Who reads hands over each chunk once it is hashed (`take`), and holds none of its bytes: what the
  broker misses is read again to be sent, from the memory of the system, a chunk at a time.
- The broker is asked for many chunks at once, and what it misses is put together in full packs.
- So many questions and packs are under way and no more: who reads waits for the oldest of them.
- The first that fails ends all, in whose thread the tree is read.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from sublet_agent.adapters.workspace.upload_meter import UploadMeter
from sublet_contracts.packs import PACK_BYTES, ChunkDiffers, PackTable, in_packs
from sublet_contracts.tree import CHUNK_BYTES, Chunk, Source, TreeRefused, read_source

ASK_BYTES = 2 * PACK_BYTES
ASK_CHUNKS = 1_000
"""of which the broker is asked at once"""
QUESTIONS = 4
PACKS = 4
"""under way at once"""
PIECE_BYTES = 124 * 1024
"""Of what a socket doesn't take at once the rest is copied each time; and up to 128 KiB the C
library has memory at hand."""


class PackBody:
    """A pack as it is sent, read from where its chunks lie."""

    def __init__(self, table: PackTable, sources: Mapping[str, Source]) -> None:
        self.table = table
        self.sources = sources

    @property
    def size_bytes(self) -> int:
        """Of all of it."""
        return self.table.body_bytes

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Yield it, each time anew; a piece counts until the next one is asked for. Raises
        ChunkDiffers: a chunk isn't there any more."""
        yield self.table.to_bytes()
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for digest, size_bytes in self.table.chunks:
            self._read(digest, buffer[:size_bytes])
            for at in range(0, size_bytes, PIECE_BYTES):
                yield buffer[at : min(at + PIECE_BYTES, size_bytes)]

    def chunks(self) -> list[bytes]:
        """Return all chunks, for who has to know their hash before they are sent. Raises
        ChunkDiffers."""
        found: list[bytes] = []
        for digest, size_bytes in self.table.chunks:
            data = bytearray(size_bytes)
            self._read(digest, memoryview(data))
            found.append(bytes(data))
        return found

    def _read(self, digest: str, buffer: memoryview) -> None:
        try:
            read_source(self.sources[digest], buffer)
        except (TreeRefused, OSError) as error:
            raise ChunkDiffers(digest) from error


class PackPipe:
    """One upload. `missing` and `put` are called in the pool's threads, all else in one."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        missing: Callable[[Sequence[str]], Sequence[str]],
        put: Callable[[PackBody], None],
        meter: UploadMeter,
    ) -> None:
        self._pool = pool
        self._missing = missing
        self._put = put
        self._meter = meter
        self._sources: dict[str, Source] = {}
        self._new: list[str] = []
        self._new_bytes = 0
        self._wanted: list[str] = []
        self._wanted_bytes = 0
        self._questions: deque[tuple[list[str], Future[Sequence[str]]]] = deque()
        self._packs: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _, question in self._questions:
            question.cancel()
        for pack in self._packs:
            pack.cancel()

    def take(self, chunk: Chunk, path: Path, offset: int) -> None:
        """A chunk has been hashed that lies there. Raises what `missing` and `put` raise."""
        if chunk.digest not in self._sources:
            self._sources[chunk.digest] = (path, offset, chunk.size_bytes)
            self._new.append(chunk.digest)
            self._new_bytes += chunk.size_bytes
            if self._new_bytes >= ASK_BYTES or len(self._new) >= ASK_CHUNKS:
                self._ask()
        self._hear(QUESTIONS)

    def finish(self) -> None:
        """All has been taken: send the rest, and wait until all has arrived."""
        self._ask()
        self._hear(0)
        self._send(0)
        while self._packs:
            self._packs.popleft().result()

    def _ask(self) -> None:
        if self._new:
            asked, self._new, self._new_bytes = self._new, [], 0
            self._questions.append((asked, self._pool.submit(self._missing, asked)))

    def _hear(self, most: int) -> None:
        """Take the answers that are there, and wait until no more than `most` are to come."""
        while self._questions and (len(self._questions) > most or self._questions[0][1].done()):
            asked, question = self._questions.popleft()
            missing = question.result()
            size_bytes = sum(map(self._size_of, missing))
            self._meter.found(sum(map(self._size_of, asked)) - size_bytes)
            self._wanted += missing
            self._wanted_bytes += size_bytes
            self._send(PACK_BYTES)

    def _send(self, least_bytes: int) -> None:
        """Send what is wanted in packs, but for what is less than `least_bytes`."""
        if not self._wanted or self._wanted_bytes < least_bytes:
            return
        tables = in_packs(self._wanted, {name: self._size_of(name) for name in self._wanted})
        rest = tables.pop() if least_bytes and tables[-1].chunk_bytes < least_bytes else None
        self._wanted = [name for name, _ in rest.chunks] if rest else []
        self._wanted_bytes = rest.chunk_bytes if rest else 0
        for table in tables:
            while len(self._packs) >= PACKS:
                self._packs.popleft().result()
            self._packs.append(self._pool.submit(self._put, PackBody(table, self._sources)))

    def _size_of(self, digest: str) -> int:
        return self._sources[digest][2]
