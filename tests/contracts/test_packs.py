"""Packs: what was sent comes out, however it is cut on the way, and what is wrong is refused."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet_contracts.digests import digest_of, raw_of
from sublet_contracts.packs import (
    MAX_BODY_BYTES,
    MAX_PACK_BYTES,
    MAX_PACK_CHUNKS,
    MAX_READ_CHUNKS,
    PACK_BYTES,
    ChunkDiffers,
    Pack,
    PackReader,
    PackRefused,
    PackTable,
    cut_read,
    in_packs,
    in_reads,
)
from sublet_contracts.tree import CHUNK_BYTES, Chunk


def sha(data: bytes) -> str:
    return digest_of(data)


def table_of(*chunks: bytes) -> PackTable:
    return PackTable(tuple((sha(chunk), len(chunk)) for chunk in chunks))


def received(name: str, *parts: bytes) -> Pack:
    reader = PackReader(name)
    for part in parts:
        reader.feed(part)
    return reader.close()


def test_a_pack_byte_by_byte() -> None:
    table = table_of(b"abc", b"x")
    assert table.to_bytes() == (
        b"sublet-pack-1 blake3\n\0\0\0\2"
        + raw_of(sha(b"abc"))
        + b"\0\0\0\3"
        + raw_of(sha(b"x"))
        + b"\0\0\0\1"
    )
    assert table.name == sha(table.to_bytes())
    body = table.to_bytes() + b"abcx"
    assert table.body_bytes == len(body)
    assert table.offsets() == {sha(b"abc"): 0, sha(b"x"): 3}
    assert received(table.name, body) == Pack(table, (b"abcx",))


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=12, unique=True),
    cuts=st.lists(st.integers(0, 4_000), max_size=20),
)
def test_it_comes_out_however_it_is_cut(chunks: list[bytes], cuts: list[int]) -> None:
    table = table_of(*chunks)
    body = table.to_bytes() + b"".join(chunks)
    places = sorted({min(cut, len(body)) for cut in cuts} | {0, len(body)})
    pieces = [body[a:b] for a, b in pairwise(places)]
    pack = received(table.name, *pieces)
    assert pack.table == table
    assert b"".join(pack.parts) == b"".join(chunks)


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=5, unique=True),
    data=st.data(),
)
def test_a_flipped_bit_is_refused_wherever_it_is(chunks: list[bytes], data: st.DataObject) -> None:
    table = table_of(*chunks)
    body = bytearray(table.to_bytes() + b"".join(chunks))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(PackRefused) as caught:
        received(table.name, bytes(body))
    if at >= len(table.to_bytes()):
        assert isinstance(caught.value, ChunkDiffers)
        assert caught.value.digest in dict(table.chunks)


def test_the_first_chunk_that_differs_ends_it() -> None:
    table = table_of(b"first", b"second", b"third")
    reader = PackReader(table.name)
    reader.feed(table.to_bytes() + b"first")
    with pytest.raises(ChunkDiffers) as caught:
        reader.feed(b"SECOND")
    assert caught.value.digest == sha(b"second")


def test_one_that_is_cut_short_or_goes_on_is_refused() -> None:
    table = table_of(b"first", b"second")
    body = table.to_bytes() + b"firstsecond"
    for end in range(len(body)):
        with pytest.raises(PackRefused):
            received(table.name, body[:end])
    with pytest.raises(PackRefused, match="longer"):
        received(table.name, body + b"!")


def raw_table(*entries: tuple[bytes, int], count: int | None = None) -> bytes:
    head = b"sublet-pack-1 blake3\n" + struct.pack(">I", len(entries) if count is None else count)
    return head + b"".join(struct.pack(">32sI", digest, size) for digest, size in entries)


ONE, TWO = bytes(32), bytes([1]) * 32


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"sublet-pack-2\n\0\0\0\1", "doesn't begin"),
        (b"\x80\x05pickle", "doesn't begin"),
        (raw_table(), "0 chunks"),
        (raw_table((ONE, 1), count=MAX_PACK_CHUNKS + 1), f"1 to {MAX_PACK_CHUNKS}"),
        (raw_table((ONE, 1), count=2**32 - 1), f"1 to {MAX_PACK_CHUNKS}"),
        (raw_table((ONE, 0)), "1 to"),
        (raw_table((ONE, CHUNK_BYTES + 1)), "1 to"),
        (raw_table((ONE, 1), (ONE, 1)), "twice"),
        (raw_table((ONE, 1), (ONE, 2)), "twice"),
        (
            raw_table(*((bytes([n]) * 32, CHUNK_BYTES) for n in range(65))),
            f"more than {MAX_PACK_BYTES}",
        ),
    ],
)
def test_a_table_that_breaks_a_rule_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(PackRefused, match=says):
        received(digest_of(raw), raw)


def test_a_table_of_another_name_is_refused() -> None:
    table = table_of(b"abc")
    with pytest.raises(PackRefused, match="name"):
        received("blake3:" + "0" * 64, table.to_bytes() + b"abc")


def test_chunks_are_put_into_packs_in_their_order() -> None:
    sizes = {str(number): 5 for number in range(7)}
    tables = in_packs([*sizes, "3"], sizes, pack_bytes=12)
    assert [[name for name, _ in table.chunks] for table in tables] == [
        ["0", "1"],
        ["2", "3"],
        ["4", "5"],
        ["6"],
    ]
    assert in_packs([], {}) == []
    many = {f"{number}": 1 for number in range(MAX_PACK_CHUNKS + 1)}
    assert [len(table.chunks) for table in in_packs(many, many)] == [MAX_PACK_CHUNKS, 1]


def test_what_senders_make_is_taken() -> None:
    assert PACK_BYTES % CHUNK_BYTES == 0
    assert PACK_BYTES <= MAX_PACK_BYTES < MAX_BODY_BYTES


def chunks_of(*pieces: bytes) -> list[Chunk]:
    return [Chunk(digest=sha(piece), size_bytes=len(piece)) for piece in pieces]


def test_chunks_are_read_in_groups_in_their_order() -> None:
    large = [Chunk(digest=sha(b"x"), size_bytes=CHUNK_BYTES)] * 9
    assert [len(group) for group in in_reads(large)] == [4, 4, 1]
    small = [Chunk(digest=sha(b"x"), size_bytes=1)] * (MAX_READ_CHUNKS + 1)
    assert [len(group) for group in in_reads(small)] == [MAX_READ_CHUNKS, 1]
    assert in_reads([]) == []


def test_what_was_read_is_cut_and_checked() -> None:
    chunks = chunks_of(b"one", b"two", b"one")
    assert cut_read(b"onetwoone", chunks) == [b"one", b"two", b"one"]
    for wrong in (b"onetwoon", b"onetwoONE", b"twooneone", b"", b"onetwoone!"):
        with pytest.raises(PackRefused):
            cut_read(wrong, chunks)
