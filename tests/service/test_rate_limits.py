"""Strangers leave only so much behind."""

from __future__ import annotations

import pytest

from sublet_broker.market.facts import EventFact, LogEntryFact, NonceFact
from sublet_broker.service.broker import Settings
from sublet_broker.service.errors import NotYet, Refusal
from sublet_contracts.auth import Caller
from sublet_contracts.wire import CheckpointUploaded, ReceiptIssued
from tests.service.world import AgentDouble, RenterDouble, World, key_named

HOUR_MS = 3_600_000


def too_many(act: object) -> bool:
    assert callable(act)
    with pytest.raises(Refusal) as caught:
        act()
    return caught.value.code in ("too_many", "too_many_jobs")


def test_new_parties_and_agents() -> None:
    world = World(Settings(max_new_parties_an_hour=3))
    known = [world.renter(f"renter {number}", credits_ucr=0) for number in range(3)]
    assert too_many(RenterDouble(world, "one more").introduce)
    known[0].introduce()  # who is known already comes in
    for number in range(3):
        AgentDouble(world, f"agent {number}").join()
    assert too_many(AgentDouble(world, "one more").join)
    AgentDouble(world, "agent 0").join()
    world.clock.ms += HOUR_MS
    RenterDouble(world, "one more").introduce()


def test_introducing_oneself_again_adds_nothing_to_the_log() -> None:
    world = World(Settings(max_renames_an_hour=2))
    renter = world.renter(credits_ucr=0)
    for _ in range(5):
        world.clock.ms += 1_000
        renter.introduce()
    with world.store.snapshot() as tx:
        assert tx.count(LogEntryFact) == 1
    for name in ("a", "b"):
        world.clock.ms += 1_000
        renter.name = name
        renter.introduce()
    world.clock.ms += 1_000
    renter.name = "c"
    assert too_many(renter.introduce)


def test_requests_of_one_party() -> None:
    world = World(Settings(max_requests_an_hour=3))
    renter = world.renter(credits_ucr=0)

    def request() -> None:
        caller = Caller(renter.party, world.nonce(), world.now_ms)
        world.broker.idempotency.begin(caller, "POST", "/v1/jobs", "0" * 64, "")

    for _ in range(3):
        request()
    assert too_many(request)
    with world.store.snapshot() as tx:
        assert tx.count(NonceFact) == 3


def test_a_strangers_requests_leave_no_row_and_are_not_replayed() -> None:
    world = World()
    stranger = Caller(key_named("stranger").party, world.nonce(), world.now_ms)
    world.broker.idempotency.begin(stranger, "POST", "/v1/parties", "0" * 64, "")
    with pytest.raises(Refusal) as caught:
        world.broker.idempotency.begin(stranger, "POST", "/v1/parties", "0" * 64, "")
    assert caught.value.code == "replayed"
    with world.store.snapshot() as tx:
        assert tx.count(NonceFact) == 0


def test_live_jobs_of_one_renter() -> None:
    world = World(Settings(max_live_jobs=2))
    world.agent("alice")
    renter = world.renter()
    first = renter.submit()
    renter.submit()
    assert too_many(renter.submit)
    world.broker.jobs.cancel(renter.party, first)
    renter.submit()
    world.audit()


def test_offers_of_one_provider() -> None:
    world = World(Settings(max_offers_an_hour=3))
    alice = world.agent("alice")
    alice.announce()
    alice.announce()
    assert too_many(alice.announce)
    assert len(world.broker.market.offers().offers) == 1


def test_reports_beyond_the_quota_wait_and_nothing_is_lost() -> None:
    world = World(Settings(max_reports_an_hour=2))
    alice = world.agent("alice")
    world.renter().run()
    run = alice.the_run
    world.pass_ms(10_000)
    alice.receipt(run)
    alice.receipt(run)
    with pytest.raises(NotYet):
        alice.tell(ReceiptIssued(receipt=alice.make_receipt(run).envelope))


def test_wrong_documents_are_told_of_only_so_often() -> None:
    world = World(Settings(max_remarks_an_hour=2))
    mallory = world.agent("mallory")
    wrong = mallory.announce().envelope
    for _ in range(5):
        mallory.tell(CheckpointUploaded(checkpoint=wrong))
    with world.store.snapshot() as tx:
        assert len(tx.find(EventFact, {"kind": "refused"})) == 2
