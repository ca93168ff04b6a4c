"""Matching: one judge, a deterministic choice, and an explanation for each no."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from sublet_broker.market.facts import JobFact, OfferFact
from sublet_broker.market.matching import BookEntry, explain, fits, requirements_of
from sublet_broker.market.offer_book import OfferBook
from sublet_broker.market.offers import pool_of
from sublet_broker.market.order_book import OrderBook, alike
from sublet_contracts.documents import Job, Offer, Resources, sign_document
from sublet_contracts.states import JobState
from tests.contracts.varied import varied
from tests.service.world import BEGIN_MS, PRICE, gpu, key_named

BROKER = key_named("broker").party
POOL = "rtx4090@home"


def entry(name: str, **changes: object) -> BookEntry:
    key = key_named(name)
    fields: dict[str, object] = {
        "provider": key.party,
        "broker": BROKER,
        "sequence": 1,
        "name": name,
        "devices": (gpu(f"GPU-{name}"),),
        "price_ucr_per_device_hour": PRICE,
        "cpu_millis": 8000,
        "memory_bytes": 32 * 10**9,
        "disk_bytes": 100 * 10**9,
        "region": "home",
        "runner": "docker",
        "image_policy": "any",
        "egress": False,
        "accepts": (),
        "grace_ms": 30_000,
        "issued_ms": BEGIN_MS,
        "expires_ms": BEGIN_MS + 10**9,
    }
    fields.update(changes)
    offer = Offer.model_validate(fields)
    signed = sign_document(offer, key)
    fact = OfferFact(
        signed.id, key.party, 1, pool_of(offer), True, offer.expires_ms, signed.envelope
    )
    return BookEntry(fact, tuple(device.id for device in offer.devices))


def job(number: int = 0, **changes: object) -> JobFact:
    key = key_named("renter")
    resources: dict[str, object] = {
        "devices": 1,
        "device_kind": "gpu",
        "memory_bytes": 10**9,
        "disk_bytes": 10**9,
    }
    resources.update({k: v for k, v in changes.items() if k in Resources.model_fields})
    price = changes.get("price", PRICE)
    document = Job.model_validate(
        {
            "renter": key.party,
            "broker": BROKER,
            "nonce": f"{number:032x}",
            "name": "train",
            "image": changes.get("image", "train:latest"),
            "command": (),
            "env": {},
            "resources": Resources.model_validate(resources),
            "max_price_ucr_per_device_hour": price,
            "budget_ucr": 10**9,
            "checkpoint_interval_ms": 60_000,
            "patience_ms": 20_000,
            "inputs": (),
            "accept_receipts_up_to_ucr": 10**9,
            "issued_ms": BEGIN_MS,
            "expires_ms": BEGIN_MS + 10**9,
        }
    )
    signed = sign_document(document, key)
    return JobFact(
        id=signed.id,
        renter=key.party,
        name="train",
        state=JobState.QUEUED,
        envelope=signed.envelope,
        budget_ucr=10**9,
        accept_ucr=10**9,
        submitted_ms=BEGIN_MS + number,
    )


@pytest.mark.parametrize(
    ("offer", "requirements", "constraint"),
    [
        ({"price_ucr_per_device_hour": PRICE + 1}, {}, "price"),
        ({"region": "moon"}, {"region": "home"}, "region"),
        ({"memory_bytes": 1}, {}, "memory"),
        ({"disk_bytes": 1}, {}, "disk"),
        ({"cpu_millis": 1}, {"cpu_millis": 1_000}, "cpu"),
        ({}, {"egress": True}, "egress"),
        ({"image_policy": "digest"}, {}, "image"),
        ({"accepts": (BROKER,)}, {}, "accepts"),
        ({"runner": "process", "accepts": (BROKER,)}, {}, "accepts"),
        ({}, {"devices": 2}, "devices"),
        ({}, {"device_memory_bytes": 80 * 10**9}, "device_memory"),
        ({}, {"device_name": "H100"}, "device_name"),
        ({}, {"hardware_class": "h100"}, "hardware_class"),
        ({}, {"device_kind": "cpu"}, "device_kind"),
    ],
)
def test_each_constraint_fails_by_its_name(
    offer: dict[str, object], requirements: dict[str, object], constraint: str
) -> None:
    found = explain(requirements_of(job(**requirements)), [entry("alice", **offer)])
    assert found.failures == {constraint: 1}
    assert found.relax
    assert not found.some_offer_could


def test_the_cheapest_then_the_smallest_then_the_id_is_chosen() -> None:
    dear = entry("dear")
    big = entry("big", price_ucr_per_device_hour=5, devices=(gpu("a"), gpu("b")))
    small = entry("small", price_ucr_per_device_hour=5)
    for entries in ([dear, big, small], [small, big, dear], [big, small, dear]):
        book = OfferBook()
        for each in entries:
            book.put(each)
        chosen = [each.offer.id for each in book.candidates(requirements_of(job()), BEGIN_MS)]
        assert chosen == [small.offer.id, big.offer.id, dear.offer.id]


def test_who_failed_the_job_is_avoided_and_who_prepared_is_preferred() -> None:
    cheap = entry("cheap", price_ucr_per_device_hour=5)
    dear = entry("dear")
    book = OrderBook(POOL)
    book.put_offer(cheap)
    book.put_offer(dear)
    avoided = replace(job(), avoid=(cheap.offer.provider,))
    book.add_job(avoided)
    assert [m.offer for m in book.propose(BEGIN_MS)] == [dear.offer.id]
    book.remove_offer(dear.offer.id)
    assert [m.offer for m in book.propose(BEGIN_MS)] == [cheap.offer.id]
    book.put_offer(dear)
    book.add_job(replace(job(), prefer=dear.offer.provider))
    assert [m.offer for m in book.propose(BEGIN_MS)] == [dear.offer.id]


def test_jobs_that_lost_their_machine_go_first_then_the_oldest() -> None:
    book = OrderBook(POOL)
    book.put_offer(entry("alice"))
    late, early = job(2), job(1)
    recovering = replace(job(3), state=JobState.RECOVERING)
    for each in (late, recovering, early):
        book.add_job(each)
    assert [m.job for m in book.propose(BEGIN_MS)] == [recovering.id]
    book.remove_job(recovering.id)
    assert [m.job for m in book.propose(BEGIN_MS)] == [early.id]
    book.add_job(replace(early, not_before_ms=BEGIN_MS + 1))
    assert [m.job for m in book.propose(BEGIN_MS)] == [late.id]


def test_a_batch_shares_a_machines_devices_and_never_gives_one_twice() -> None:
    book = OrderBook(POOL)
    devices = tuple(gpu(f"GPU-{n}") for n in range(4))
    book.put_offer(entry("alice", devices=devices))
    for number in range(3):
        book.add_job(job(number, devices=2 if number == 0 else 1))
    matches = book.propose(BEGIN_MS)
    given = [device for match in matches for device in match.device_ids]
    assert len(given) == len(set(given)) == 4


def test_hopeless_wishes_hope_again_when_an_offer_changes() -> None:
    book = OrderBook(POOL)
    full = replace(entry("alice"), free_device_ids=())
    book.put_offer(full)
    book.add_job(job())
    assert book.propose(BEGIN_MS) == []
    book.put_offer(entry("alice"))
    assert len(book.propose(BEGIN_MS)) == 1


def test_jobs_that_differ_in_any_wish_are_not_alike() -> None:
    asked = requirements_of(job())
    for name, resources in varied(asked.resources):
        other = replace(asked, resources=resources)
        assert alike(other) != alike(asked), f"order_book.alike leaves out {name}"
    for changed in (
        replace(asked, max_price_ucr_per_device_hour=PRICE + 1),
        replace(asked, image="train@sha256:" + "0" * 64),
        replace(asked, pinned_class="rtx4090"),
        replace(asked, avoid=("somebody",)),
    ):
        assert alike(changed) != alike(asked)
    # These are no difference to any offer, or are looked at besides.
    for same in (
        replace(asked, image="other:latest"),
        replace(asked, prefer="somebody"),
        replace(asked, renter="somebody"),
    ):
        assert alike(same) == alike(asked)


@pytest.mark.parametrize(
    ("offer", "wish"),
    [
        ({}, {"devices": 2}),
        ({}, {"device_memory_bytes": 80 * 10**9}),
        ({}, {"device_name": "H100"}),
        ({}, {"device_kind": "cpu"}),
        ({}, {"cpu_millis": 10**6}),
        ({}, {"memory_bytes": 10**15}),
        ({}, {"disk_bytes": 10**15}),
        ({}, {"egress": True}),
        ({}, {"price": PRICE - 1}),
        ({"image_policy": "digest"}, {"image": "train:latest"}),
    ],
)
def test_a_wish_that_nothing_meets_holds_up_nobody_who_asks_for_less(
    offer: dict[str, object], wish: dict[str, object]
) -> None:
    book = OrderBook(POOL)
    book.put_offer(entry("alice", **offer))
    hopeless, modest = job(1, **wish), job(2, image="train@sha256:" + "0" * 64)
    book.add_job(hopeless)
    assert book.propose(BEGIN_MS) == []
    book.add_job(modest)
    assert [m.job for m in book.propose(BEGIN_MS)] == [modest.id]


def test_a_renter_whom_no_offer_serves_holds_up_nobody_else() -> None:
    book = OrderBook(POOL)
    book.put_offer(entry("alice", accepts=(key_named("renter").party,)))
    stranger = replace(job(1), renter=key_named("stranger").party)
    book.add_job(stranger)
    assert book.propose(BEGIN_MS) == []
    book.add_job(job(2))
    assert len(book.propose(BEGIN_MS)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_same_facts_give_the_same_proposals_and_what_is_proposed_fits(seed: int) -> None:
    draw = random.Random(seed)
    entries = [
        entry(
            f"p{n}",
            price_ucr_per_device_hour=draw.randrange(1, 20),
            devices=tuple(gpu(f"GPU-{n}-{d}") for d in range(draw.randrange(1, 4))),
        )
        for n in range(30)
    ]
    jobs = [job(n, devices=draw.randrange(1, 4), price=draw.randrange(1, 20)) for n in range(60)]
    results = []
    for _ in range(2):
        book = OrderBook(POOL)
        draw.shuffle(entries)
        draw.shuffle(jobs)
        for each in entries:
            book.put_offer(each)
        for wanted in jobs:
            book.add_job(wanted)
        results.append(book.propose(BEGIN_MS))
    assert results[0] == results[1]
    offers = {each.offer.id: each for each in entries}
    facts = {wanted.id: wanted for wanted in jobs}
    for match in results[0]:
        offer = Offer.model_validate_json(offers[match.offer].offer.envelope.payload_bytes)
        assert fits(requirements_of(facts[match.job]), offer, match.device_ids) == []
