"""Where files are cut: what is unchanged moves once, and no header can make it costly."""

import json
import random
from itertools import islice, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sublet_contracts.cuts import CHUNK_BYTES, HEAD_BYTES, chunk_lengths
from sublet_contracts.digests import digest_of
from sublet_contracts.tree import FileContent

MIB = 1024 * 1024


def file_of(tensors: dict[str, bytes], *, pad: int = 0) -> bytes:
    """Return a safetensors file; its header is `pad` bytes longer than it need be."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "pad": "x" * pad}}
    at = 0
    for name, data in tensors.items():
        entries[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + b"".join(tensors.values())


def chunks_of(data: bytes) -> dict[str, int]:
    """Return the chunks of a file: digest and size."""
    found: dict[str, int] = {}
    at = 0
    for length in chunk_lengths(data[:HEAD_BYTES]):
        if at >= len(data):
            break
        assert 1 <= length <= CHUNK_BYTES
        found[digest_of(data[at : at + length])] = len(data[at : at + length])
        at += length
    return found


def moved(before: bytes, after: bytes) -> int:
    """Return how many bytes travel."""
    have = chunks_of(before)
    return sum(size for digest, size in chunks_of(after).items() if digest not in have)


def model(draw: random.Random) -> dict[str, bytes]:
    """Large tensors and small ones, as a transformer has them."""
    sizes: list[int] = []
    for _ in range(6):
        sizes += [3 * MIB + 4096, 768, 768 * 4, 2 * MIB, 64, 300_000]
    return {f"layer.{n}": draw.randbytes(size) for n, size in enumerate(sizes)}


TENSORS = model(random.Random(1))
BEFORE = file_of(TENSORS)


def test_a_header_that_became_longer_moves_nothing_but_itself() -> None:
    longer = file_of(TENSORS, pad=100)
    header = 8 + int.from_bytes(longer[:8], "little")
    assert header - (8 + int.from_bytes(BEFORE[:8], "little")) == 100
    assert moved(BEFORE, longer) == header


def test_of_five_percent_changed_and_a_shifted_header_little_more_moves() -> None:
    changed = dict(TENSORS)
    large = [name for name, data in TENSORS.items() if len(data) > 3 * MIB][:1]
    for name in large:
        changed[name] = random.Random(2).randbytes(len(TENSORS[name]))
    bytes_changed = sum(len(changed[name]) for name in large)
    assert moved(BEFORE, file_of(changed, pad=100)) <= 1.15 * bytes_changed


@pytest.mark.parametrize("name", ["layer.12", "layer.13", "layer.17"])
def test_one_tensor_that_changed_moves_with_its_group_alone(name: str) -> None:
    data = bytearray(TENSORS[name])
    data[len(data) // 2] ^= 1
    after = file_of(TENSORS | {name: bytes(data)})
    assert 0 < moved(BEFORE, after) <= CHUNK_BYTES


def test_a_tensor_that_became_longer_moves_only_what_is_beside_it() -> None:
    after = file_of(TENSORS | {"layer.13": TENSORS["layer.13"] + b"more"})
    header = 8 + int.from_bytes(after[:8], "little")
    assert moved(BEFORE, after) <= header + CHUNK_BYTES


def test_small_tensors_lie_together() -> None:
    small = file_of({f"t{n}": bytes([n]) * 200_000 for n in range(20)})
    lengths = list(chunks_of(small).values())
    assert lengths[1:] == [1_000_000] * 4


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\0" * 8,
        b"PK\3\4" + b"x" * 100,
        (1).to_bytes(8, "little") + b"{",
        (2**63).to_bytes(8, "little") + b"{}",
        (10).to_bytes(8, "little") + b"[1, 2, 3]!",
        (8).to_bytes(8, "little") + b"not json",
        (100_000_001).to_bytes(8, "little") + b"{",
    ],
)
def test_what_is_no_safetensors_file_is_cut_evenly(head: bytes) -> None:
    lengths = list(islice(chunk_lengths(head), 5))
    assert lengths[1:] == [CHUNK_BYTES] * 4


def test_a_header_too_long_to_be_read_still_says_where_the_data_begins() -> None:
    head = (3 * MIB).to_bytes(8, "little") + b"{" + b" " * (HEAD_BYTES - 9)
    assert list(islice(chunk_lengths(head), 5)) == [MIB, MIB, MIB, 8, MIB]


@pytest.mark.parametrize(
    "offsets",
    [
        "[0, 9223372036854775808]",
        "[-5, 7]",
        "[1e300, NaN]",
        "[" + "[" * 90_000,
        "[" + "9" * 5_000 + "]",
        '"5"',
        "{}",
        "[true, null]",
    ],
)
def test_a_hostile_header_costs_little(offsets: str) -> None:
    header = f'{{"a": {{"data_offsets": {offsets}}}}}'.encode()
    head = len(header).to_bytes(8, "little") + header
    lengths = list(islice(chunk_lengths(head), 1_000))
    assert all(1 <= length <= CHUNK_BYTES for length in lengths)


@given(st.lists(st.integers(1, 3 * MIB), min_size=1, max_size=200))
@example([1, MIB] * 100)
def test_there_are_never_many_more_chunks_than_there_need_be(sizes: list[int]) -> None:
    edges: list[int] = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    tensors = {str(n): {"data_offsets": [a, b]} for n, (a, b) in enumerate(pairwise(edges))}
    header = json.dumps(tensors).encode()
    lengths = chunk_lengths(len(header).to_bytes(8, "little") + header)
    assert next(lengths) == 8 + len(header)
    total = count = 0
    cuts = set()
    while total < edges[-1]:
        total += next(lengths)
        count += 1
        cuts.add(total)
    assert total == edges[-1]
    assert count <= 4 * (total // CHUNK_BYTES) + 2
    # A large tensor begins a chunk, and ends one.
    large = [(a, b) for a, b in pairwise(edges) if b - a >= CHUNK_BYTES]
    assert all(a in cuts | {0} and b in cuts for a, b in large)


@given(st.binary(max_size=300), st.integers(1, 400))
def test_content_has_one_name_however_it_passes(tail: bytes, piece: int) -> None:
    data = file_of({"a": b"abc", "b": tail})
    whole, pieces = FileContent(), FileContent()
    whole.update(data)
    for at in range(0, len(data), piece):
        pieces.update(data[at : at + piece])
    assert whole.name() == pieces.name()


def test_the_head_may_be_overwritten_once_it_was_looked_at() -> None:
    head = bytearray(BEFORE[:HEAD_BYTES])
    lengths = chunk_lengths(memoryview(head))
    head[:] = bytes(len(head))
    assert list(islice(lengths, 40)) == list(islice(chunk_lengths(BEFORE[:HEAD_BYTES]), 40))
