"""Only authentic requests are served, and each of them once."""

from __future__ import annotations

import pytest

from sublet_contracts.documents import Deposit, KeyDocument
from tests.http.world import World, nonce, signed_body


async def test_unsigned_is_refused_with_the_header_that_is_missing(world: World) -> None:
    answer = await world.http.get(world.url + "/v1/balance")
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"].startswith("Sublet")
    problem = answer.json()
    assert problem["field"] == "Sublet-Party"
    assert problem["status"] == 401
    assert (problem["code"], problem["title"]) == ("not_authentic", "Not authentic")


async def test_a_signed_request_is_served(world: World) -> None:
    party = world.party()
    await party.introduce()
    answer = await party.get("/v1/balance")
    assert answer.status_code == 200
    assert answer.json()["party"] == party.id


@pytest.mark.parametrize(
    ("part", "value", "field"),
    [
        ("target", "/v1/earnings", "Sublet-Signature"),
        ("method", "POST", "Sublet-Signature"),
        ("body", b"x", "Sublet-Signature"),
        ("idempotency_key", "k", "Sublet-Signature"),
        ("broker", "ed25519-" + "1" * 64, "Sublet-Signature"),
        ("nonce", "short", "Sublet-Nonce"),
        ("time_ms", 1, "Sublet-Time-Ms"),
    ],
)
async def test_tampered_is_refused(world: World, part: str, value: object, field: str) -> None:
    party = world.party()
    await party.introduce()
    headers = party.sign("GET", "/v1/balance", **{part: value})
    headers.pop("Idempotency-Key", None)
    answer = await world.http.get(world.url + "/v1/balance", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["field"] == field


async def test_a_query_is_part_of_what_is_signed(world: World) -> None:
    party = world.party()
    await party.introduce()
    headers = party.sign("GET", "/v1/jobs?limit=5")
    answer = await world.http.get(world.url + "/v1/jobs?limit=6", headers=headers)
    assert answer.status_code == 401
    headers = party.sign("GET", "/v1/jobs?limit=5")
    answer = await world.http.get(world.url + "/v1/jobs?limit=5", headers=headers)
    assert answer.status_code == 200


async def test_a_clock_that_is_off_is_named(world: World) -> None:
    party = world.party()
    headers = party.sign("GET", "/v1/balance", time_ms=world.clock.now_ms() + 600_000)
    answer = await world.http.get(world.url + "/v1/balance", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["code"] == "clock"
    assert "clock" in answer.json()["detail"]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_replay_is_refused(world: World, method: str) -> None:
    party = world.party()
    await party.introduce()
    target, body = "/v1/balance", b""
    if method == "POST":
        target, body = "/v1/blobs/missing", b'{"digests": []}'
    headers = party.sign(method, target, body)
    statuses = []
    for _ in range(2):
        answer = await world.http.request(method, world.url + target, content=body, headers=headers)
        statuses.append(answer.status_code)
    assert statuses == [200, 409]
    assert answer.json()["code"] == "replayed"


async def test_idempotency(world: World) -> None:
    renter = await world.renter()
    target = "/v1/jobs?wait=true"
    body = signed_body(renter.job(), renter.key)
    first = await renter.call("POST", target, body, key="once")
    again = await renter.call("POST", target, body, key="once")
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    other = await renter.call("POST", target, signed_body(renter.job(), renter.key), key="once")
    assert other.status_code == 409
    assert other.json()["field"] == "Idempotency-Key"
    jobs = (await renter.get("/v1/jobs")).json()["jobs"]
    assert len(jobs) == 1


async def test_a_refused_request_may_be_sent_again_with_its_key(world: World) -> None:
    """Nothing was done, so its key isn't used up: after a deposit the same request succeeds."""
    renter = world.party()
    await renter.introduce()
    body = signed_body(renter.job(), renter.key)
    poor = await renter.call("POST", "/v1/jobs?wait=true", body, key="k")
    assert 400 <= poor.status_code < 500, poor.text
    assert "budget" in poor.json()["field"] or "balance" in poor.json()["code"]


async def test_somebody_elses_document_is_refused(world: World) -> None:
    renter, other = await world.renter(), await world.renter()
    answer = await other.post("/v1/jobs", renter.job(), signer=renter.key)
    assert answer.status_code in (403, 422)
    jobs = (await renter.get("/v1/jobs")).json()["jobs"]
    assert jobs == []


async def test_only_the_operator_deposits(world: World) -> None:
    renter = await world.renter(credits=3)
    before = (await renter.get("/v1/balance")).json()["available_ucr"]
    grab = Deposit(
        broker=world.id,
        party=renter.id,
        amount_ucr=10**9,
        memo="mine",
        nonce=nonce(),
        issued_ms=world.clock.now_ms(),
    )
    answer = await renter.post("/v1/deposits", grab)
    assert answer.status_code == 403
    assert (await renter.get("/v1/balance")).json()["available_ucr"] == before


async def test_small_order_keys_are_refused(world: World) -> None:
    weak = "ed25519-" + "01" + "00" * 31
    headers = world.party().sign("GET", "/v1/balance") | {"Sublet-Party": weak}
    answer = await world.http.get(world.url + "/v1/balance", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["field"] == "Sublet-Party"


async def test_a_document_for_another_broker_is_refused(world: World) -> None:
    party = world.party()
    document = KeyDocument(
        party=party.id, broker="ed25519-" + "2" * 64, name="x", issued_ms=world.clock.now_ms()
    )
    answer = await party.post("/v1/keys", document)
    assert answer.status_code == 422
    assert answer.json()["field"] == "broker"
