"""The real clients of agent and renter at a broker whose content lies in S3, through a store and a
network that fail: everything arrives whole, by way of the broker not a byte of a pack."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from sublet.errors import SubletError
from sublet.http import Link
from sublet.transfers import InputError, read_file, read_index, upload_inputs
from sublet_agent.adapters.workspace.transfer import Cancelled, Transfer, TransferRefused
from sublet_broker.adapters.blobs.s3_addresses import S3Addresses
from sublet_broker.adapters.blobs.s3_blobs import S3Blobs, pack_key
from sublet_broker.adapters.blobs.s3_place import Credentials
from sublet_contracts import moves
from sublet_contracts.problems import ProblemCode
from sublet_contracts.tree import ScannedTree, scan_tree
from tests.http.world import Party, World, running
from tests.stores import s3_servers
from tests.stores.s3_front import Fault, Front, front
from tests.trees import reading

pytestmark = pytest.mark.asyncio

FILES = {"one": 3_000_000, "two/three": 1, "four": 200_000}


@dataclass
class Market:
    """A broker, its store, and a renter with a queued job."""

    world: World
    store: Front
    blobs: S3Blobs
    renter: Party
    job: str
    keys: list[Credentials]
    """The broker's to the store: the last one."""

    def link(self) -> Link:
        """Return the SDK's way to the broker."""
        return Link(self.world.url, self.renter.key, away_limit_s=20)

    @contextmanager
    def transfer(self) -> Iterator[Transfer]:
        """Have the agent's: a renter may write into his own job as the holder of its epoch may."""
        key, world = self.renter.key, self.world
        moving = Transfer(world.url, key, lambda: world.id, world.clock.now_ms)
        try:
            yield moving
        finally:
            moving.close()

    def carried(self) -> list[str]:
        """What of packs the broker itself has moved, in either direction."""
        return [
            f"{method} {path}"
            for method, path in self.store.asked
            if "/packs/" in path and method == "PUT" and "X-Amz-Signature" not in path
        ]


@pytest.fixture
async def market() -> AsyncIterator[Market]:
    with front(s3_servers.moto(), s3_servers.KEY) as store:
        keys = [s3_servers.KEY]
        blobs = S3Blobs(s3_servers.new_place(store.endpoint), lambda: keys[-1], pause_s=0.0)
        async with running(blobs=blobs, addresses=S3Addresses(blobs)) as world:
            renter = await world.renter()
            answer = await renter.post("/v1/jobs", renter.job())
            assert answer.status_code == 201, answer.text
            store.asked.clear()
            yield Market(world, store, blobs, renter, answer.json()["id"], keys)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "_PAUSE_S", (0.01, 0.02))


@pytest.fixture
def tree(tmp_path: Path) -> ScannedTree:
    for name, size in FILES.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
    return scan_tree(tmp_path / "tree", max_bytes=1 << 30)


def once(*faults: Fault, method: str, part: str = "/packs/") -> Callable[[str, str], Fault | None]:
    """These, one after another, for requests of that method; then none."""
    left = list(faults)

    def judge(asked: str, path: str) -> Fault | None:
        return left.pop(0) if left and asked == method and part in path else None

    return judge


def up_and_down(market: Market, tree: ScannedTree, target: Path) -> None:
    """As the agent does."""
    cancel = threading.Event()
    with market.transfer() as moving:
        digest, _ = moving.upload(market.job, None, reading(tree), cancel)  # type: ignore[arg-type]
        index = moving.index(market.job, None, digest, cancel)
        target.mkdir()
        moving.download(market.job, None, index, target, cancel)


def same(target: Path, source: Path) -> bool:
    return all((target / name).read_bytes() == (source / name).read_bytes() for name in FILES)


SENDING = {
    "nothing": [],
    "500 twice": [Fault(500), Fault(503, "SlowDown")],
    "the answer is lost": [Fault(500, after=True)],
    "a bit flips on the way": [Fault(flip_sent=True)],
    "a bit flips in the store": [Fault(flip_kept=True)],
    "expired": [Fault(403, "AccessDenied"), Fault(403, "AccessDenied")],
    "full for a while": [Fault(507, "InsufficientStorage")],
}


@pytest.mark.parametrize("faults", SENDING.values(), ids=SENDING)
async def test_an_agents_upload_arrives_whole(
    market: Market, tree: ScannedTree, tmp_path: Path, faults: list[Fault]
) -> None:
    with market.store.does(once(*faults, method="PUT")):
        await asyncio.to_thread(up_and_down, market, tree, tmp_path / "got")
    assert same(tmp_path / "got", tmp_path / "tree")
    assert market.carried() == []
    assert len(list(market.blobs.packs())) == 1


async def test_a_key_that_expires_in_mid_upload_stops_nothing(
    market: Market, tree: ScannedTree, tmp_path: Path
) -> None:
    """The one that signed the address counts no more when the content comes."""

    def expire(method: str, path: str) -> Fault | None:
        if method == "PUT" and "/packs/" in path and len(market.keys) == 1:
            market.keys.append(Credentials("ANOTHER", "a new secret", "a new token"))
            market.store.key = market.keys[-1]
        return None

    with market.store.does(expire):
        await asyncio.to_thread(up_and_down, market, tree, tmp_path / "got")
    assert len(market.keys) == 2
    assert same(tmp_path / "got", tmp_path / "tree")
    assert market.carried() == []


READING = {
    "500": [Fault(500)],
    "expired": [Fault(403, "AccessDenied")],
    "cut": [Fault(cut=True)],
    "a bit flips": [Fault(flip_received=True)],
    "gone elsewhere": [Fault(404, "NoSuchKey")],
    "whole, not a part": [Fault(drop=("range",))],
    "never by address": [Fault(500)] * moves.READ_ATTEMPTS,
}


@pytest.mark.parametrize("faults", READING.values(), ids=READING)
async def test_an_agents_download_is_whole(
    market: Market, tree: ScannedTree, tmp_path: Path, faults: list[Fault]
) -> None:
    with market.store.does(once(*faults, method="GET", part="X-Amz-Signature")):
        await asyncio.to_thread(up_and_down, market, tree, tmp_path / "got")
    assert same(tmp_path / "got", tmp_path / "tree")


async def test_a_flipped_bit_in_the_store_is_found_on_the_way_down(
    market: Market, tree: ScannedTree, tmp_path: Path
) -> None:
    cancel = threading.Event()

    def up() -> str:
        with market.transfer() as moving:
            digest, _ = moving.upload(market.job, None, reading(tree), cancel)  # type: ignore[arg-type]
            return digest

    def down(digest: str) -> None:
        with market.transfer() as moving:
            index = moving.index(market.job, None, digest, cancel)
            (tmp_path / "got").mkdir()
            moving.download(market.job, None, index, tmp_path / "got", cancel)

    digest = await asyncio.to_thread(up)
    (pack,) = market.blobs.packs()
    objects = s3_servers.objects(market.blobs.place)
    data = bytearray(objects.get(pack_key(pack)).bytes())
    data[1_500_000] ^= 1
    objects.put(pack_key(pack), bytes(data))
    with pytest.raises(TransferRefused) as refused:
        await asyncio.to_thread(down, digest)
    assert refused.value.code == ProblemCode.DAMAGED
    # What is lost counts as missing from now on, and is sent again.
    assert await asyncio.to_thread(up) == digest
    (tmp_path / "got").rename(tmp_path / "before")
    await asyncio.to_thread(down, digest)
    assert same(tmp_path / "got", tmp_path / "tree")


async def test_an_upload_to_a_store_that_takes_nothing_ends_when_it_is_no_longer_wanted(
    market: Market, tree: ScannedTree
) -> None:
    cancel = threading.Event()
    tries = 0

    def judge(method: str, path: str) -> Fault | None:
        nonlocal tries
        if method == "PUT" and "/packs/" in path:
            tries += 1
            if tries == 3:
                cancel.set()
            return Fault(stall=False, status=500)
        return None

    def up() -> None:
        with market.transfer() as moving:
            moving.upload(market.job, None, reading(tree), cancel)  # type: ignore[arg-type]

    with market.store.does(judge), pytest.raises(Cancelled):
        await asyncio.to_thread(up)
    assert list(market.blobs.packs()) == []


@pytest.mark.parametrize("faults", SENDING.values(), ids=SENDING)
async def test_a_renters_input_arrives_whole_and_comes_back(
    market: Market, tree: ScannedTree, tmp_path: Path, faults: list[Fault]
) -> None:
    moved = 0

    def advance(count: int) -> None:
        nonlocal moved
        moved += count

    def up() -> object:
        link = market.link()
        (sent,) = upload_inputs(link, {str(tmp_path / "tree"): "/data"}, lambda *_: advance)
        link.close()
        return sent

    with market.store.does(once(*faults, method="PUT")):
        sent = await asyncio.to_thread(up)
    assert moved == sum(FILES.values())
    assert market.carried() == []
    answer = await market.renter.post("/v1/jobs", market.renter.job(inputs=(sent,)))
    assert answer.status_code == 201, answer.text
    job, digest = answer.json()["id"], sent.index_digest  # type: ignore[attr-defined]

    def down() -> dict[str, bytes]:
        link = market.link()
        index = read_index(link, job, digest)
        got = {file.path: read_file(link, job, file) for file in index.files}
        link.close()
        return got

    with market.store.does(once(*faults, method="GET", part="X-Amz-Signature")):
        got = await asyncio.to_thread(down)
    assert got == {name: (tmp_path / "tree" / name).read_bytes() for name in FILES}


async def test_a_renter_is_told_that_the_store_takes_nothing(
    market: Market, tree: ScannedTree, tmp_path: Path
) -> None:
    def up() -> None:
        upload_inputs(
            market.link(), {str(tmp_path / "tree"): "/data"}, lambda *_: lambda count: None
        )

    with (
        market.store.does(lambda method, path: Fault(507) if method == "PUT" else None),
        pytest.raises(InputError, match="took nothing: it answers 507; submit again later"),
    ):
        await asyncio.to_thread(up)


async def test_chunks_are_not_carried_by_a_broker_with_addresses(market: Market) -> None:
    digest = "blake3:" + "0" * 64
    answer = await market.renter.get(f"/v1/jobs/{market.job}/chunks/{digest}")
    assert (answer.status_code, answer.json()["code"]) == (409, "by_address")


async def test_a_broker_without_a_store_of_its_own_has_no_addresses() -> None:
    async with running() as world:
        renter = await world.renter()
        link = Link(world.url, renter.key)
        body = b'{"table": "AAAA", "body_sha256": "%s"}' % (b"0" * 64)
        target = "/v1/packs/blake3:" + "0" * 64 + "/address"
        with pytest.raises(SubletError) as refused:
            await asyncio.to_thread(lambda: link.send("POST", target, data=body))
        assert refused.value.problem.code == ProblemCode.NO_SUCH_ADDRESS
        link.close()
