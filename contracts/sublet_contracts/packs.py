"""Packs: how chunks travel and lie, many to a request and to a file.

A pack is a table and the bytes of its chunks in the table's order:

    "sublet-pack-1 blake3\\n"   count: 4 bytes, big-endian
    count times          BLAKE3: 32 bytes, size in bytes: 4 bytes, big-endian
    the chunks, one after another

A pack is named by its table's digest. The name stands in the address, so a signature over the
address covers all that follows: who receives checks the table against the name before anything
else, and each chunk against the table as it comes. No chunk stands in a table twice.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from sublet_contracts.digests import ALGORITHM, Hasher, digest_of, from_raw, raw_of, shortened
from sublet_contracts.tree import CHUNK_BYTES, Chunk

PACK_BYTES = 16 * 1024 * 1024
"""How much of chunks a sender puts into one."""
MAX_PACK_BYTES = 64 * 1024 * 1024
"""of chunks, in one"""
MAX_PACK_CHUNKS = 4096
MAX_READ_CHUNKS = 64
"""that are read with one request"""
READ_BYTES = 4 * 1024 * 1024
"""How much a reader asks for at once."""

_MAGIC = b"sublet-pack-1 " + ALGORITHM.encode() + b"\n"
_COUNT = struct.Struct(">I")
_ENTRY = struct.Struct(">32sI")
_HEAD_BYTES = len(_MAGIC) + _COUNT.size
MAX_TABLE_BYTES = _HEAD_BYTES + MAX_PACK_CHUNKS * _ENTRY.size
MAX_BODY_BYTES = MAX_TABLE_BYTES + MAX_PACK_BYTES


class PackRefused(ValueError):
    """A pack breaks a rule."""


class ChunkDiffers(PackRefused):
    """A chunk is not what the table says: it changed while it was read, or on its way."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"chunk {shortened(digest)} does not match its digest")
        self.digest = digest


@dataclass(frozen=True)
class PackTable:
    """Which chunks are in a pack, in order: digest and size in bytes."""

    chunks: tuple[tuple[str, int], ...]

    def to_bytes(self) -> bytes:
        """Return the table as it is sent."""
        entries = (_ENTRY.pack(raw_of(digest), size) for digest, size in self.chunks)
        return _MAGIC + _COUNT.pack(len(self.chunks)) + b"".join(entries)

    @property
    def name(self) -> str:
        """The pack's name: its table's digest."""
        return digest_of(self.to_bytes())

    @property
    def chunk_bytes(self) -> int:
        """Of all chunks."""
        return sum(size for _, size in self.chunks)

    @property
    def body_bytes(self) -> int:
        """Of the whole request: the table and the chunks."""
        return _HEAD_BYTES + len(self.chunks) * _ENTRY.size + self.chunk_bytes

    def offsets(self) -> dict[str, int]:
        """Return where each chunk begins, counted from the first one."""
        starts = accumulate((size for _, size in self.chunks), initial=0)
        return {digest: at for (digest, _), at in zip(self.chunks, starts, strict=False)}


@dataclass(frozen=True)
class Pack:
    """A pack that was received: every chunk is what the table says."""

    table: PackTable
    parts: tuple[bytes, ...]
    """all chunks one after another, in pieces as they came"""


class PackReader:
    """Takes a pack's bytes as they come, and refuses at the first that is wrong."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._head = bytearray()
        self._table: PackTable | None = None
        self._chunk = 0
        """The number of the chunk that is coming."""
        self._left = 0
        """How many bytes of it are to come."""
        self._hash = Hasher()
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> None:
        """Take some more. Raises PackRefused."""
        if self._table is None:
            self._head += data
            wanted = self._table_bytes()
            if wanted is None or len(self._head) < wanted:
                return
            self._table = parse_table(bytes(self._head[:wanted]), self._name)
            self._left = self._table.chunks[0][1]
            data = bytes(self._head[wanted:])
            self._head.clear()
        if data:
            self._check(memoryview(data), self._table)
            self._parts.append(data)

    def close(self) -> Pack:
        """Return the pack, all of which has come. Raises PackRefused: it is too short."""
        if self._table is None or self._chunk < len(self._table.chunks):
            raise PackRefused("the pack is shorter than its table says")
        return Pack(self._table, tuple(self._parts))

    def _table_bytes(self) -> int | None:
        """How long the table is; None: not known yet."""
        if not self._head.startswith(_MAGIC[: len(self._head)]):
            raise PackRefused("it doesn't begin as a pack does")
        if len(self._head) < _HEAD_BYTES:
            return None
        (count,) = _COUNT.unpack_from(self._head, len(_MAGIC))
        if not 1 <= count <= MAX_PACK_CHUNKS:
            raise PackRefused(f"its table says {count} chunks; 1 to {MAX_PACK_CHUNKS} are taken")
        return _HEAD_BYTES + int(count) * _ENTRY.size

    def _check(self, data: memoryview, table: PackTable) -> None:
        while data:
            if self._chunk == len(table.chunks):
                raise PackRefused("the pack is longer than its table says")
            piece = data[: self._left]
            self._hash.update(piece)
            self._left -= len(piece)
            data = data[len(piece) :]
            if self._left:
                return
            digest, _ = table.chunks[self._chunk]
            if self._hash.digest() != digest:
                raise ChunkDiffers(digest)
            self._hash = Hasher()
            self._chunk += 1
            if self._chunk < len(table.chunks):
                self._left = table.chunks[self._chunk][1]


def parse_table(data: bytes, name: str) -> PackTable:
    """Return the table that `data`, which begins as one does, is. Raises PackRefused."""
    if digest_of(data) != name:
        raise PackRefused("its table does not match the pack's name; send it again")
    entries = memoryview(data)[_HEAD_BYTES:]
    chunks = tuple((from_raw(raw), size) for raw, size in _ENTRY.iter_unpack(entries))
    if any(not 1 <= size <= CHUNK_BYTES for _, size in chunks):
        raise PackRefused(f"a chunk has 1 to {CHUNK_BYTES} bytes")
    if len({digest for digest, _ in chunks}) != len(chunks):
        raise PackRefused("a chunk stands in its table twice")
    table = PackTable(chunks)
    if table.chunk_bytes > MAX_PACK_BYTES:
        raise PackRefused(f"its chunks come to more than {MAX_PACK_BYTES} bytes")
    return table


def in_reads(order: Iterable[Chunk]) -> list[tuple[Chunk, ...]]:
    """Return these chunks in groups of up to READ_BYTES, in their order."""
    groups: list[tuple[Chunk, ...]] = []
    now: list[Chunk] = []
    full = 0
    for chunk in order:
        if now and (full + chunk.size_bytes > READ_BYTES or len(now) == MAX_READ_CHUNKS):
            groups.append(tuple(now))
            now, full = [], 0
        now.append(chunk)
        full += chunk.size_bytes
    if now:
        groups.append(tuple(now))
    return groups


def cut_read(data: bytes, chunks: Sequence[Chunk]) -> list[bytes]:
    """Return the chunks of which `data` is made. Raises PackRefused."""
    found: list[bytes] = []
    at = 0
    for chunk in chunks:
        piece = data[at : at + chunk.size_bytes]
        if len(piece) != chunk.size_bytes or digest_of(piece) != chunk.digest:
            raise ChunkDiffers(chunk.digest)
        found.append(piece)
        at += chunk.size_bytes
    if at != len(data):
        raise PackRefused("more came than was asked for")
    return found


def in_packs(
    wanted: Iterable[str], sizes: Mapping[str, int], pack_bytes: int = 0
) -> list[PackTable]:
    """Return these chunks, each once, in packs of up to `pack_bytes` (PACK_BYTES unless said), in
    their order."""
    most = pack_bytes or PACK_BYTES
    tables: list[PackTable] = []
    now: list[tuple[str, int]] = []
    full = 0
    for digest in dict.fromkeys(wanted):
        size = sizes[digest]
        if now and (full + size > most or len(now) == MAX_PACK_CHUNKS):
            tables.append(PackTable(tuple(now)))
            now, full = [], 0
        now.append((digest, size))
        full += size
    if now:
        tables.append(PackTable(tuple(now)))
    return tables
