"""Checkpoints' indexes are read by tasks; damage is found, and what fails is tried again."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sublet_broker.adapters.blobs.file_blobs import FileBlobs
from sublet_broker.adapters.blobs.verifying import check_checkpoint
from sublet_broker.adapters.ray.engine import EngineConfig
from sublet_broker.adapters.ray.ports import RayPorts
from sublet_broker.market.settling import SettlementCase, decide
from sublet_broker.service.ports import BlobStore, VerifyResult, VerifyTask
from sublet_contracts.digests import digest_of, hex_of
from sublet_contracts.reasons import Reason
from sublet_contracts.tree import CHUNK_BYTES, Chunk, TreeFile, TreeIndex
from tests.ray.conftest import RayMarket, eventually

LARGE = bytes(range(256)) * (CHUNK_BYTES // 256) + b"the end"
FILES = {"DONE": b"{}", "empty": b"", "layer/model.bin": LARGE}


def put(blobs: BlobStore, data: bytes) -> str:
    name = digest_of(data)
    blobs.put(name, data)
    return name


def index_of(files: dict[str, bytes]) -> TreeIndex:
    return TreeIndex(
        files=tuple(
            TreeFile(
                path=path,
                size_bytes=len(data),
                chunks=tuple(
                    Chunk(digest=digest_of(piece), size_bytes=len(piece)) for piece in pieces(data)
                ),
            )
            for path, data in sorted(files.items())
        )
    )


def pieces(data: bytes) -> list[bytes]:
    return [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]


def upload(blobs: BlobStore, checkpoint: str, raw: bytes | None = None) -> VerifyTask:
    """Bring FILES to the broker, and the index (or `raw` in its place)."""
    for data in FILES.values():
        for piece in pieces(data):
            put(blobs, piece)
    index = index_of(FILES).to_bytes() if raw is None else raw
    return VerifyTask(checkpoint, "job", put(blobs, index), max_bytes=100 * 1024 * 1024)


def collect(market: RayMarket, *tasks: VerifyTask) -> dict[str, VerifyResult]:
    """Submit, and wait for a result of each."""
    results: dict[str, VerifyResult] = {}
    for task in tasks:
        market.ports.verifier.submit(task)

    def all_there() -> bool | None:
        for result in market.ports.verifier.collect():
            assert result.checkpoint not in results, "a result came twice"
            results[result.checkpoint] = result
        return len(results) == len(tasks) or None

    eventually(all_there)
    return results


def spoiled(**changes: Any) -> bytes:
    """An index whose large file says something else."""
    index = index_of(FILES)
    *others, large = index.files
    return index.model_copy(
        update={"files": (*others, large.model_copy(update=changes))}
    ).to_bytes()


def test_a_good_one(ray_market: RayMarket) -> None:
    task = upload(ray_market.blobs, "good")
    result = collect(ray_market, task)["good"]
    assert result == VerifyResult(
        "good", True, "", sum(map(len, FILES.values())), index_of(FILES).chunks()
    )
    assert result == check_checkpoint(task, ray_market.blobs)


def test_the_same_one_twice_is_checked_once(ray_market: RayMarket) -> None:
    task = upload(ray_market.blobs, "once")
    ray_market.ports.verifier.submit(task)
    assert collect(ray_market, task)["once"].ok
    # Once it has been collected it may be checked anew.
    assert collect(ray_market, task)["once"].ok


SPOILED_INDEXES = {
    "torn": (index_of(FILES).to_bytes()[:-20], "JSON"),
    "not an index": (b"\x80\x05}q\x00.", "refused"),
    "a path with ..": (index_of(FILES).to_bytes().replace(b"layer/", b"../../"), "without '..'"),
    "a link": (
        index_of(FILES).to_bytes().replace(b'"executable":false', b'"link":"/etc/passwd"', 1),
        "link",
    ),
}


@pytest.mark.parametrize("case", SPOILED_INDEXES)
def test_a_spoiled_index(ray_market: RayMarket, case: str) -> None:
    raw, says = SPOILED_INDEXES[case]
    result = collect(ray_market, upload(ray_market.blobs, case, raw))[case]
    assert not result.ok
    assert result.permanent
    assert says in result.detail


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_index(ray_market: RayMarket, damage: str) -> None:
    task = upload(ray_market.blobs, damage)
    name = hex_of(task.index_digest)
    root = ray_market.ports.engine.config.blobs_root
    path = root / "blake3" / name[:2] / name[2:4] / name
    match damage:
        case "flipped":
            path.write_bytes(b"[" + path.read_bytes()[1:])
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case _:
            path.unlink()
    result = collect(ray_market, task)[damage]
    assert not result.ok
    assert "index" in result.detail
    # Sent again it is whole.
    assert collect(ray_market, upload(ray_market.blobs, damage))[damage].ok


def test_one_chunk_in_place_of_another(ray_market: RayMarket) -> None:
    """Each chunk is sound by itself, and the index lies about its size."""
    *front, last = index_of(FILES).files[-1].chunks
    lying = Chunk(digest=digest_of(b"{}"), size_bytes=last.size_bytes)
    task = upload(ray_market.blobs, "lying", spoiled(chunks=(*front, lying)))
    result = collect(ray_market, task)["lying"]
    assert not result.ok
    assert "one chunk can't have two sizes" in result.detail


def test_a_missing_index_and_one_too_large(ray_market: RayMarket) -> None:
    task = upload(ray_market.blobs, "large")
    small = replace(task, max_bytes=1000)
    absent = VerifyTask("absent", "job", "blake3:" + "0" * 64, 10**9)
    results = collect(ray_market, small, absent)
    assert not results["large"].ok
    assert "at most 1000" in results["large"].detail
    assert not results["absent"].ok
    assert "index" in results["absent"].detail


def test_many_at_once_and_killed_workers(ray_market: RayMarket) -> None:
    tasks = [upload(ray_market.blobs, f"many-{number}") for number in range(24)]
    for task in tasks:
        ray_market.ports.verifier.submit(task)
    for process in workers("verify"):
        os.kill(process, signal.SIGKILL)
    results = collect(ray_market, *tasks)
    assert len(results) == 24
    assert all(result.ok for result in results.values())


def test_without_ray_the_broker_verifies_by_itself(tmp_path: Path, ray_market: RayMarket) -> None:
    blobs = FileBlobs(tmp_path)
    config = EngineConfig(database_url=ray_market.store.url, blobs_root=tmp_path)
    idle = RayPorts.over(config, ray_market.store, blobs)
    alone = RayMarket(ray_market.store, blobs, idle)
    assert collect(alone, upload(blobs, "alone"))["alone"].ok
    idle.stop()


def test_what_can_not_be_read_is_not_held_against_the_job(
    tmp_path: Path, ray_market: RayMarket
) -> None:
    class Broken(FileBlobs):
        def get(self, digest: str) -> bytes:
            raise OSError("the disk is away")

    config = EngineConfig(database_url=ray_market.store.url, blobs_root=tmp_path)
    idle = RayPorts.over(config, ray_market.store, Broken(tmp_path))
    task = VerifyTask("unread", "job", "blake3:" + "0" * 64, 1)
    result = collect(RayMarket(ray_market.store, Broken(tmp_path), idle), task)["unread"]
    assert not result.ok
    assert not result.permanent
    assert "the disk is away" in result.detail
    idle.stop()


def test_settlements_are_decided_in_batches_with_ray_and_without(
    tmp_path: Path, ray_market: RayMarket
) -> None:
    cases = [
        SettlementCase(
            lease=f"{number:064x}",
            job="j" * 64,
            provider="p",
            price_ucr_per_device_hour=400_000,
            fee_bps=500,
            hold_ucr=1_000_000,
            reason=reason,
            receipt="r" * 64,
            most_device_ms=9_000_000,
            cum_device_ms=number * 1000,
            durable_device_ms=number * 500,
        )
        for number, reason in enumerate([Reason.SUCCEEDED, Reason.PROVIDER_LOST] * 50)
    ]
    expected = [decide(case) for case in cases]
    assert expected[99].charged_ucr > 0
    assert ray_market.ports.engine.call("settle", cases, timeout_s=300) == expected
    assert ray_market.ports.settler.decide(cases) == expected
    config = EngineConfig(database_url=ray_market.store.url, blobs_root=tmp_path)
    idle = RayPorts.over(config, ray_market.store, FileBlobs(tmp_path))
    assert idle.settler.decide(cases) == expected
    idle.stop()


def workers(name: str) -> list[int]:
    """The ids of Ray's processes that run the task `name` at this moment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if title.startswith(b"ray::" + name.encode()):
            found.append(int(process.name))
    return found
