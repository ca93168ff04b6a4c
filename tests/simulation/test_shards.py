"""The real matcher over the simulated Ray, step by step: what simulated markets have found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sublet_broker.adapters.ray.matcher import REST_MS
from sublet_broker.market.facts import ShardFact
from sublet_broker.market.matching import BookEntry
from sublet_broker.service.ports import Proposal, StorageFull, StoreAway
from tests.ray.market import NOW_MS, job, offer, open_market
from tests.simulation.market import Market, Plan

HERE, FIRST = offer(1), job(1)


def ray_is_up() -> Market:
    """An empty market, a minute after its broker started."""
    market = Market(1, Plan(faults=frozenset(), jobs=0, providers=0, renters=0))
    market.broker.start()
    pass_ms(market, 60_000)
    assert market.broker.ray.host is not None
    assert not market.broker.matcher.stands_in()
    return market


def pass_ms(market: Market, span_ms: int) -> None:
    market._until(market.engine.now_ms + span_ms, stop_when_done=False)


def open_offer(market: Market) -> None:
    """An offer is committed, and the matcher hears of it."""
    with market.broker.store.transaction() as tx:
        open_market(tx, [HERE], [])
    market.broker.matcher.offer_changed(BookEntry(HERE, ("GPU-1",)))


def only(market: Market) -> Proposal:
    (proposal,) = market.broker.matcher.propose(NOW_MS)
    return proposal


def epoch(market: Market) -> int:
    with market.broker.store.snapshot() as tx:
        found = tx.get(ShardFact, HERE.pool)
    assert found is not None
    return found.epoch


def test_a_pool_that_comes_back_to_a_new_shard_has_a_new_epoch() -> None:
    """The new shard began without that pool, and proposed for it under the old one's epoch."""
    market = ray_is_up()
    market.broker.matcher.job_queued(FIRST)
    open_offer(market)
    before = only(market).shard_epoch
    with market.broker.store.transaction() as tx:
        tx.delete(type(HERE), HERE.id)
    market.broker.matcher.offer_gone(HERE.id, HERE.pool)
    assert market.broker.matcher.propose(NOW_MS) == []
    host = market.broker.ray.host
    assert host is not None
    for actor in host.keeper.actors:
        actor.die()
    pass_ms(market, 60_000)
    assert not market.broker.matcher.stands_in()
    market.broker.matcher.job_queued(FIRST)  # it never was in this database
    open_offer(market)
    assert only(market).shard_epoch == epoch(market) > before


def test_an_epoch_that_could_not_be_committed_is_not_proposed_under() -> None:
    """All that the shard proposed for this pool was void from then on."""
    market = ray_is_up()
    market.broker.matcher.job_queued(FIRST)
    open_offer(market)
    market.broker.store.full_until_ms = market.engine.now_ms + 1
    with pytest.raises(StorageFull):
        market.broker.matcher.propose(NOW_MS)
    market.broker.store.full_until_ms = 0
    assert only(market).shard_epoch == epoch(market)


@pytest.mark.parametrize("made", [True, False])
def test_an_epoch_whose_commit_is_in_doubt_is_raised_again(
    made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard that had the pool before went on under its own epoch, and all of it was void."""
    market = ray_is_up()
    market.broker.matcher.job_queued(FIRST)
    open_offer(market)
    assert only(market).shard_epoch == epoch(market)
    host = market.broker.ray.host
    assert host is not None
    for actor in host.keeper.actors:
        actor.be_slow(3_000, to_say=False)
    market.broker.matcher.job_queued(FIRST)
    market.broker.store.breaks_in = 1
    monkeypatch.setattr(market.engine, "happens", lambda chance: not made)
    with pytest.raises(StoreAway):  # as a stand-in takes the pool over
        market.broker.matcher.propose(NOW_MS)
    pass_ms(market, 5_000)
    market.broker.matcher.job_queued(FIRST)
    assert only(market).shard_epoch == epoch(market)
    assert not market.broker.matcher.stands_in()


def test_what_ray_was_told_too_late_it_hears_with_the_next_question() -> None:
    market = ray_is_up()
    host = market.broker.ray.host
    assert host is not None
    for actor in host.keeper.actors:
        actor.be_slow(3_000, to_say=False)
    market.broker.matcher.propose(NOW_MS)
    assert market.broker.matcher.stands_in()
    market.broker.matcher.job_queued(FIRST)
    open_offer(market)
    stood_in = only(market)
    pass_ms(market, 5_000)
    assert not market.broker.matcher.stands_in()
    assert only(market).shard_epoch > stood_in.shard_epoch


def test_shards_with_nothing_to_propose_rest_until_something_changes_or_is_due() -> None:
    market = ray_is_up()
    host = market.broker.ray.host
    assert host is not None
    asked: list[int] = []
    ask = host.ask
    host.ask = lambda changes, now_ms: asked.append(now_ms) or ask(changes, now_ms)  # type: ignore[method-assign,func-returns-value]
    propose = market.broker.matcher.propose

    def waits_until(not_before_ms: int) -> None:
        market.broker.matcher.job_queued(replace(FIRST, not_before_ms=not_before_ms))

    open_offer(market)
    waits_until(NOW_MS + REST_MS // 2)
    for second in range(REST_MS // 2_000):
        assert propose(NOW_MS + second * 1_000) == []
    assert asked == [NOW_MS]
    assert [p.job for p in propose(NOW_MS + REST_MS // 2)] == [FIRST.id]  # its time has come
    waits_until(NOW_MS + 100 * REST_MS)
    assert propose(NOW_MS + REST_MS) == []
    assert propose(NOW_MS + REST_MS + 1) == []
    waits_until(0)
    assert [p.job for p in propose(NOW_MS + REST_MS + 2)] == [FIRST.id]  # something has changed
    market.broker.matcher.job_gone(FIRST.id)
    assert propose(NOW_MS + REST_MS + 3) == []
    before = len(asked)
    propose(NOW_MS + 2 * REST_MS + 2)
    assert len(asked) == before
    propose(NOW_MS + 2 * REST_MS + 3)  # whether they are still there
    assert len(asked) == before + 1
