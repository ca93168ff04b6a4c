"""Packs in S3 are read, hashed and written anew by tasks of a real Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sublet_broker.adapters.blobs.s3_blobs import S3Blobs, pack_key
from sublet_broker.adapters.data_folder import DataFolder
from sublet_broker.adapters.ray.engine import EngineConfig
from sublet_broker.adapters.ray.ports import RayPackWork, RayPorts
from sublet_broker.adapters.sql.migrations import migrate
from sublet_broker.adapters.sql.store import SqlStore
from sublet_broker.market.facts import ContentFact
from sublet_broker.service.content.pack_work import OwnPackWork
from sublet_broker.service.ports import BlobsAway
from sublet_contracts.digests import digest_of
from sublet_contracts.packs import PackTable
from tests.ray.conftest import LIMIT_S
from tests.stores import s3_servers
from tests.stores.s3_front import Fault, Front, front

pytestmark = pytest.mark.slow

CHUNKS = (b"one" * 300_000, b"two" * 1_000, b"three")
PACK, OTHER, NEW = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture(scope="module")
def before() -> Iterator[Front]:
    with front(s3_servers.moto()) as server:
        yield server


@pytest.fixture(scope="module")
def s3(before: Front) -> S3Blobs:
    place = s3_servers.new_place(before.endpoint)
    return S3Blobs(place, lambda: s3_servers.KEY, pause_s=0.0)


@pytest.fixture(scope="module")
def ports(s3: S3Blobs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayPorts]:
    folder = DataFolder.open(tmp_path_factory.mktemp("ray-s3"))
    migrate(folder.database_url)
    store = SqlStore(folder.database_url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3.place.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", s3_servers.KEY.key_id)
        patch.setenv("AWS_SECRET_ACCESS_KEY", s3_servers.KEY.secret)
        config = EngineConfig(
            database_url=folder.database_url,
            blobs_root=folder.blobs_root,
            cpus=1,
            s3=s3.place.url,
        )
        made = RayPorts.over(config, store, s3)
        made.start()
        assert made.engine.wait_up(LIMIT_S), "Ray did not start"
        yield made
        made.stop()
    store.close()
    folder.close()


@pytest.fixture
def work(ports: RayPorts, monkeypatch: pytest.MonkeyPatch) -> RayPackWork:
    assert isinstance(ports.pack_work, RayPackWork)
    return ports.pack_work


@pytest.fixture
def only_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process reads no pack itself."""

    def here(*_: object) -> object:
        raise AssertionError("a pack was read in this process")

    for name in ("check", "whole", "move"):
        monkeypatch.setattr(OwnPackWork, name, here)


def contents_of(pack: str, chunks: Sequence[bytes]) -> list[ContentFact]:
    found, at = [], 0
    for chunk in chunks:
        found.append(ContentFact(digest_of(chunk), len(chunk), pack, at))
        at += len(chunk)
    return found


def test_tasks_read_hash_and_write(work: RayPackWork, s3: S3Blobs, only_elsewhere: None) -> None:
    table = PackTable(tuple((digest_of(chunk), len(chunk)) for chunk in CHUNKS))
    asked = (PACK, table.name, table.to_bytes(), table.chunk_bytes)
    assert not work.check(*asked).there
    s3.put_pack(PACK, CHUNKS)
    verdict = work.check(*asked)
    assert (verdict.there, verdict.wrong) == (True, "")

    contents = contents_of(PACK, CHUNKS)
    assert work.whole(contents) == [True] * 3
    data = bytearray(b"".join(CHUNKS))
    data[len(CHUNKS[0])] ^= 1
    s3_servers.objects(s3.place).put(pack_key(PACK), bytes(data))
    assert work.check(*asked).chunk == digest_of(CHUNKS[1])
    assert work.whole(contents) == [True, False, True]
    assert work.move(contents, NEW) == [True, False, True]
    assert s3.read_pack(NEW, 0, len(data)) == CHUNKS[0] + CHUNKS[2]


def test_a_store_that_is_away_is_told(work: RayPackWork, before: Front, s3: S3Blobs) -> None:
    contents = contents_of(OTHER, CHUNKS)
    s3.put_pack(OTHER, CHUNKS)
    with before.does(lambda method, path: Fault(500)), pytest.raises(BlobsAway):
        work.whole(contents)
    assert work.whole(contents) == [True] * 3


def test_without_ray_it_is_done_here(ports: RayPorts, s3: S3Blobs, tmp_path: Path) -> None:
    config = EngineConfig("sqlite://", tmp_path, address="off", s3=s3.place.url)
    s3.put_pack("d" * 64, CHUNKS)
    off = RayPackWork(type(ports.engine)(config), s3)
    assert off.whole(contents_of("d" * 64, CHUNKS)) == [True] * 3
