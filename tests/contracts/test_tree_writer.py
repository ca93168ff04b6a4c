"""A tree is written as its chunks come: each straight to its places, zeros as holes."""

from __future__ import annotations

import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sublet_contracts.tree import CHUNK_BYTES, ScannedTree, scan_tree
from sublet_contracts.tree_writer import TreeWriter

BIG = 5 * CHUNK_BYTES + 17


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    (root / "a" / "b").mkdir(parents=True)
    draw = random.Random(7)
    (root / "a" / "big").write_bytes(draw.randbytes(BIG))
    (root / "a" / "b" / "twice").write_bytes((root / "a" / "big").read_bytes())
    (root / "empty").touch()
    (root / "run").write_bytes(b"#!")
    (root / "run").chmod(0o755)
    with (root / "sparse").open("wb") as file:
        file.truncate(64 * CHUNK_BYTES)
        file.seek(40 * CHUNK_BYTES)
        file.write(b"in the middle")
    return root


@pytest.fixture
def tree(source: Path) -> ScannedTree:
    return scan_tree(source, max_bytes=10**9)


def test_chunks_may_come_in_any_order_and_from_many_threads(
    tmp_path: Path, tree: ScannedTree
) -> None:
    target = tmp_path / "target"
    writer = TreeWriter(tree.index, target)
    order = list(writer.chunks)
    assert len(order) == len(tree.index.chunks()), "what comes twice is asked for once"
    random.Random(3).shuffle(order)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda chunk: writer.write(chunk, tree.read_chunk(chunk.digest)), order))
    assert scan_tree(target, max_bytes=10**9).index == tree.index
    assert os.access(target / "run", os.X_OK)


def test_what_was_sparse_is_sparse_again(tmp_path: Path, tree: ScannedTree) -> None:
    target = tmp_path / "target"
    writer = TreeWriter(tree.index, target)
    for chunk in writer.chunks:
        writer.write(chunk, tree.read_chunk(chunk.digest))
    there = (target / "sparse").stat()
    assert there.st_size == 64 * CHUNK_BYTES
    assert there.st_blocks * 512 <= 2 * CHUNK_BYTES


def test_what_comes_late_goes_nowhere(tmp_path: Path, tree: ScannedTree) -> None:
    target = tmp_path / "target"
    late = TreeWriter(tree.index, target)
    shutil.rmtree(target)
    anew = TreeWriter(tree.index, target)
    chunk = next(chunk for chunk in late.chunks if chunk.size_bytes == CHUNK_BYTES)
    with pytest.raises(FileNotFoundError):
        late.write(chunk, b"x" * CHUNK_BYTES)
    assert not any((target / "a" / "big").read_bytes()[:CHUNK_BYTES])
    assert anew.chunks == late.chunks
