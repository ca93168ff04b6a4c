"""What a mover of content believes of its broker's addresses, and what it refuses."""

from __future__ import annotations

import json

import pytest

from sublet_contracts.addresses import (
    TYPE,
    AddressRefused,
    ReadAddress,
    ReadAddresses,
    Run,
    UploadAddress,
    check_url,
    read_runs,
    read_upload,
    signed,
)
from sublet_contracts.encoding import canonical_json
from sublet_contracts.envelope import sign_payload
from sublet_contracts.keys import SigningKey

BROKER = SigningKey.generate()
OTHER = SigningKey.generate()
HTTPS = "https://broker.example"
UPLOAD = UploadAddress(
    name="a table's",
    pack="a" * 64,
    url="https://store.example/bucket/packs/a?X=1",
    headers={"if-none-match": "*", "content-length": "5", "x-amz-checksum-sha256": "abc="},
)
ONE, TWO = "https://store.example/one", "https://store.example/two"
READ = ReadAddresses(
    reads=(
        ReadAddress(url=ONE, offset_bytes=10, chunks=2),
        ReadAddress(url=TWO, offset_bytes=16, chunks=1),
        ReadAddress(url=ONE, offset_bytes=16, chunks=1),
        ReadAddress(url=ONE, offset_bytes=16, chunks=1),
    ),
)


def uploaded(data: bytes, **changes: str) -> UploadAddress:
    given = {"broker": BROKER.party, "broker_url": HTTPS, "name": UPLOAD.name} | changes
    return read_upload(data, **given)


def test_an_address_comes_back_as_it_was_signed() -> None:
    assert uploaded(signed(UPLOAD, BROKER)) == UPLOAD


def test_what_lies_in_a_row_is_asked_for_at_once() -> None:
    data = signed(READ, BROKER)
    sizes = [5, 1, 2, 2, 2]
    assert read_runs(data, broker=BROKER.party, broker_url=HTTPS, sizes=sizes) == [
        Run(ONE, 10, 6, range(2)),
        Run(TWO, 16, 2, range(2, 3)),
        Run(ONE, 16, 2, range(3, 4)),
        Run(ONE, 16, 2, range(4, 5)),
    ]
    assert Run("", 10, 6, range(2)).range_header == "bytes=10-15"
    for wrong in ([], [5, 1, 2, 2], [5, 1, 2, 2, 2, 2]):
        with pytest.raises(AddressRefused, match="other chunks"):
            read_runs(data, broker=BROKER.party, broker_url=HTTPS, sizes=wrong)


def test_only_this_brokers_own_signature_counts() -> None:
    payload = canonical_json(UPLOAD.model_dump(mode="json"))
    both = sign_payload(TYPE, payload, [BROKER, OTHER]).model_dump_json().encode()
    other_type = TYPE.replace("addresses", "receipt")
    told_apart = sign_payload(other_type, payload, [BROKER]).model_dump_json().encode()
    forged = json.loads(signed(UPLOAD, OTHER))
    forged["signatures"][0]["keyid"] = BROKER.party
    altered = json.loads(signed(UPLOAD, BROKER))
    altered["payload"] = json.loads(signed(UPLOAD.model_copy(update={"url": HTTPS}), BROKER))[
        "payload"
    ]
    for data in (
        signed(UPLOAD, OTHER),
        both,
        told_apart,
        json.dumps(forged).encode(),
        json.dumps(altered).encode(),
    ):
        with pytest.raises(AddressRefused, match="not signed"):
            uploaded(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"\xff" * 10,
        b"x" * 100_000,
        signed(READ, BROKER),
        sign_payload(TYPE, b'{"url":1}', [BROKER]).model_dump_json().encode(),
    ],
    ids=["empty", "no envelope", "no text", "too long", "another kind", "no address"],
)
def test_what_is_no_answer_is_refused(data: bytes) -> None:
    with pytest.raises(AddressRefused):
        uploaded(data)


def test_an_address_for_another_pack_or_with_other_headers_is_refused() -> None:
    with pytest.raises(AddressRefused, match="another pack"):
        uploaded(signed(UPLOAD, BROKER), name="another")
    for header in ({"authorization": "x"}, {"host": "x"}, {"x-amz-a": "b\r\nc: d"}):
        with pytest.raises(AddressRefused, match="header"):
            uploaded(signed(UPLOAD.model_copy(update={"headers": header}), BROKER))


@pytest.mark.parametrize(
    ("url", "broker"),
    [
        ("https://store.example/x", HTTPS),
        ("https://store.example:9000/x?y=z", "http://broker.example"),
        ("http://store.example/x", "http://broker.example"),
        ("http://127.0.0.1:9000/x", "http://127.0.0.1:8470"),
        ("http://localhost:9000/x", "http://127.0.0.1:8470"),
        ("https://10.1.2.3/x", HTTPS),
        ("https://[2001:db8::1]/x", HTTPS),
    ],
)
def test_hosts_that_a_broker_may_name(url: str, broker: str) -> None:
    check_url(url, broker)


@pytest.mark.parametrize(
    ("url", "broker"),
    [
        ("http://store.example/x", HTTPS),
        ("ftp://store.example/x", "ftp://broker.example"),
        ("file:///etc/passwd", HTTPS),
        ("//store.example/x", HTTPS),
        ("", HTTPS),
        ("https://", HTTPS),
        ("https://user@store.example/", HTTPS),
        ("https://store.example/\r\nx", HTTPS),
        ("https://store.example:0/", HTTPS),
        ("https://store.example:x/", HTTPS),
        ("https://127.0.0.1/x", HTTPS),
        ("https://127.1/x", HTTPS),
        ("https://2130706433/x", HTTPS),
        ("https://0x7f000001/x", HTTPS),
        ("https://0177.0.0.1/x", HTTPS),
        ("https://0.0.0.0/x", HTTPS),
        ("https://[::1]/x", HTTPS),
        ("https://[::]/x", HTTPS),
        ("https://[::ffff:127.0.0.1]/x", HTTPS),
        ("https://LOCALHOST./x", HTTPS),
        ("https://127.0.0.1./x", HTTPS),
        ("https://x.localhost/x", HTTPS),
        ("http://169.254.169.254/latest", "http://127.0.0.1:8470"),
        ("https://[fe80::1]/x", HTTPS),
        ("https://[::ffff:169.254.169.254]/x", HTTPS),
    ],
)
def test_hosts_that_no_broker_needs_are_refused(url: str, broker: str) -> None:
    with pytest.raises(AddressRefused):
        check_url(url, broker)
