"""A tree comes whole, whatever happens to its chunks on their way."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sublet_agent.adapters.workspace.transfer import READ_ATTEMPTS, Transfer, TransferRefused
from sublet_contracts.tree import ScannedTree, TreeRefused, scan_tree
from tests.agent.test_core import BROKER, NOW, PROVIDER


class Wire(Transfer):
    """Answers for the broker, and damages what it is told to."""

    def __init__(self, tree: ScannedTree) -> None:
        super().__init__("http://nowhere", PROVIDER, lambda: BROKER.party, lambda: NOW)
        self._tree = tree
        self.damaged = 0
        """how many of the next answers"""
        self.refused: TransferRefused | None = None
        self.asked = 0
        self._counting = threading.Lock()

    def request(
        self, method: str, target: str, body: bytes | Sequence[bytes] = b"", **options: Any
    ) -> bytes:
        with self._counting:
            self.asked += 1
            damaged = self.damaged > 0
            self.damaged -= damaged
        if self.refused is not None:
            raise self.refused
        names = target.rpartition("/")[2].split(",")
        data = b"".join(self._tree.read_chunk(name) for name in names)
        return b"\0" + data[1:] if damaged else data


@pytest.fixture
def tree(tmp_path: Path) -> ScannedTree:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}").write_bytes(bytes([number + 1]) * 9_000_000)
    return scan_tree(source, max_bytes=10**9)


@pytest.fixture
def wire(tree: ScannedTree) -> Iterator[Wire]:
    wire = Wire(tree)
    yield wire
    wire.close()


def fetch(wire: Wire, tree: ScannedTree, target: Path) -> None:
    wire.download("j" * 64, 1, tree.index, target, threading.Event())


def test_what_was_damaged_on_its_way_is_fetched_again(
    wire: Wire, tree: ScannedTree, tmp_path: Path
) -> None:
    fetch(wire, tree, tmp_path / "clean")
    needed, wire.asked = wire.asked, 0
    wire.damaged = 1
    fetch(wire, tree, tmp_path / "target")
    assert scan_tree(tmp_path / "target", max_bytes=10**9).index == tree.index
    assert wire.asked == needed + 1


def test_what_never_comes_right_is_given_up(wire: Wire, tree: ScannedTree, tmp_path: Path) -> None:
    wire.damaged = 10**6
    with pytest.raises(TreeRefused, match="the broker gave other content"):
        fetch(wire, tree, tmp_path / "target")
    assert wire.asked >= READ_ATTEMPTS


def test_a_refusal_ends_it(wire: Wire, tree: ScannedTree, tmp_path: Path) -> None:
    wire.refused = TransferRefused("gone", "not_found", 404)
    with pytest.raises(TransferRefused, match="gone"):
        fetch(wire, tree, tmp_path / "target")
