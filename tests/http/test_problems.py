"""Every error is problem+json with a code, its facts and the field; memory stays bounded."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import urlsplit

import pytest

from sublet_broker.adapters.http.edge import Probe
from sublet_broker.adapters.http.problems import STATUS
from sublet_broker.service.ports import StorageFull, StoreAway
from sublet_contracts.api import Problem
from sublet_contracts.digests import digest_of
from sublet_contracts.problems import PROBLEMS, ProblemCode
from tests.http.world import World, running, signed_body, until

ABSENT = "blake3:" + "0" * 64


async def test_unknown_address_and_method(world: World) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("DELETE", "/v1/offers", 405)):
        answer = await world.http.request(method, world.url + path)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
        problem = Problem.model_validate_json(answer.content)
        assert problem.code in set(ProblemCode)
        assert path in problem.detail
        assert "fix" not in answer.json()  # What to do about it is the client's to say.


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"not json", 400, "body"),
        (b'{"envelope": 1}', 422, "envelope"),
        (b'{"envelope": {"a": 1}, "envelope": {}}', 400, "body"),
        (b"{}", 422, "envelope"),
        (b'{"more": 1}', 422, "envelope"),
        (b"\xff", 400, "body"),
        (b"[" * 5000, 400, "body"),
    ],
)
async def test_malformed_bodies(world: World, body: bytes, status: int, field: str) -> None:
    party = world.party()
    answer = await party.call("POST", "/v1/keys", body)
    assert answer.status_code == status, answer.text
    assert answer.json()["field"].startswith(field)


async def test_queries_and_paths_are_validated(world: World) -> None:
    party = world.party()
    await party.introduce()
    answer = await party.get("/v1/jobs?limit=0")
    assert (answer.status_code, answer.json()["field"]) == (422, "limit")
    answer = await party.get("/v1/jobs?state=sleeping")
    assert (answer.status_code, answer.json()["field"]) == (422, "state")
    answer = await party.get("/v1/jobs/nothing-of-that-name")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_a_body_over_the_limit_is_refused_by_its_header_alone(world: World) -> None:
    """The declared length is enough: the server answers before any of the body is sent."""
    party = world.party()
    where = urlsplit(world.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    signed = party.sign("POST", "/v1/keys")
    head = "".join(f"{name}: {value}\r\n" for name, value in signed.items())
    writer.write(
        f"POST /v1/keys HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n{head}\r\n".encode()
    )
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 10)
    assert b" 413 " in answer
    writer.close()


async def test_a_body_without_a_length_is_cut_off(world: World) -> None:
    party = world.party()

    async def endless():  # type: ignore[no-untyped-def]
        for _ in range(64):
            yield b"x" * 65536

    answer = await world.http.post(
        world.url + "/v1/keys", content=endless(), headers=party.sign("POST", "/v1/keys")
    )
    assert answer.status_code == 413
    assert answer.json()["field"] == "body"


async def test_a_blob_that_differs_from_its_name(world: World) -> None:
    party = world.party()
    await party.introduce()
    data = b"as it was when it was read"
    sha = digest_of(data)
    target = f"/v1/blobs/{sha}"
    headers = party.sign("PUT", target, data)
    changed = await world.http.put(world.url + target, content=b"changed", headers=headers)
    assert changed.status_code == 422
    assert changed.json()["code"] == "hash_mismatch"
    assert changed.json()["facts"] == {"digest": sha}
    stored = await party.call("PUT", target, data)
    assert stored.status_code == 204
    body = json.dumps({"digests": [sha, ABSENT]}).encode()
    missing = await party.call("POST", "/v1/blobs/missing", body)
    assert missing.json() == {"missing": [ABSENT], "by_address": False}
    # Nobody else learns that the broker has it.
    other = world.party()
    await other.introduce()
    theirs = await other.call("POST", "/v1/blobs/missing", body)
    assert theirs.json() == {"missing": [sha, ABSENT], "by_address": False}


async def test_an_unsigned_upload_is_refused_before_its_body(world: World) -> None:
    answer = await world.http.put(world.url + "/v1/blobs/" + ABSENT, content=b"x" * 10_000_000)
    assert answer.status_code == 401


async def test_a_blob_over_the_limit(world: World) -> None:
    party = world.party()
    await party.introduce()
    data = b"\0" * (16 * 1024**2 + 1)
    answer = await party.call("PUT", "/v1/blobs/" + digest_of(data), data)
    assert answer.status_code == 413
    data = data[:-1]
    answer = await party.call("PUT", "/v1/blobs/" + digest_of(data), data)
    assert answer.status_code == 204


async def test_a_full_disk_loses_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    party = world.party()
    await party.introduce()

    def full(_sha256: str, _data: bytes) -> None:
        raise StorageFull("full")

    sha = digest_of(b"data")
    with monkeypatch.context() as patch:
        patch.setattr(world.blobs, "put", full)
        answer = await party.call("PUT", f"/v1/blobs/{sha}", b"data")
        assert answer.status_code == 507
        assert answer.json()["code"] == "storage_full"
    assert (await party.call("PUT", f"/v1/blobs/{sha}", b"data")).status_code == 204


async def test_a_database_that_is_away_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    party = world.party()
    await party.introduce()

    def away(*_args: object) -> None:
        raise StoreAway("away")

    with monkeypatch.context() as patch:
        patch.setattr(world.broker.money, "balance", away)
        answer = await party.get("/v1/balance")
        assert (answer.status_code, answer.json()["code"]) == (503, "database_away")
        assert answer.headers["Retry-After"]
    assert (await party.get("/v1/balance")).status_code == 200


async def test_our_own_mistakes_tell_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    party = world.party()
    await party.introduce()

    def broken(*_args: object) -> None:
        raise KeyError("/etc/secret")

    monkeypatch.setattr(world.broker.money, "balance", broken)
    answer = await party.get("/v1/balance")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["code"] == "internal"


async def test_no_machine_fits_names_the_constraint(world: World) -> None:
    renter = await world.renter()
    answer = await renter.post("/v1/jobs?wait=false", renter.job())
    assert answer.status_code == 422
    assert answer.json()["code"] == "no_match"
    facts = {"considered": 0, "failures": {}, "shortfalls": [], "waiting": 0}
    assert answer.json()["facts"] == facts


async def test_budget_over_the_balance(world: World) -> None:
    renter = await world.renter(credits=1)
    job = renter.job(budget_ucr=50_000_000)
    answer = await renter.call("POST", "/v1/jobs?wait=true", signed_body(job, renter.key))
    assert answer.status_code in (402, 422)
    assert answer.json()["field"] == "budget_ucr"


async def test_health_readiness_metrics_and_docs(world: World) -> None:
    http = world.http
    assert (await http.get(world.url + "/healthz")).json() == {"status": "ok"}
    ready = await http.get(world.url + "/readyz")
    assert ready.status_code == 200
    assert ready.json()["checks"]["loop scheduling"] == "ok"
    metrics = (await http.get(world.url + "/metrics")).text
    for name in ("sublet_jobs{", "sublet_job_queue_wait_seconds_count", "sublet_ledger_"):
        assert name in metrics
    document = (await http.get(world.url + "/openapi.json")).json()
    assert "/v1/jobs/{job}/logs" in document["paths"]
    page = await http.get(world.url + "/docs")
    assert "<script" not in page.text
    for tag in document["tags"]:
        assert f"<h2>{tag['name']}</h2>" in page.text


async def test_openapi_is_complete(world: World) -> None:
    document = (await world.http.get(world.url + "/openapi.json")).json()
    for code, kind in PROBLEMS.items():
        facts = ", ".join(f"`{name}`" for name in kind.facts)
        row = f"| `{code}` | {STATUS[code]} | {kind.title} | {facts} |\n"
        assert row in document["info"]["description"]
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    for chunk in text.split('"#/components/schemas/')[1:]:
        assert chunk.split('"')[0] in schemas
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            assert call["summary"], (method, path)
            assert call["description"], (method, path)
            if path.startswith("/v1") and path != "/v1/broker":
                assert call["security"], (method, path)
                assert "401" in call["responses"], (method, path)


async def test_not_ready_says_what_is_missing() -> None:
    probes = (Probe("blobs", lambda: "can't be written"), Probe("matcher", lambda: "away", False))
    async with running(probes) as world:
        answer = await world.http.get(world.url + "/readyz")
    assert answer.status_code == 503
    assert answer.json()["status"] == "not ready"
    assert answer.json()["checks"]["blobs"] == "can't be written"


async def test_ready_without_the_matcher() -> None:
    async with running((Probe("matcher", lambda: "away", needed=False),)) as world:
        answer = await world.http.get(world.url + "/readyz")
    assert answer.status_code == 200
    assert answer.json()["checks"]["matcher"] == "away"


async def test_a_failing_loop_goes_on_and_is_seen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = world.edge.loops.all["settling"]
    good, failed, worked = loop.work, asyncio.Event(), asyncio.Event()
    running_loop = asyncio.get_running_loop()

    def bad() -> int:
        running_loop.call_soon_threadsafe(failed.set)
        raise ZeroDivisionError

    def fine() -> int | None:
        running_loop.call_soon_threadsafe(worked.set)
        return good()

    monkeypatch.setattr(loop, "work", bad)
    world.edge.loops.wake("settling")
    await asyncio.wait_for(failed.wait(), 10)
    await until(lambda: bool(loop.error))
    answer = await world.http.get(world.url + "/readyz")
    assert answer.status_code == 503
    assert "ZeroDivisionError" in answer.json()["checks"]["loop settling"]
    monkeypatch.setattr(loop, "work", fine)
    world.edge.loops.wake("settling")
    await asyncio.wait_for(worked.wait(), 10)
    await until(lambda: not loop.error)
    assert loop.failures >= 1
