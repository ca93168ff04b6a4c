"""Packs over HTTP: checked as they come, refused with a name, bounded before they are read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from sublet_broker.adapters.http.pack_room import PackRoom
from sublet_contracts.digests import digest_of
from sublet_contracts.packs import MAX_BODY_BYTES, PackTable
from tests.http.world import Party, World

pytestmark = pytest.mark.asyncio


def sha(data: bytes) -> str:
    return digest_of(data)


def table_of(*chunks: bytes) -> PackTable:
    return PackTable(tuple((sha(chunk), len(chunk)) for chunk in chunks))


CHUNKS = (b"one" * 100_000, b"two", b"three" * 200_000)
TABLE = table_of(*CHUNKS)
BODY = TABLE.to_bytes() + b"".join(CHUNKS)


async def send(
    party: Party, body: bytes = BODY, *, name: str = TABLE.name, signed: str = "", **headers: str
) -> httpx.Response:
    target = f"/v1/packs/{name}"
    sign = party.sign("PUT", target, body_digest=signed or name)
    return await party.world.http.put(
        party.world.url + target, content=body, headers=sign | headers
    )


async def missing(party: Party, *chunks: bytes) -> list[str]:
    body = json.dumps({"digests": [sha(chunk) for chunk in chunks]}).encode()
    found: list[str] = (await party.call("POST", "/v1/blobs/missing", body)).json()["missing"]
    return found


async def test_a_pack_is_kept_whole(world: World) -> None:
    party = world.party()
    await party.introduce()
    for _ in range(2):
        answer = await send(party)
        assert answer.status_code == 204, answer.text
    assert await missing(party, *CHUNKS) == []
    other = world.party()
    await other.introduce()
    assert await missing(other, *CHUNKS) == [sha(chunk) for chunk in CHUNKS]
    assert (await send(other)).status_code == 204


async def test_a_chunk_that_differs_is_named_and_nothing_is_kept(world: World) -> None:
    party = world.party()
    await party.introduce()
    at = BODY.index(b"two")
    answer = await send(party, BODY[:at] + b"TWO" + BODY[at + 3 :])
    assert answer.status_code == 422
    assert answer.json()["code"] == "hash_mismatch"
    assert answer.json()["facts"] == {"digest": sha(b"two")}
    assert len(await missing(party, *CHUNKS)) == 3
    assert list(world.blobs.packs()) == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (BODY[:-1], "shorter"),
        (BODY + b"!", "longer"),
        (TABLE.to_bytes()[:20], "shorter"),
        (b"GIF89a" + BODY, "doesn't begin"),
        (table_of(b"x").to_bytes() + b"x", "name"),
    ],
    ids=["short", "long", "half a table", "no pack", "another table"],
)
async def test_a_pack_that_is_none_is_refused(world: World, body: bytes, says: str) -> None:
    party = world.party()
    await party.introduce()
    answer = await send(party, body)
    assert answer.status_code == 400
    assert answer.json()["code"] == "malformed"
    assert says in answer.json()["detail"]
    assert list(world.blobs.packs()) == []


async def test_the_signature_covers_the_pack(world: World) -> None:
    party = world.party()
    await party.introduce()
    answer = await send(party, signed=sha(b"another"))
    assert answer.status_code == 401
    unsigned = await world.http.put(f"{world.url}/v1/packs/{TABLE.name}", content=BODY)
    assert unsigned.status_code == 401
    assert list(world.blobs.packs()) == []


async def test_who_has_no_right_is_refused_and_reads_why(world: World) -> None:
    stranger = world.party()
    answer = await send(stranger)
    assert answer.status_code == 403
    assert answer.json()["code"] == "unknown_party"
    await stranger.introduce()
    target = f"/v1/jobs/{'0' * 64}/packs/{TABLE.name}"
    headers = stranger.sign("PUT", target, body_digest=TABLE.name)
    refused = await world.http.put(world.url + target, content=BODY, headers=headers)
    assert refused.status_code == 404


async def test_one_that_is_too_long_is_not_read(world: World) -> None:
    party = world.party()
    await party.introduce()
    answer = await send(party, bytes(MAX_BODY_BYTES + 1))
    assert answer.status_code == 413
    assert answer.json()["facts"]["limit_bytes"] == MAX_BODY_BYTES


async def test_one_that_does_not_say_how_long_it_is_is_refused(world: World) -> None:
    party = world.party()
    await party.introduce()
    target = f"/v1/packs/{TABLE.name}"

    async def in_pieces() -> AsyncIterator[bytes]:
        yield BODY

    headers = party.sign("PUT", target, body_digest=TABLE.name)
    answer = await world.http.put(world.url + target, content=in_pieces(), headers=headers)
    assert answer.status_code == 400
    assert answer.json()["field"] == "Content-Length"


async def test_a_replayed_pack_is_refused(world: World) -> None:
    party = world.party()
    await party.introduce()
    target = f"/v1/packs/{TABLE.name}"
    headers = party.sign("PUT", target, body_digest=TABLE.name)
    statuses = [
        (await world.http.put(world.url + target, content=BODY, headers=headers)).status_code
        for _ in range(2)
    ]
    assert statuses == [204, 409]


async def test_many_at_once(world: World) -> None:
    party = world.party()
    await party.introduce()
    packs = [(bytes([n]) * 700_000, bytes([n, 1]) * 500_000) for n in range(12)]
    answers = await asyncio.gather(
        *(
            send(party, table.to_bytes() + b"".join(chunks), name=table.name)
            for chunks in packs
            for table in [table_of(*chunks)]
        )
    )
    assert {answer.status_code for answer in answers} == {204}
    assert await missing(party, *(chunk for chunks in packs for chunk in chunks)) == []


async def test_the_room_is_bounded_for_all_and_for_each() -> None:
    room = PackRoom(room_bytes=100, party_bytes=60)
    order: list[str] = []
    leave = {name: asyncio.Event() for name in ("a1", "a2", "b1", "c1")}

    async def enter(name: str, size_bytes: int) -> None:
        async with room.hold(name[0], size_bytes):
            order.append(name)
            await leave[name].wait()

    async def settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    tasks = [
        asyncio.create_task(enter(name, size))
        for name, size in (("a1", 40), ("a2", 40), ("b1", 50), ("c1", 30))
    ]
    await settle()
    assert order == ["a1", "b1"]  # a2 is over its party's bound, c1 over all of them
    leave["b1"].set()
    await settle()
    assert order == ["a1", "b1", "c1"]
    leave["a1"].set()
    await settle()
    assert order == ["a1", "b1", "c1", "a2"]
    for event in leave.values():
        event.set()
    await asyncio.gather(*tasks)


async def test_who_waits_for_room_may_give_up() -> None:
    room = PackRoom(room_bytes=10, party_bytes=10)
    async with room.hold("a", 10):
        waiting = asyncio.create_task(room.hold("b", 10).__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    async with room.hold("b", 10):
        pass
