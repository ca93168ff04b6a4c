"""A broker without Ray (--ray off): the same work, done in its own process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sublet_broker.adapters.blobs.file_blobs import FileBlobs
from sublet_broker.adapters.data_folder import DataFolder
from sublet_broker.adapters.ray.engine import OFF, EngineConfig
from sublet_broker.adapters.ray.ports import RayPorts
from sublet_broker.adapters.ray.shards import Shard
from sublet_broker.adapters.sql.migrations import migrate
from sublet_broker.adapters.sql.store import SqlStore
from sublet_broker.market.facts import JobFact, ShardFact
from sublet_broker.service.ports import Proposal
from tests.ray.conftest import RayMarket, eventually
from tests.ray.market import NOW_MS, job, offer, open_market
from tests.ray.test_verifying import upload

HERE, HOME = offer(1, region="here"), offer(2, region="home")
FIRST, SECOND = job(1, region="here"), job(2, region="home")
BOTH = {(FIRST.id, HERE.id), (SECOND.id, HOME.id)}


@pytest.fixture
def market(tmp_path: Path) -> Iterator[RayMarket]:
    """Two machines in two pools, a job for each, and no Ray."""
    folder = DataFolder.open(tmp_path)
    migrate(folder.database_url)
    store = SqlStore(folder.database_url)
    blobs = FileBlobs(folder.blobs_root)
    blobs.prepare()
    config = EngineConfig(folder.database_url, folder.blobs_root, address=OFF, shards=2)
    ports = RayPorts.over(config, store, blobs)
    ports.start()
    with store.transaction() as tx:
        open_market(tx, [HERE, HOME], [FIRST, SECOND])
    yield RayMarket(store, blobs, ports)
    ports.stop()
    store.close()
    folder.close()


def pairs(proposals: list[Proposal]) -> set[tuple[str, str]]:
    return {(proposal.job, proposal.offer) for proposal in proposals}


def epochs(market: RayMarket) -> dict[str, int]:
    with market.store.snapshot() as tx:
        return {shard.id: shard.epoch for shard in tx.find(ShardFact)}


def test_nothing_is_started(market: RayMarket) -> None:
    assert market.ports.engine.host_pid is None
    assert not market.ports.engine.wait_up(0)


def test_it_matches_and_hears_of_what_changes(market: RayMarket) -> None:
    matcher = market.ports.matcher
    assert pairs(matcher.propose(NOW_MS)) == BOTH
    assert not matcher.stands_in()
    before = epochs(market)
    matcher.job_gone(FIRST.id)
    assert pairs(matcher.propose(NOW_MS)) == {(SECOND.id, HOME.id)}
    assert epochs(market) == before


def test_who_is_built_anew_reads_the_database_and_proposes_under_a_new_epoch(
    market: RayMarket,
) -> None:
    matcher = market.ports.matcher
    before = {p.pool: p.shard_epoch for p in matcher.propose(NOW_MS)}
    with market.store.transaction() as tx:
        tx.delete(JobFact, FIRST.id)
    matcher.rebuild()
    (again,) = matcher.propose(NOW_MS)
    assert again.job == SECOND.id
    assert again.shard_epoch == before[again.pool] + 1


def test_one_that_fails_is_built_anew(market: RayMarket, monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = market.ports.matcher
    assert pairs(matcher.propose(NOW_MS)) == BOTH

    def broken(self: Shard, *arguments: object) -> None:
        raise OSError("the disk can't be read")

    with monkeypatch.context() as patch:
        patch.setattr(Shard, "propose", broken)
        matcher.job_gone(FIRST.id)
        with market.store.transaction() as tx:
            tx.delete(JobFact, FIRST.id)
        with pytest.raises(OSError):
            matcher.propose(NOW_MS)
    assert pairs(matcher.propose(NOW_MS)) == {(SECOND.id, HOME.id)}


def test_it_verifies_by_itself(market: RayMarket) -> None:
    market.ports.verifier.submit(upload(market.blobs, "c1"))
    (result,) = eventually(lambda: market.ports.verifier.collect() or None)
    assert (result.checkpoint, result.ok) == ("c1", True)


def test_it_settles_by_itself(market: RayMarket) -> None:
    assert market.ports.settler.decide([]) == []
