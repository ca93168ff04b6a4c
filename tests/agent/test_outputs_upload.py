"""Outputs on their way: what can be moved in time is, and the index that arrives lists the rest."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sublet_agent.adapters.workspace.transfer import Transfer, TransferRefused
from sublet_agent.adapters.workspace.upload_meter import UploadMeter
from sublet_agent.core.uploads import Moved
from sublet_contracts import packs
from sublet_contracts.api import Problem
from sublet_contracts.keys import SigningKey
from sublet_contracts.outputs_tree import scan_outputs
from sublet_contracts.packs import ChunkDiffers, PackReader
from sublet_contracts.problems import ProblemCode
from sublet_contracts.tree import (
    ScannedTree,
    TreeIndex,
    TreeRefused,
    WhyLeftOut,
    parse_index,
)
from tests.trees import reading

KIB = 1024


class Store(ThreadingHTTPServer):
    """Takes chunks as a broker does, until it has no more room."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: dict[str, bytes] = {}
        self.takes: Callable[[bytes], bool] = lambda data: True


class _Handler(BaseHTTPRequestHandler):
    server: Store

    def do_POST(self) -> None:
        asked = json.loads(self._body())["digests"]
        missing = [digest for digest in asked if digest not in self.server.blobs]
        self._answer(200, json.dumps({"missing": missing}).encode())

    def do_PUT(self) -> None:
        data = self._body()
        if not self.server.takes(data):
            code = ProblemCode.TOO_MUCH_STORED
            problem = Problem(title="Full", status=413, detail="no room", code=code)
            self._answer(413, problem.model_dump_json().encode())
            return
        name = self.path.rsplit("/", 1)[-1]
        if "/packs/" in self.path:
            reader = PackReader(name)
            try:
                reader.feed(data)
                pack = reader.close()
            except ChunkDiffers as error:
                self._refuse(ProblemCode.HASH_MISMATCH, digest=error.digest)
                return
            chunks, at = b"".join(pack.parts), 0
            for digest, size in pack.table.chunks:
                self.server.blobs[digest] = chunks[at : at + size]
                at += size
        else:
            self.server.blobs[name] = data
        self._answer(204, b"")

    def _refuse(self, code: ProblemCode, **facts: str) -> None:
        problem = Problem(title="No", status=422, detail="no", code=code, facts=dict(facts))
        self._answer(422, problem.model_dump_json().encode())

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def store() -> Iterator[Store]:
    server = Store()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def transfer(store: Store) -> Iterator[Transfer]:
    key = SigningKey.generate()
    url = f"http://127.0.0.1:{store.server_address[1]}"
    moving = Transfer(url, key, lambda: key.party, lambda: 0)
    try:
        yield moving
    finally:
        moving.close()


@pytest.fixture
def tree(tmp_path: Path) -> ScannedTree:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    for size in (40, 1, 30, 2):
        (outputs / f"{size}k").write_bytes(bytes([size]) * size * KIB)
    return scan_outputs(outputs, max_bytes=10**6, inside=tmp_path)


def sent(
    transfer: Transfer, tree: ScannedTree, left_s: Callable[[], float] = lambda: math.inf
) -> tuple[str, TreeIndex]:
    return transfer.upload_outputs("j" * 64, 1, tree, threading.Event(), left_s)


def names(index: TreeIndex) -> list[str]:
    return [file.path for file in index.files]


def left_out(index: TreeIndex) -> dict[str, WhyLeftOut]:
    return {entry.path: entry.why for entry in index.left_out}


def test_all_of_it_arrives(store: Store, transfer: Transfer, tree: ScannedTree) -> None:
    digest, index = sent(transfer, tree)
    assert index == tree.index
    assert parse_index(store.blobs[digest]) == index
    assert set(index.chunks()) < store.blobs.keys()


def test_what_was_sent_is_counted_and_what_was_there_is_not(
    store: Store, transfer: Transfer, tree: ScannedTree
) -> None:
    for files, sent_bytes in ((tree, 73 * KIB), (tree, 0)):
        meter = UploadMeter()
        assert meter.moved is None
        transfer.upload("j" * 64, 1, reading(files), threading.Event(), meter)
        assert meter.moved == Moved(73 * KIB, 73 * KIB, sent_bytes)
        outputs = UploadMeter()
        transfer.upload_outputs(
            "j" * 64, 1, files, threading.Event(), lambda: math.inf, meter=outputs
        )
        assert outputs.moved == Moved(73 * KIB, 73 * KIB, 0)


def test_small_files_go_first_and_what_comes_too_late_is_listed(
    store: Store, transfer: Transfer, tree: ScannedTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", 4 * KIB)  # 1k and 2k, 30k, 40k
    released = threading.Event()
    # The large ones are answered only once it is over.
    store.takes = lambda data: len(data) < 10 * KIB or released.wait(60)
    until_s = time.monotonic() + 3.0
    try:
        digest, index = sent(transfer, tree, lambda: until_s - time.monotonic())
    finally:
        released.set()
    assert names(index) == ["1k", "2k"]
    assert left_out(index) == dict.fromkeys(("30k", "40k"), WhyLeftOut.NO_TIME)
    assert parse_index(store.blobs[digest]) == index
    assert set(index.chunks()) < store.blobs.keys()


def test_when_there_was_no_time_at_all_nothing_is_sent(
    store: Store, transfer: Transfer, tree: ScannedTree
) -> None:
    digest, index = sent(transfer, tree, lambda: 0.0)
    assert (digest, names(index)) == ("", [])
    assert len(left_out(index)) == 4
    assert not store.blobs


def test_what_the_broker_has_no_room_for_is_listed(
    store: Store, transfer: Transfer, tree: ScannedTree
) -> None:
    store.takes = lambda data: len(data) < 10 * KIB
    digest, index = sent(transfer, tree)
    assert names(parse_index(store.blobs[digest])) == ["1k", "2k"]
    assert left_out(index) == {"30k": WhyLeftOut.NO_ROOM, "40k": WhyLeftOut.NO_ROOM}


def test_without_room_for_the_index_it_is_refused(
    store: Store, transfer: Transfer, tree: ScannedTree
) -> None:
    store.takes = lambda data: False
    with pytest.raises(TransferRefused, match="no room"):
        sent(transfer, tree)


def test_what_was_changed_meanwhile_is_listed(
    store: Store, transfer: Transfer, tree: ScannedTree, tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    (outputs / "2k").unlink()
    (outputs / "30k").write_bytes(b"other")
    (outputs / "40k").write_bytes(b"?" * 40 * KIB)  # as long as before: the broker finds out
    digest, index = sent(transfer, tree)
    assert names(parse_index(store.blobs[digest])) == ["1k"]
    assert left_out(index) == dict.fromkeys(("2k", "30k", "40k"), WhyLeftOut.CHANGED)


def test_a_checkpoint_that_changed_meanwhile_is_refused_by_its_name(
    transfer: Transfer, tree: ScannedTree, tmp_path: Path
) -> None:
    (tmp_path / "outputs" / "40k").write_bytes(b"?" * 40 * KIB)
    with pytest.raises(TreeRefused, match="40k changed"):
        transfer.upload("j" * 64, 1, reading(tree), threading.Event())
