"""Inputs that stay on the machine for the same renter's next run."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sublet_agent.adapters.workspace.input_cache import InputCache
from sublet_agent.adapters.workspace.transfer import Transfer
from sublet_agent.adapters.workspace.workspace import fetch_inputs
from sublet_agent.core.kept_inputs import UNUSED_MS
from sublet_contracts.digests import hex_of
from sublet_contracts.documents import Job
from sublet_contracts.tree import ScannedTree, TreeIndex, scan_tree
from tests.agent.test_core import BROKER, NOW, PROVIDER, World
from tests.trees import write_tree

FILES = {"model/weights.bin": b"w" * 3_000_000, "model/config.json": b"{}", "run.sh": b"echo"}
A_DIGEST, B_DIGEST, C_DIGEST, DIGEST = ("blake3:" + digit * 64 for digit in "abcd")


@pytest.fixture
def fetched(tmp_path: Path) -> Path:
    root = tmp_path / "fetched"
    for path, content in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "run.sh").chmod(0o755)
    return root


@pytest.fixture
def index(fetched: Path) -> TreeIndex:
    return scan_tree(fetched, max_bytes=10**9).index


def cache_at(tmp_path: Path, cap_bytes: int = 10**8, *, links: bool = True) -> InputCache:
    return InputCache(tmp_path / "state", cap_bytes, links=links)


@pytest.mark.parametrize("links", [True, False])
def test_what_a_run_fetched_the_next_one_has_at_once(
    tmp_path: Path, fetched: Path, index: TreeIndex, links: bool
) -> None:
    cache = cache_at(tmp_path, links=links)
    assert not cache.place("renter", DIGEST, index, tmp_path / "first")
    assert not (tmp_path / "first").exists()
    cache.keep("renter", DIGEST, index, fetched)
    again = cache_at(tmp_path, links=links)  # the agent was started anew
    assert again.place("renter", DIGEST, index, tmp_path / "next")
    assert scan_tree(tmp_path / "next", max_bytes=10**9).index == index
    inode = (fetched / "run.sh").stat().st_ino
    assert ((tmp_path / "next" / "run.sh").stat().st_ino == inode) is links
    assert again.held_bytes() == index.total_bytes


def test_nobody_finds_what_another_renters_run_has_fetched(
    tmp_path: Path, fetched: Path, index: TreeIndex
) -> None:
    cache = cache_at(tmp_path)
    cache.keep("renter", DIGEST, index, fetched)
    assert not cache.place("another", DIGEST, index, tmp_path / "next")


@pytest.mark.parametrize("damage", ["changed", "shorter", "longer", "gone"])
def test_what_was_damaged_here_is_fetched_again(
    tmp_path: Path, fetched: Path, index: TreeIndex, damage: str
) -> None:
    cache = cache_at(tmp_path, links=False)
    cache.keep("renter", DIGEST, index, fetched)
    (weights,) = (tmp_path / "state").rglob("weights.bin")
    content = FILES["model/weights.bin"]
    if damage == "gone":
        weights.unlink()
    else:
        ways = {"changed": b"x" + content[1:], "shorter": content[:-1], "longer": content + b"w"}
        weights.write_bytes(ways[damage])
    assert not cache.place("renter", DIGEST, index, tmp_path / "next")
    assert not (tmp_path / "next").exists()
    assert cache.held_bytes() == 0
    cache.keep("renter", DIGEST, index, fetched)
    assert cache.place("renter", DIGEST, index, tmp_path / "next")


def test_the_cap_holds_and_what_runs_have_stays_theirs(
    tmp_path: Path, fetched: Path, index: TreeIndex
) -> None:
    cap = 2 * index.total_bytes
    cache = cache_at(tmp_path, cap)
    for ago_s, digest in ((20, A_DIGEST), (10, B_DIGEST)):
        cache.keep("renter", digest, index, fetched)
        (entry,) = (tmp_path / "state").rglob(f"{hex_of(digest)}/bytes")
        then_s = entry.stat().st_mtime - ago_s
        os.utime(entry, (then_s, then_s))
    assert cache.place("renter", A_DIGEST, index, tmp_path / "a"), "used now, so the other one goes"
    cache.keep("renter", C_DIGEST, index, fetched)
    assert cache.held_bytes() == cap
    assert not cache.place("renter", B_DIGEST, index, tmp_path / "b")
    assert cache.tidy(short_bytes=1) == ["let go of an input that was kept (3 MB)"]
    assert cache.forget() == (1, index.total_bytes)
    assert (tmp_path / "a" / "model" / "weights.bin").read_bytes() == FILES["model/weights.bin"]


def test_a_strangers_data_does_not_stay_for_ever(
    tmp_path: Path, fetched: Path, index: TreeIndex
) -> None:
    cache = cache_at(tmp_path)
    cache.keep("renter", DIGEST, index, fetched)
    (used,) = (tmp_path / "state").rglob("bytes")
    week_ago_s = used.stat().st_mtime - UNUSED_MS / 1000
    os.utime(used, (week_ago_s, week_ago_s))
    assert len(cache.tidy()) == 1
    assert cache.held_bytes() == 0


def test_what_was_being_kept_when_the_agent_died_goes(
    tmp_path: Path, fetched: Path, index: TreeIndex
) -> None:
    cache = cache_at(tmp_path)
    cache.keep("renter", DIGEST, index, fetched)
    (entry,) = (tmp_path / "state").rglob(hex_of(DIGEST))
    (entry / "bytes").unlink()
    os.utime(entry, (1, 1))
    assert cache.tidy() == []
    assert not entry.exists()


def test_an_owner_who_keeps_nothing_keeps_nothing(
    tmp_path: Path, fetched: Path, index: TreeIndex
) -> None:
    cache = cache_at(tmp_path, 0)
    cache.keep("renter", DIGEST, index, fetched)
    assert not cache.place("renter", DIGEST, index, tmp_path / "next")
    assert not (tmp_path / "state").exists()


class Broker(Transfer):
    """Has one tree, and counts how often its content is fetched."""

    def __init__(self, tree: ScannedTree) -> None:
        super().__init__("http://nowhere", PROVIDER, lambda: BROKER.party, lambda: NOW)
        self.tree = tree
        self.asked = self.fetched = 0

    def index(
        self, job_id: str, epoch: int | None, digest: str, cancel: threading.Event
    ) -> TreeIndex:
        self.asked += 1
        return self.tree.index

    def download(
        self, job_id: str, epoch: int | None, index: TreeIndex, root: Path, cancel: threading.Event
    ) -> None:
        self.fetched += 1
        write_tree(index, root, self.tree.read_chunk)


@pytest.fixture
def broker(fetched: Path) -> Iterator[Broker]:
    broker = Broker(scan_tree(fetched, max_bytes=10**9))
    yield broker
    broker.close()


@pytest.mark.parametrize("links", [True, False])
def test_a_resume_on_the_same_machine_fetches_no_input_again(
    tmp_path: Path, broker: Broker, links: bool
) -> None:
    content = broker.tree.index
    item = {
        "destination": "/in/model",
        "kind": "folder",
        "index_digest": DIGEST,
        "total_bytes": content.total_bytes,
    }
    job: Job = World().job(inputs=(item,)).document
    cache = cache_at(tmp_path, links=links)
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        fetch_inputs(broker, cache, "j" * 64, 1, job, tmp_path / run, threading.Event())
        assert scan_tree(tmp_path / run / "model", max_bytes=10**9).index == content
    assert broker.asked == 2, "the broker says each time that the job may have it"
    assert broker.fetched == 1
