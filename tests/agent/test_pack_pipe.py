"""Chunks travel while the tree is still being read: full packs, bounded, and each once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sublet_agent.adapters.workspace.pack_pipe import (
    ASK_CHUNKS,
    PACKS,
    QUESTIONS,
    PackBody,
    PackPipe,
)
from sublet_agent.adapters.workspace.upload_meter import UploadMeter
from sublet_contracts.digests import digest_of
from sublet_contracts.packs import PACK_BYTES, ChunkDiffers, PackReader, PackTable
from sublet_contracts.tree import CHUNK_BYTES, Chunk, ScannedTree, scan_tree

WAIT_S = 30


class Broker:
    """Takes packs as one does, once `answers` is set."""

    def __init__(self) -> None:
        self.have: dict[str, int] = {}
        self.packs: list[int] = []
        self.asked: list[int] = []
        self.answers = threading.Event()
        self.answers.set()
        self.first = threading.Event()
        self.fails: Exception | None = None
        self._lock = threading.Lock()

    def missing(self, asked: Sequence[str]) -> list[str]:
        with self._lock:
            self.asked.append(len(asked))
            return [digest for digest in asked if digest not in self.have]

    def put(self, body: PackBody) -> None:
        self.first.set()
        assert self.answers.wait(WAIT_S)
        if self.fails is not None:
            raise self.fails
        reader = PackReader(body.table.name)
        taken = 0
        for piece in body.pieces():
            taken += len(piece)
            reader.feed(bytes(piece))
        assert taken == body.size_bytes
        table = reader.close().table
        with self._lock:
            for digest, size in table.chunks:
                assert digest not in self.have, "sent twice"
                self.have[digest] = size
            self.packs.append(table.chunk_bytes)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def folder(root: Path, chunks: int) -> Path:
    root.mkdir()
    (root / "model").write_bytes(os.urandom(chunks * CHUNK_BYTES - 5))
    (root / "same").write_bytes((root / "model").read_bytes()[: 3 * CHUNK_BYTES])
    (root / "small").write_bytes(b"small")
    (root / "empty").touch()
    return root


def send(broker: Broker, pool: ThreadPoolExecutor, root: Path, meter: UploadMeter) -> ScannedTree:
    def put(body: PackBody) -> None:
        broker.put(body)
        meter.sent(body.table.chunk_bytes)

    with PackPipe(pool, broker.missing, put, meter) as pipe:
        tree = scan_tree(root, max_bytes=1 << 30, on_chunk=pipe.take)
        meter.begins(sum(tree.index.chunks().values()))
        pipe.finish()
    return tree


def test_all_arrives_once_in_full_packs(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    broker, meter = Broker(), UploadMeter()
    tree = send(broker, pool, folder(tmp_path / "tree", 70), meter)
    assert broker.have == tree.index.chunks()
    assert sorted(broker.packs)[1:] == [PACK_BYTES] * 4
    moved = meter.moved
    assert moved is not None
    assert moved.total_bytes == moved.there_bytes == moved.sent_bytes == sum(broker.packs)


def test_what_is_there_is_not_sent_and_the_rest_is_put_together(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    broker = Broker()
    root = folder(tmp_path / "tree", 100)
    send(broker, pool, root, UploadMeter())
    broker.packs.clear()
    with (root / "model").open("r+b") as model:
        for block in range(0, 100, 10):
            model.seek(block * CHUNK_BYTES)
            model.write(os.urandom(10))
    meter = UploadMeter()
    send(broker, pool, root, meter)
    assert broker.packs == [10 * CHUNK_BYTES]
    moved = meter.moved
    assert moved is not None
    assert (moved.there_bytes, moved.sent_bytes) == (moved.total_bytes, 10 * CHUNK_BYTES)


def test_the_first_pack_leaves_while_the_tree_is_read_and_who_reads_waits(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    broker = Broker()
    broker.answers.clear()
    root = folder(tmp_path / "tree", 300)
    taken = 0
    read = threading.Event()

    def reading() -> None:
        nonlocal taken
        with PackPipe(pool, broker.missing, broker.put, UploadMeter()) as pipe:
            data = (root / "model").read_bytes()
            for at in range(0, len(data), CHUNK_BYTES):
                piece = data[at : at + CHUNK_BYTES]
                chunk = Chunk(digest=digest_of(piece), size_bytes=len(piece))
                pipe.take(chunk, root / "model", at)
                taken += 1
            read.set()
            pipe.finish()

    thread = threading.Thread(target=reading)
    thread.start()
    assert broker.first.wait(WAIT_S)
    assert not read.wait(2)
    # Packs and questions under way, what one question is made of, and one more of each.
    assert taken <= (PACKS + 1) * 16 + (QUESTIONS + 2) * 32 < 300
    broker.answers.set()
    thread.join(WAIT_S)
    assert read.is_set()
    assert sum(broker.have.values()) == 300 * CHUNK_BYTES - 5


def test_the_first_failure_ends_the_reading(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    broker = Broker()
    broker.fails = OSError("gone")
    with pytest.raises(OSError, match="gone"):
        send(broker, pool, folder(tmp_path / "tree", 200), UploadMeter())
    assert broker.have == {}


def test_many_tiny_files_are_asked_for_together(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    for number in range(2_500):
        (root / str(number)).write_bytes(str(number).encode())
    broker = Broker()
    tree = send(broker, pool, root, UploadMeter())
    assert broker.have == tree.index.chunks()
    assert sorted(broker.asked) == [500, ASK_CHUNKS, ASK_CHUNKS]
    assert len(broker.packs) == 1


@pytest.mark.parametrize("what", ["gone", "shorter", "a folder"])
def test_a_chunk_that_is_gone_is_told_by_its_name(tmp_path: Path, what: str) -> None:
    root = folder(tmp_path / "tree", 2)
    tree = scan_tree(root, max_bytes=1 << 30)
    small = digest_of(b"small")
    (root / "small").unlink()
    if what == "shorter":
        (root / "small").write_bytes(b"smal")
    elif what == "a folder":
        (root / "small").mkdir()
    body = PackBody(PackTable(((small, 5),)), tree.sources)
    with pytest.raises(ChunkDiffers) as caught:
        list(body.pieces())
    assert caught.value.digest == small
