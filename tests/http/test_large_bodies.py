"""What comes is read in large pieces, and what is said besides bodies is bounded."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import httpx
import pytest

from sublet_broker.adapters.http.large_bodies import MAX_HEAD_BYTES, LargeBodies
from sublet_contracts.digests import digest_of
from sublet_contracts.packs import PackTable
from tests.http.world import World

pytestmark = pytest.mark.asyncio


async def said(world: World, pieces: Iterator[bytes]) -> tuple[bytes, int]:
    """Send these until the broker hangs up; return its answer, and how much was taken."""
    url = httpx.URL(world.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    sent = 0
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
            if reader.at_eof():
                break
        return await reader.read(), sent
    except ConnectionError:
        return b"", sent
    finally:
        writer.close()


def endless(begin: bytes, more: bytes) -> Iterator[bytes]:
    yield begin
    for _ in range(1_000):
        yield more


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"GET /v1/broker HTTP/1.1\r\nA: ", b"x" * 64 * 1024),
        (b"GET /v1/broker HTTP/1.1\r\n", b"A: b\r\n" * 10_000),
        (b"GET /", b"x" * 64 * 1024),
        (
            b"PUT /v1/packs/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;",
            b"x" * 64 * 1024,
        ),
    ],
    ids=["a header", "headers", "a target", "a chunk's extension"],
)
async def test_what_is_said_besides_a_body_is_bounded(
    world: World, begin: bytes, more: bytes
) -> None:
    answer, sent = await said(world, endless(begin, more))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    # What lies in both sockets' buffers was sent as well, and read by nobody.
    assert sent < 20 * 1024 * 1024 + MAX_HEAD_BYTES
    assert (await world.http.get(f"{world.url}/v1/broker")).status_code == 200


async def test_a_body_in_tiny_pieces_is_taken(world: World) -> None:
    party = world.party()
    await party.introduce()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"digests": []}' + b" " * 30_000)
    headers = party.sign("POST", "/v1/blobs/missing", b'{"digests": []}' + b" " * 30_000)
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = (
        f"POST /v1/blobs/missing HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{head}"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    answer, _ = await said(world, iter([request.encode() + chunks + b"0\r\n\r\n"]))
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]


async def test_a_large_body_is_read_in_large_pieces_and_the_next_request_is_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    party = world.party()
    await party.introduce()
    sizes: list[int] = []
    now: list[int] = []
    real = LargeBodies.data_received

    def data_received(self: LargeBodies, data: bytes) -> None:
        now.append(self.transport.max_size)  # type: ignore[attr-defined]
        sizes.append(len(data))
        real(self, data)

    monkeypatch.setattr(LargeBodies, "data_received", data_received)
    content = [os.urandom(1 << 20) for _ in range(8)]
    table = PackTable(tuple((digest_of(chunk), len(chunk)) for chunk in content))
    target = f"/v1/packs/{table.name}"
    for _ in range(2):
        headers = party.sign("PUT", target, body_digest=table.name)
        body = table.to_bytes() + b"".join(content)
        answer = await world.http.put(world.url + target, content=body, headers=headers)
        assert answer.status_code == 204, answer.text
    assert sum(sizes) > 16 << 20
    usual, large = min(now), max(now)
    assert (usual, large) == (256 * 1024, 1 << 20)
    await party.get("/v1/jobs")
    assert now[-1] == usual
