"""What S3's failures become: told apart, bounded in time, and never taken for lost content."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sublet_broker.adapters.blobs.s3_blobs import AT_ONCE, RETRIES, S3Blobs, blob_key
from sublet_broker.adapters.blobs.s3_place import (
    Credentials,
    PlaceRefused,
    S3Place,
    credentials,
    place_of,
)
from sublet_broker.service.ports import BlobMissing, BlobsAway, StorageFull
from sublet_contracts.digests import digest_of
from tests import services
from tests.stores import s3_servers
from tests.stores.s3_front import Fault, Front, front

DATA = bytes(range(256)) * 400
NAME = digest_of(DATA)
PACK = "a" * 64
SECRET = Credentials("VISIBLE-ID", "not-to-be-seen", "nor-this-token")


@pytest.fixture
def before() -> Iterator[Front]:
    with front(s3_servers.moto()) as server:
        yield server


@pytest.fixture
def blobs(before: Front) -> S3Blobs:
    place = s3_servers.new_place(before.endpoint)
    return S3Blobs(place, lambda: SECRET, small_s=1.0, large_s=1.0, pause_s=0.5)


def test_what_fails_once_is_tried_again(before: Front, blobs: S3Blobs) -> None:
    for act in (
        lambda: blobs.put(NAME, DATA),
        lambda: blobs.get(NAME),
        lambda: blobs.has(NAME),
        lambda: blobs.put_pack(PACK, [DATA]),
        lambda: blobs.read_pack(PACK, 3, 5),
        lambda: list(blobs.packs()),
        lambda: blobs.delete_pack(PACK),
    ):
        once = [Fault(503, "SlowDown")]
        with before.does(lambda method, path, once=once: once.pop() if once else None):
            act()
        assert not once


@pytest.mark.parametrize(
    "fault",
    [Fault(500), Fault(503, "SlowDown"), Fault(stall=True), Fault(cut=True)],
    ids=["500", "503", "stall", "cut"],
)
def test_a_store_that_fails_is_away_within_its_time_and_nothing_is_lost(
    before: Front, blobs: S3Blobs, fault: Fault
) -> None:
    blobs.put(NAME, DATA)
    blobs.put_pack(PACK, [DATA])
    began_s = time.monotonic()
    with before.does(lambda method, path: fault):
        with pytest.raises(BlobsAway):
            blobs.read_pack(PACK, 0, len(DATA))
        asked = len(before.asked)
        for act in (
            lambda: blobs.get(NAME),
            lambda: blobs.has(NAME),
            lambda: blobs.delete(NAME),
            lambda: blobs.put(NAME, DATA),
            lambda: blobs.has_pack(PACK),
            lambda: list(blobs.names()),
        ):
            with pytest.raises(BlobsAway):
                act()
        assert len(before.asked) == asked, "it was asked again at once"
    assert time.monotonic() - began_s < 30
    while True:
        try:
            assert blobs.get(NAME) == DATA
            break
        except BlobsAway:
            assert time.monotonic() - began_s < 60
    assert blobs.read_pack(PACK, 0, len(DATA)) == DATA


def test_a_stall_holds_few_threads(before: Front, blobs: S3Blobs) -> None:
    blobs.put(NAME, DATA)
    answers: Counter[str] = Counter()

    def ask(_: int) -> None:
        try:
            blobs.has(NAME)
            answers["there"] += 1
        except BlobsAway:
            answers["away"] += 1

    asked = len(before.asked)
    with before.does(lambda method, path: Fault(stall=True)), ThreadPoolExecutor(40) as pool:
        list(pool.map(ask, range(40)))
    assert answers == {"away": 40}
    assert len(before.asked) - asked <= AT_ONCE * (RETRIES + 1)
    # Once it answers again, all are let through.
    limit_s = time.monotonic() + 60
    while blobs.trouble():
        assert time.monotonic() < limit_s
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(ask, range(20)))
    assert answers == {"away": 40, "there": 20}


@pytest.mark.parametrize("code", ["NoSuchBucket", "NotFound"])
def test_only_what_is_said_to_be_missing_counts_as_lost(
    before: Front, blobs: S3Blobs, code: str
) -> None:
    blobs.put(NAME, DATA)
    with before.does(lambda method, path: Fault(404, code)):
        for act in (
            lambda: blobs.get(NAME),
            lambda: blobs.read_pack(PACK, 0, 1),
            lambda: blobs.put(NAME, DATA),
            lambda: list(blobs.names()),
        ):
            with pytest.raises(BlobsAway):
                act()
    assert blobs.get(NAME) == DATA


@pytest.mark.parametrize(
    "fault",
    [Fault(507, "InsufficientStorage"), Fault(403, "QuotaExceeded"), Fault(507)],
    ids=["507", "quota", "507 without a code"],
)
def test_full_is_told_apart(before: Front, blobs: S3Blobs, fault: Fault) -> None:
    with before.does(lambda method, path: fault if method == "PUT" else None):
        with pytest.raises(StorageFull):
            blobs.put(NAME, DATA)
        with pytest.raises(StorageFull):
            blobs.put_pack(PACK, [DATA])
        assert not blobs.has(NAME)
    blobs.put(NAME, DATA)


def test_a_pack_whose_answer_was_lost_is_kept(before: Front, blobs: S3Blobs) -> None:
    once = [Fault(500, after=True)]
    with before.does(lambda method, path: once.pop() if once and method == "PUT" else None):
        blobs.put_pack(PACK, [DATA])
    assert not once
    assert blobs.read_pack(PACK, 0, 1 << 20) == DATA


def test_a_pack_is_never_replaced(blobs: S3Blobs) -> None:
    blobs.put_pack(PACK, [DATA])
    with pytest.raises(BlobsAway, match="other content"):
        blobs.put_pack(PACK, [DATA, b"!"])
    assert blobs.read_pack(PACK, 0, 1 << 20) == DATA


def test_a_bit_that_flips_on_the_way_is_no_damage(before: Front, blobs: S3Blobs) -> None:
    blobs.put(NAME, DATA)
    once = [Fault(flip_received=True)]
    with before.does(lambda method, path: once.pop() if once and method == "GET" else None):
        assert blobs.get(NAME) == DATA
    with (
        before.does(lambda method, path: Fault(flip_received=method == "GET")),
        pytest.raises(BlobMissing),
    ):
        blobs.get(NAME)


def test_what_was_damaged_lies_in_quarantine(blobs: S3Blobs) -> None:
    blobs.put(NAME, DATA)
    objects = s3_servers.objects(blobs.place)
    objects.put(blob_key(NAME), b"other")
    with pytest.raises(BlobMissing):
        blobs.get(NAME)
    (found,) = [meta for page in objects.list("quarantine") for meta in page]
    assert bytes(objects.get(found["path"]).bytes()) == b"other"


def test_no_message_and_no_log_holds_the_key(
    before: Front, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    place = s3_servers.new_place(before.endpoint)
    blobs = S3Blobs(place, lambda: SECRET, small_s=1.0, large_s=1.0, pause_s=0.0)
    said = [repr(blobs.key()), repr(blobs.place)]
    for fault in (
        Fault(403, "SignatureDoesNotMatch"),
        Fault(401),
        Fault(404, "NoSuchBucket"),
        Fault(500),
    ):
        with before.does(lambda method, path, fault=fault: fault):
            for act in (blobs.prepare, lambda: blobs.put(NAME, DATA)):
                with pytest.raises((BlobsAway, PlaceRefused)) as refused:
                    act()
                said.append(str(refused.value))
    for text in [*said, caplog.text]:
        assert SECRET.secret not in text
        assert SECRET.token not in text
        assert "VISIBLE-ID" not in text


# -- a start -------------------------------------------------------------------------------------


def test_a_start_sees_that_all_works_and_leaves_nothing(blobs: S3Blobs) -> None:
    assert blobs.prepare()
    assert blobs.trouble() == ""
    assert [meta for page in s3_servers.objects(blobs.place).list() for meta in page] == []


def test_a_start_sees_that_a_store_replaces_what_is_there() -> None:
    services.require("s3rver")
    place = s3_servers.new_place(s3_servers.s3rver())
    assert not S3Blobs(place, lambda: s3_servers.KEY).prepare()


@pytest.mark.parametrize(
    ("fault", "method", "says"),
    [
        (Fault(403, "AccessDenied"), "PUT", "s3:PutObject"),
        (Fault(403, "InvalidAccessKeyId"), "", "AWS_ACCESS_KEY_ID"),
        (Fault(403, "AccessDenied"), "DELETE", "s3:DeleteObject"),
        (Fault(507), "PUT", "free some space"),
        (Fault(500), "", "500"),
        (Fault(stall=True), "", "does not answer"),
        (Fault(404, "NoSuchBucket"), "", "no such bucket"),
        (Fault(flip_received=True), "GET", "doesn't give back"),
        (Fault(200), "DELETE", "doesn't delete"),
    ],
)
def test_a_start_says_what_to_mend(
    before: Front, blobs: S3Blobs, fault: Fault, method: str, says: str
) -> None:
    with (
        before.does(lambda asked, path: fault if asked == method or not method else None),
        pytest.raises(PlaceRefused, match=says) as refused,
    ):
        blobs.prepare()
    assert "\n" not in str(refused.value)


def test_a_start_without_a_store_says_where_it_looked() -> None:
    place = s3_servers.new_place("http://127.0.0.1:9")
    blobs = S3Blobs(place, lambda: SECRET, small_s=1.0)
    with pytest.raises(PlaceRefused, match="does not answer"):
        blobs.prepare()
    assert blobs.trouble()


# -- where it is, and the key --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "environment", "place"),
    [
        (
            "s3://bucket",
            {},
            S3Place("bucket", "", "https://s3.us-east-1.amazonaws.com", "us-east-1"),
        ),
        (
            "s3://a.b-c/x/y_z/",
            {"AWS_DEFAULT_REGION": "eu-west-1"},
            S3Place("a.b-c", "x/y_z", "https://s3.eu-west-1.amazonaws.com", "eu-west-1"),
        ),
        (
            "s3://bucket/p",
            {
                "AWS_ENDPOINT_URL": "https://general",
                "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000/",
                "AWS_REGION": "auto",
                "AWS_CA_BUNDLE": "/ca.pem",
            },
            S3Place("bucket", "p", "http://127.0.0.1:9000", "auto", "/ca.pem"),
        ),
    ],
)
def test_where_it_is(url: str, environment: dict[str, str], place: S3Place) -> None:
    assert place_of(url, environment) == place


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3://",
        "s3:///x",
        "s3://B",
        "s3://ab",
        "s3://Bucket",
        "s3://bucket//x",
        "s3://bucket/../x",
        "s3://bucket/x/.y",
        "s3://bucket/x?y",
        "s3://bucket/x y",
        "s3://bucket/" + "x" * 513,
        "gs://bucket",
        "s3://key:secret@bucket",
    ],
)
def test_what_is_no_place_is_refused_with_what_one_is(url: str) -> None:
    with pytest.raises(PlaceRefused, match="--blobs"):
        place_of(url, {})


@pytest.mark.parametrize(
    "endpoint",
    [
        "127.0.0.1:9000",
        "ftp://x",
        "http://",
        "http://x/bucket",
        "http://x:0",
        "http://x:nine",
        "http://u:p@x",
        "http://x?y",
    ],
)
def test_what_is_no_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(PlaceRefused, match="AWS_ENDPOINT_URL"):
        place_of("s3://bucket", {"AWS_ENDPOINT_URL": endpoint})


def test_the_key_comes_from_the_environment_or_from_a_file_that_may_change(tmp_path: Path) -> None:
    with pytest.raises(PlaceRefused, match="AWS_SECRET_ACCESS_KEY"):
        credentials({"AWS_ACCESS_KEY_ID": "id"})
    set_ = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "t"}
    assert credentials(set_) == Credentials("id", "s", "t")

    file = tmp_path / "key"
    named = {"AWS_SHARED_CREDENTIALS_FILE": str(file), "AWS_PROFILE": "blobs"}
    with pytest.raises(PlaceRefused, match="readable"):
        credentials(named)
    for text in ("[blobs]\naws_access_key_id = a%b\n", "no section = x\n", "\xff"):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(PlaceRefused) as refused:
            credentials(named)
        assert "a%b" not in str(refused.value)
        assert refused.value.__cause__ is None
    for secret in ("one", "two%"):
        file.write_text(f"[blobs]\naws_access_key_id = id\naws_secret_access_key = {secret}\n")
        assert credentials(named) == Credentials("id", secret)
