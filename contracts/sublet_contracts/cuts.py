"""Where a file is cut into chunks, by how it begins.

Rules:
1. A chunk has at most CHUNK_BYTES, and a file that is nothing special is cut at each CHUNK_BYTES.
2. A safetensors file (8 bytes that say how long its JSON header is, the header, the data) is cut
   where the data begins, and from there on at tensors: so a header that became longer moves no
   chunk but its own, and a tensor that became longer only those beside it.
3. A tensor of CHUNK_BYTES or more begins a chunk and ends one. Smaller ones lie together in one,
   as many as fit, counted from the last large one.
4. The header is a stranger's: a bounded part of it is read, and whatever it says, the cuts depend
   on the beginning of the file alone, none is empty, and two in a row come to more than half of
   CHUNK_BYTES unless a large tensor stands beside them.

Pure: nothing here reads a file.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any

CHUNK_BYTES = 1024 * 1024
HEAD_BYTES = CHUNK_BYTES
"""How much of a file's beginning is looked at. A longer header counts only by its length."""
_LENGTH_BYTES = 8
_LONGEST_HEADER_BYTES = 100_000_000
"""as the format's own reader has it"""


def chunk_lengths(head: bytes | memoryview) -> Iterator[int]:
    """Return the lengths of a file's chunks, in order and without end: the last chunk ends where
    the file does. `head`: its first HEAD_BYTES, or all of it; it isn't looked at again."""
    header_bytes = _header_bytes(head)
    if header_bytes is None:
        return repeat(CHUNK_BYTES)
    data_at = _LENGTH_BYTES + header_bytes
    edges = _edges(bytes(head[_LENGTH_BYTES:data_at])) if data_at <= len(head) else ()
    return chain(_pieces(data_at), _grouped(edges), repeat(CHUNK_BYTES))


def _header_bytes(head: bytes | memoryview) -> int | None:
    """Return how long a safetensors header is said to be; None: this is none."""
    if len(head) < _LENGTH_BYTES + 2 or head[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
        return None
    said = int.from_bytes(head[:_LENGTH_BYTES], "little")
    return said if 2 <= said <= _LONGEST_HEADER_BYTES else None


def _edges(header: bytes) -> Sequence[int]:
    """Return where tensors begin or end, counted from the beginning of the data."""
    try:
        said: Any = json.loads(header)
    except (ValueError, RecursionError):
        return ()
    edges: set[int] = set()
    for tensor in said.values() if isinstance(said, dict) else ():
        offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
        for at in offsets if isinstance(offsets, list) else ():
            if isinstance(at, int) and at > 0:
                edges.add(at)
    return sorted(edges)


def _grouped(edges: Sequence[int]) -> Iterator[int]:
    begun = ended = 0
    """Where the group that is being made begins, and its last tensor ends."""
    for edge in edges:
        if edge - begun <= CHUNK_BYTES:
            large = edge - ended >= CHUNK_BYTES
        else:
            if ended > begun:
                yield ended - begun
                begun = ended
            large = edge - begun >= CHUNK_BYTES
            while edge - begun > CHUNK_BYTES:
                yield CHUNK_BYTES
                begun += CHUNK_BYTES
        ended = edge
        if large:
            yield ended - begun
            begun = ended
    if ended > begun:
        yield ended - begun


def _pieces(size_bytes: int) -> Iterator[int]:
    while size_bytes > CHUNK_BYTES:
        yield CHUNK_BYTES
        size_bytes -= CHUNK_BYTES
    yield size_bytes
