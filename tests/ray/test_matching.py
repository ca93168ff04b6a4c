"""Match shards on Ray: they rebuild from the database, and no loss of theirs loses a job."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sublet_broker.adapters.blobs.file_blobs import FileBlobs
from sublet_broker.adapters.ray.engine import EngineAway, EngineConfig
from sublet_broker.adapters.ray.ports import RayPorts
from sublet_broker.adapters.ray.shards import shard_of
from sublet_broker.market.facts import JobFact, OfferFact, ShardFact
from sublet_broker.service.ports import BookEntry, Proposal
from tests.ray.conftest import RayMarket, eventually
from tests.ray.market import NOW_MS, job, offer, open_market

HERE, HOME = offer(1, region="here"), offer(2, region="home")
FIRST, SECOND = job(1, region="here"), job(2, region="home")
BOTH = {(FIRST.id, HERE.id), (SECOND.id, HOME.id)}


@pytest.fixture
def market(ray_market: RayMarket) -> Iterator[RayMarket]:
    """Two machines in two pools, and a job for each."""
    with ray_market.store.transaction() as tx:
        open_market(tx, [HERE, HOME], [FIRST, SECOND])
    eventually(lambda: ray_market.ports.engine.alive() or None)
    ray_market.ports.matcher.rebuild()
    yield ray_market
    with ray_market.store.transaction() as tx:
        tx.delete(JobFact, FIRST.id)
        tx.delete(JobFact, SECOND.id)
        tx.delete(OfferFact, HERE.id)
        tx.delete(OfferFact, HOME.id)


def pairs(proposals: list[Proposal] | None) -> set[tuple[str, str]]:
    return {(proposal.job, proposal.offer) for proposal in proposals or ()}


def epochs(market: RayMarket) -> dict[str, int]:
    with market.store.snapshot() as tx:
        return {shard.id: shard.epoch for shard in tx.find(ShardFact)}


def both(market: RayMarket) -> list[Proposal]:
    def look() -> list[Proposal] | None:
        found = market.propose()
        return found if pairs(found) == BOTH else None

    return eventually(look)


def test_the_two_pools_lie_on_two_shards() -> None:
    # Else the tests below would test less than they say.
    assert {shard_of(HERE.pool, 2), shard_of(HOME.pool, 2)} == {0, 1}


def test_shards_read_the_database_and_propose_under_their_epoch(market: RayMarket) -> None:
    proposals = both(market)
    assert {p.device_ids for p in proposals} == {("GPU-1",), ("GPU-2",)}
    known = epochs(market)
    assert all(p.shard_epoch == known[p.pool] >= 1 for p in proposals)


def test_changes_reach_the_shards(market: RayMarket) -> None:
    both(market)
    matcher = market.ports.matcher
    matcher.offer_changed(BookEntry(HERE, ()))
    matcher.job_gone(SECOND.id)
    assert market.propose() == []
    matcher.offer_changed(BookEntry(HERE, ("GPU-1",)))
    matcher.job_queued(SECOND)
    assert pairs(market.propose()) == BOTH
    matcher.offer_gone(HERE.id, HERE.pool)
    assert pairs(market.propose()) == {(SECOND.id, HOME.id)}


def test_the_newest_of_several_changes_counts(market: RayMarket) -> None:
    both(market)
    matcher = market.ports.matcher
    matcher.offer_changed(BookEntry(HERE, ()))
    matcher.offer_changed(BookEntry(HERE, ("GPU-1",)))
    matcher.job_gone(SECOND.id)
    matcher.job_queued(SECOND)
    assert pairs(market.propose()) == BOTH


def shard_pids(market: RayMarket) -> list[int] | None:
    """The shards' processes; None: they don't all answer."""
    try:
        pids: list[int] = market.ports.engine.call("shard_pids", timeout_s=300)
    except EngineAway:
        return None
    return pids


def on_ray_again(market: RayMarket) -> list[Proposal]:
    """Wait until nobody stands in for a shard, while jobs are matched all along."""

    def look() -> list[Proposal] | None:
        found = market.propose()
        assert pairs(found) == BOTH
        return None if market.ports.matcher.stands_in() else found

    return eventually(look)


def test_killed_shards_are_rebuilt_and_lose_no_job(market: RayMarket) -> None:
    on_ray_again(market)
    before = epochs(market)
    pids = eventually(lambda: shard_pids(market))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    # Said while they are dead, and committed before, as everything is that a matcher hears.
    late = job(3, region="here")
    with market.store.transaction() as tx:
        tx.put(late)
    market.ports.matcher.job_queued(late)
    proposals = on_ray_again(market)
    assert all(p.shard_epoch > before[p.pool] for p in proposals)
    assert set(eventually(lambda: shard_pids(market))).isdisjoint(pids)
    # The late job is in line as well: with the first one gone it gets the machine.
    market.ports.matcher.job_gone(FIRST.id)
    assert (late.id, HERE.id) in pairs(market.propose())
    with market.store.transaction() as tx:
        tx.delete(JobFact, late.id)


def test_one_stands_in_for_a_killed_shard_at_once(market: RayMarket) -> None:
    on_ray_again(market)
    before = epochs(market)
    mine = shard_of(HERE.pool, 2)
    os.kill(eventually(lambda: shard_pids(market))[mine], signal.SIGKILL)
    while not market.ports.matcher.stands_in():
        assert pairs(market.propose()) == BOTH
    assert epochs(market)[HERE.pool] > before[HERE.pool]
    assert epochs(market)[HOME.pool] == before[HOME.pool]
    on_ray_again(market)


def test_what_changes_while_one_stands_in_is_heard_by_both(market: RayMarket) -> None:
    on_ray_again(market)
    for pid in eventually(lambda: shard_pids(market)):
        os.kill(pid, signal.SIGKILL)
    while not market.ports.matcher.stands_in():
        market.propose()
    with market.store.transaction() as tx:
        tx.delete(JobFact, FIRST.id)
    market.ports.matcher.job_gone(FIRST.id)
    alone = {(SECOND.id, HOME.id)}

    def look() -> bool | None:
        assert pairs(market.propose()) == alone
        return not market.ports.matcher.stands_in() or None

    eventually(look)


def test_a_stopped_ray_is_away_and_comes_back(market: RayMarket) -> None:
    both(market)
    before = epochs(market)
    engine = market.ports.engine
    host = engine.host_pid
    assert host is not None
    os.kill(host, signal.SIGKILL)
    eventually(lambda: None if engine.alive() and engine.host_pid == host else True)
    # Meanwhile the book changes in the database, and hears of it or not: both end well.
    with market.store.transaction() as tx:
        tx.delete(JobFact, SECOND.id)
        tx.put(job(4, region="home"))
    fourth = job(4, region="home")

    def found() -> list[Proposal] | None:
        proposals = market.propose()
        wanted = {(FIRST.id, HERE.id), (fourth.id, HOME.id)}
        on_ray = engine.alive() and not market.ports.matcher.stands_in()
        return proposals if pairs(proposals) == wanted and on_ray else None

    proposals = eventually(found)
    assert engine.host_pid != host
    assert all(p.shard_epoch > before[p.pool] for p in proposals)
    with market.store.transaction() as tx:
        tx.delete(JobFact, fourth.id)


def children(pid: int) -> dict[str, int]:
    """The names and ids of a process's children."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {Path(f"/proc/{child}/comm").read_text().strip(): int(child) for child in pids}


@pytest.mark.slow
def test_a_cluster_without_its_control_store_is_replaced(market: RayMarket) -> None:
    both(market)
    host = market.ports.engine.host_pid
    assert host is not None
    os.kill(children(host)["gcs_server"], signal.SIGKILL)
    eventually(lambda: market.ports.engine.host_pid not in (host, None) or None)
    both(market)


def test_nothing_of_ours_listens_to_a_stranger(market: RayMarket) -> None:
    """The cluster's token is ours alone: 64 digits in a file that nobody else reads."""
    pid = market.ports.engine.host_pid
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    said = dict(entry.split(b"=", 1) for entry in environment if b"=" in entry)
    assert said[b"RAY_AUTH_MODE"] == b"token"
    assert said[b"RAY_USAGE_STATS_ENABLED"] == b"0"
    token = Path(said[b"RAY_AUTH_TOKEN_PATH"].decode())
    assert token.stat().st_mode & 0o077 == 0
    assert token.parent.stat().st_mode & 0o077 == 0
    assert len(token.read_text()) == 64


def test_before_ray_is_up_the_broker_matches_by_itself(market: RayMarket, tmp_path: Path) -> None:
    config = EngineConfig(database_url=market.store.url, blobs_root=tmp_path)
    idle = RayPorts.over(config, market.store, FileBlobs(tmp_path))
    assert pairs(idle.matcher.propose(NOW_MS)) == BOTH
    idle.matcher.job_gone(FIRST.id)
    assert pairs(idle.matcher.propose(NOW_MS)) == {(SECOND.id, HOME.id)}
    assert idle.matcher.stands_in()
    assert not idle.engine.alive()
    idle.stop()


def test_a_cluster_that_is_not_there_is_tried_again_in_the_background(
    market: RayMarket, tmp_path: Path
) -> None:
    config = EngineConfig(database_url=market.store.url, blobs_root=tmp_path, address="127.0.0.1:1")
    ports = RayPorts.over(config, market.store, FileBlobs(tmp_path))
    ports.start()
    assert pairs(ports.matcher.propose(NOW_MS)) == BOTH
    assert not ports.engine.alive()
    ports.stop()
