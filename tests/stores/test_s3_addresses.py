"""Addresses in S3: each is good for what was signed and for nothing else.

Neither server checks such a signature: a front does so before moto's, with botocore's code.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from sublet_broker.adapters.blobs.s3_addresses import EXPIRES_S, S3Addresses
from sublet_broker.adapters.blobs.s3_blobs import S3Blobs
from sublet_broker.adapters.blobs.s3_place import Credentials, PlaceRefused, S3Place
from sublet_broker.adapters.blobs.sigv4 import presigned
from tests import services
from tests.stores import s3_servers
from tests.stores.s3_front import Fault, Front, front

DATA = b"some chunks" * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()
PACK = "a" * 64
TOKENED = Credentials("S3RVER", "S3RVER", "a+token/with=signs")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture(params=["one key", "with a token"])
def strict(request: pytest.FixtureRequest) -> Iterator[tuple[Front, S3Blobs]]:
    key = s3_servers.KEY if request.param == "one key" else TOKENED
    with front(s3_servers.moto(), key) as server:
        yield server, S3Blobs(s3_servers.new_place(server.endpoint), lambda: key)


def test_an_address_brings_the_content_once_and_nothing_else(
    strict: tuple[Front, S3Blobs],
) -> None:
    _, blobs = strict
    addresses = S3Addresses(blobs)
    url, headers = addresses.upload(PACK, len(DATA), SHA256, now_ms())

    def put(data: bytes = DATA, at: str = url, **changes: str | None) -> int:
        sent = {name: value for name, value in {**headers, **changes}.items() if value is not None}
        return httpx.put(at, content=data, headers=sent).status_code

    assert put(b"!" + DATA[1:]) == 400
    assert put(DATA[:-1], **{"content-length": str(len(DATA) - 1)}) == 403
    assert put(**{"if-none-match": None}) == 403
    assert put(**{"x-amz-checksum-sha256": None}) == 403
    assert put(**{"x-amz-acl": "public-read"}) == 403
    assert put(at=url.replace(PACK, "b" * 64)) == 403
    assert put(at=url.replace(f"Expires={EXPIRES_S}", "Expires=90000")) == 403
    assert httpx.get(url).status_code == 403
    assert httpx.delete(url).status_code == 403
    assert not blobs.has_pack(PACK)
    assert put() == 200
    assert put() == 412
    assert blobs.read_pack(PACK, 0, len(DATA) + 1) == DATA

    there = addresses.read_pack(PACK, 3, 7, now_ms())

    def read(url: str = there, asked: str = "bytes=3-9") -> httpx.Response:
        return httpx.get(url, headers={"range": asked} if asked else None)

    assert (read().status_code, read().content) == (206, DATA[3:10])
    # Others' content may lie beside it.
    for asked in ("", "bytes=0-9", "bytes=3-10", "bytes=3-", "bytes=3-9,20-30"):
        assert read(asked=asked).status_code == 403, asked
    assert httpx.put(there, content=DATA).status_code == 403
    assert read(there.replace(PACK, "b" * 64)).status_code == 403
    assert read(there.partition("?")[0]).status_code == 403


def test_an_address_expires(strict: tuple[Front, S3Blobs]) -> None:
    _, blobs = strict
    long_ago_ms = now_ms() - (EXPIRES_S + 60) * 1000
    url, headers = S3Addresses(blobs).upload(PACK, len(DATA), SHA256, long_ago_ms)
    assert httpx.put(url, content=DATA, headers=headers).status_code == 403
    assert not blobs.has_pack(PACK)


def test_s3rver_takes_an_address_until_it_expires() -> None:
    services.require("s3rver")
    blobs = S3Blobs(s3_servers.new_place(s3_servers.s3rver()), lambda: s3_servers.KEY)
    addresses = S3Addresses(blobs)
    late_ms = now_ms() - (EXPIRES_S + 60) * 1000
    late, headers = addresses.upload(PACK, len(DATA), SHA256, late_ms)
    assert httpx.put(late, content=DATA, headers=headers).status_code == 403
    url, headers = addresses.upload(PACK, len(DATA), SHA256, now_ms())
    assert httpx.put(url, content=DATA, headers=headers).status_code == 200
    part = {"range": "bytes=3-9"}
    there = addresses.read_pack(PACK, 3, 7, now_ms())
    assert httpx.get(there, headers=part).content == DATA[3:10]
    assert httpx.get(addresses.read_pack(PACK, 3, 7, late_ms), headers=part).status_code == 403


def test_the_signature_of_amazons_own_example() -> None:
    """Authenticating Requests: Using Query Parameters, in the S3 API reference."""
    place = S3Place("", "", "https://examplebucket.s3.amazonaws.com", "us-east-1")
    key = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    moment_ms = 1_369_353_600_000  # 20130524T000000Z
    url = presigned("GET", place, "test.txt", key, now_ms=moment_ms, expires_s=86_400, headers={})
    assert url.endswith(
        "X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
    )


# -- whether a store keeps to it -----------------------------------------------------------------


def test_a_store_that_keeps_to_what_is_signed_is_used(strict: tuple[Front, S3Blobs]) -> None:
    _, blobs = strict
    assert S3Addresses(blobs).why_not(now_ms()) == ""
    assert [meta for page in s3_servers.objects(blobs.place).list() for meta in page] == []


@pytest.mark.parametrize(
    ("server", "says"),
    [(s3_servers.moto, "other bytes"), (s3_servers.s3rver, "other bytes")],
    ids=["moto", "s3rver"],
)
def test_one_that_does_not_is_told_apart(server: Callable[[], str], says: str) -> None:
    if server is s3_servers.s3rver:
        services.require("s3rver")
    blobs = S3Blobs(s3_servers.new_place(server()), lambda: s3_servers.KEY)
    assert says in S3Addresses(blobs).why_not(now_ms())
    assert [meta for page in s3_servers.objects(blobs.place).list() for meta in page] == []


@pytest.mark.parametrize(
    ("fault", "method", "says"),
    [
        (Fault(403, "AccessDenied"), "PUT", "refuses an upload"),
        (Fault(drop=("if-none-match",)), "PUT", "replaces"),
        (Fault(drop=("range",)), "GET", "parts"),
    ],
)
def test_what_a_store_does_not_keep_is_named(
    strict: tuple[Front, S3Blobs], fault: Fault, method: str, says: str
) -> None:
    server, blobs = strict
    with server.does(lambda asked, path: fault if asked == method else None):
        assert says in S3Addresses(blobs).why_not(now_ms())


def test_a_store_that_is_away_ends_the_trial(strict: tuple[Front, S3Blobs]) -> None:
    server, blobs = strict
    with (
        server.does(lambda method, path: Fault(500) if method == "DELETE" else None),
        pytest.raises(PlaceRefused),
    ):
        S3Addresses(blobs).why_not(now_ms())
