"""The documents byte for byte. What is computed here is computed without the code under test."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from sublet_contracts import merkle
from sublet_contracts.auth import REQUEST_TYPE, RequestRefused, authenticate, sign_request
from sublet_contracts.documents import (
    DOCUMENTS,
    Document,
    DocumentRefused,
    author,
    check_time,
    open_document,
    read_document,
    refused_by_validation,
    sign_document,
)
from sublet_contracts.envelope import Envelope, SignatureRefused, document_id
from sublet_contracts.keys import KeyRefused, SigningKey, public_key, verify
from sublet_contracts.session import SessionProof

VECTORS = Path(__file__).parent / "vectors"
ALL_KINDS: tuple[type[Document], ...] = (*DOCUMENTS, SessionProof)
KINDS = {kind.KIND: kind for kind in ALL_KINDS}
P = 2**255 - 19


def load(name: str) -> Any:
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


DOCUMENT_VECTORS = load("documents")
KEYS = {
    name: SigningKey.from_seed(bytes.fromhex(k["seed"]))
    for name, k in DOCUMENT_VECTORS["keys"].items()
}
HOSTILE = load("hostile")
REQUESTS = load("requests")
TREES = load("merkle")


def dsse(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding, from its specification."""
    kind = payload_type.encode()
    return b" ".join(
        (b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload)
    )


# Documents


def test_there_is_a_vector_for_every_kind() -> None:
    assert {vector["kind"] for vector in DOCUMENT_VECTORS["documents"]} == set(KINDS)


@pytest.mark.parametrize("vector", DOCUMENT_VECTORS["documents"], ids=lambda v: str(v["kind"]))
def test_a_document_is_the_same_bytes_as_ever(vector: Mapping[str, Any]) -> None:
    kind = KINDS[vector["kind"]]
    payload = vector["payload"].encode()
    envelope = Envelope.model_validate_json(json.dumps(vector["envelope"]))
    keys = [KEYS[name] for name in vector["signers"]]

    assert kind.payload_type() == vector["payload_type"] == envelope.payloadType
    assert envelope.payload_bytes == payload
    message = dsse(vector["payload_type"], payload)
    assert hashlib.sha256(message).hexdigest() == vector["id"] == envelope.id
    for name, signature in zip(vector["signers"], envelope.signatures, strict=True):
        private = Ed25519PrivateKey.from_private_bytes(
            bytes.fromhex(DOCUMENT_VECTORS["keys"][name]["seed"])
        )
        assert signature.keyid == "ed25519-" + private.public_key().public_bytes_raw().hex()
        assert base64.b64decode(signature.sig) == private.sign(message)

    document = read_document(envelope, kind)
    assert author(document) == keys[0].party
    made = sign_document(document, *keys)
    assert made.envelope == envelope
    assert made.id == vector["id"]


@pytest.mark.parametrize("vector", DOCUMENT_VECTORS["documents"], ids=lambda v: str(v["kind"]))
def test_no_bit_of_a_document_can_be_changed(vector: Mapping[str, Any]) -> None:
    envelope = Envelope.model_validate_json(json.dumps(vector["envelope"]))
    payload = envelope.payload_bytes
    for position in range(0, len(payload), 37):
        changed = bytearray(payload)
        changed[position] ^= 1
        other = envelope.model_dump() | {"payload": base64.b64encode(changed).decode()}
        with pytest.raises(DocumentRefused, match="does not match the document"):
            read_document(Envelope.model_validate(other), KINDS[vector["kind"]])


def test_a_party_is_its_public_key() -> None:
    for name, key in DOCUMENT_VECTORS["keys"].items():
        assert KEYS[name].party == key["party"]


# What must be refused


@pytest.mark.parametrize("case", HOSTILE["cases"], ids=lambda c: str(c["name"]))
def test_a_hostile_document_is_refused(case: Mapping[str, Any]) -> None:
    kind = KINDS[case["kind"]]
    text = json.dumps(case["envelope"])
    if case["stage"] == "envelope":
        with pytest.raises(ValidationError) as parsing:
            Envelope.model_validate_json(text)
        refused = refused_by_validation(parsing.value)
    else:
        envelope = Envelope.model_validate_json(text)
        with pytest.raises(DocumentRefused) as reading:
            read_document(envelope, kind)
        refused = reading.value
    assert refused.field == case["field"]
    assert case["error"] in str(refused)


def vector_of(kind: str) -> Envelope:
    (found,) = (v for v in DOCUMENT_VECTORS["documents"] if v["kind"] == kind)
    return Envelope.model_validate_json(json.dumps(found["envelope"]))


def test_a_missing_countersignature_is_named() -> None:
    lease = vector_of("lease")
    broker, provider = (KEYS[name].party for name in ("broker", "provider"))
    open_document(lease, KINDS["lease"], signed_by=(broker, provider))
    alone = lease.model_copy(update={"signatures": lease.signatures[:1]})
    with pytest.raises(DocumentRefused, match=f"not signed by {provider[8:18]}") as refused:
        read_document(alone, KINDS["lease"], signed_by=(broker, provider))
    assert refused.value.field == "signatures"


def test_the_countersigner_alone_does_not_make_a_document() -> None:
    lease = vector_of("lease")
    provider_only = lease.model_copy(update={"signatures": lease.signatures[1:]})
    with pytest.raises(DocumentRefused, match="not signed by the broker"):
        read_document(provider_only, KINDS["lease"])


def test_a_false_signature_beside_those_asked_for_is_refused() -> None:
    lease = vector_of("lease")
    broker, provider = (KEYS[name].party for name in ("broker", "provider"))
    false = lease.signatures[0].model_copy(update={"keyid": KEYS["renter"].party})
    more = lease.model_copy(update={"signatures": (*lease.signatures, false)})
    with pytest.raises(DocumentRefused, match="does not match the document"):
        open_document(more, KINDS["lease"], signed_by=(broker, provider))


def test_a_countersignature_leaves_the_id_and_stands_once() -> None:
    offer = vector_of("offer")
    twice = offer.countersigned(KEYS["renter"]).countersigned(KEYS["renter"])
    assert twice.id == offer.id
    assert twice.signers == (KEYS["provider"].party, KEYS["renter"].party)
    twice.require(KEYS["renter"].party)
    assert offer.merged(twice) == twice
    assert twice.merged(offer) == twice
    with pytest.raises(SignatureRefused, match="another document"):
        offer.merged(vector_of("job"))


def test_a_document_never_gets_more_signatures_than_can_be_read_again() -> None:
    offer = vector_of("offer")
    for number in range(100, 103):
        offer = offer.countersigned(SigningKey.from_seed(bytes([number]) * 32))
    Envelope.model_validate_json(offer.model_dump_json())
    with pytest.raises(SignatureRefused, match="at most 4"):
        offer.countersigned(KEYS["stranger"])
    with pytest.raises(SignatureRefused, match="at most 4"):
        offer.merged(vector_of("offer").countersigned(KEYS["stranger"]))


def test_documents_from_the_future_and_past_their_end() -> None:
    now_ms = HOSTILE["now_ms"]
    check_time(now_ms=now_ms, issued_ms=now_ms + 300_000, expires_ms=now_ms + 1)
    with pytest.raises(DocumentRefused, match="301 s in the future; set the clock") as future:
        check_time(now_ms=now_ms, issued_ms=now_ms + 301_000)
    assert future.value.field == "issued_ms"
    with pytest.raises(DocumentRefused, match="expired 0 s ago; sign a new one") as expired:
        check_time(now_ms=now_ms, issued_ms=now_ms - 5, expires_ms=now_ms)
    assert expired.value.field == "expires_ms"


def test_what_a_stranger_wrote_is_repeated_in_bounds_only() -> None:
    payload = json.dumps({"x" * 60_000: 1}).encode()
    kind = KINDS["key"]
    signature = KEYS["renter"].sign(dsse(kind.payload_type(), payload))
    envelope = {
        "payloadType": kind.payload_type(),
        "payload": base64.b64encode(payload).decode(),
        "signatures": [
            {"keyid": KEYS["renter"].party, "sig": base64.b64encode(signature).decode()}
        ],
    }
    with pytest.raises(DocumentRefused) as refused:
        read_document(Envelope.model_validate_json(json.dumps(envelope)), kind)
    assert len(str(refused.value)) < 1_000


# Keys


def _add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Add two points of edwards25519 (RFC 8032, section 5.1), affine."""
    d = -121665 * pow(121666, -1, P)
    product = d * a[0] * b[0] * a[1] * b[1] % P
    x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + product, -1, P) % P
    y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, -1, P) % P
    return x, y


def _decode(raw: bytes) -> tuple[int, int]:
    y = (int.from_bytes(raw, "little") % 2**255) % P
    d = -121665 * pow(121666, -1, P) % P
    square = (y * y - 1) * pow(d * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    assert x * x % P == square, "not on the curve"
    return (P - x if x % 2 != raw[31] >> 7 else x), y


@pytest.mark.parametrize("vector", load("keys")["refused"], ids=lambda v: str(v["hex"][:6]))
def test_a_key_that_could_verify_anything_is_refused(vector: Mapping[str, str]) -> None:
    party = "ed25519-" + vector["hex"]
    with pytest.raises(KeyRefused, match=vector["error"]):
        public_key(party)
    with pytest.raises(KeyRefused, match=vector["error"]):
        verify(party, bytes([1]) + bytes(63), b"any message")


def test_all_eight_points_of_small_order_are_among_the_vectors() -> None:
    points = set()
    for vector in load("keys")["refused"]:
        if vector["error"] == "small order":
            point = _decode(bytes.fromhex(vector["hex"]))
            double = _add(point, point)
            four = _add(double, double)
            assert _add(four, four) == (0, 1)
            points.add((point[0] % P, point[1]))
    assert len(points) == 8


def test_no_number_above_the_prime_is_a_key() -> None:
    for y in range(P, 2**255):
        for sign in (0, 1 << 255):
            with pytest.raises(KeyRefused, match="canonically"):
                public_key("ed25519-" + (y | sign).to_bytes(32, "little").hex())


@pytest.mark.parametrize(
    "party",
    [
        "",
        "ed25519-",
        "ed25519-" + "A" * 64,
        "ed25519-" + "a" * 63,
        "a" * 64,
        KEYS["renter"].party + "\n",
        " " + KEYS["renter"].party,
        "rsa-" + "a" * 64,
    ],
)
def test_what_is_no_party_id_is_refused(party: str) -> None:
    with pytest.raises(KeyRefused, match="not a party id"):
        public_key(party)


def test_a_private_key_is_never_printed() -> None:
    assert "01" * 32 not in repr(KEYS["broker"])
    assert repr(KEYS["broker"]) == f"SigningKey({KEYS['broker'].party[8:18]})"


def test_a_key_file_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "key"
    made = SigningKey.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["key"]
    assert SigningKey.load_or_create(path).party == made.party
    path.chmod(0o640)
    with pytest.raises(KeyRefused, match="chmod 600"):
        SigningKey.load_or_create(path)
    path.chmod(0o600)
    path.write_bytes(b"\xff not a key")
    with pytest.raises(KeyRefused, match="does not hold a key"):
        SigningKey.load_or_create(path)


# Requests


def accept(request: Mapping[str, Any], **change: Any) -> Any:
    arguments: dict[str, Any] = {
        "broker": REQUESTS["broker"],
        "method": request["method"],
        "target": request["target"],
        "body_digest": "sha256:" + hashlib.sha256(request["body"].encode()).hexdigest(),
        "now_ms": REQUESTS["now_ms"],
    }
    headers = change.pop("headers", request["headers"])
    return authenticate(headers, **(arguments | change))


@pytest.mark.parametrize("request_", REQUESTS["requests"], ids=lambda r: str(r["method"]))
def test_a_request_is_signed_as_ever(request_: Mapping[str, Any]) -> None:
    headers = request_["headers"]
    statement = json.loads(request_["signed_bytes"].split(" ", 4)[4])
    text = json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()
    message = dsse(REQUEST_TYPE, text)
    assert message.decode() == request_["signed_bytes"]
    seed = bytes.fromhex(DOCUMENT_VECTORS["keys"]["renter"]["seed"])
    signature = Ed25519PrivateKey.from_private_bytes(seed).sign(message)
    assert base64.b64decode(headers["Sublet-Signature"]) == signature
    assert headers == sign_request(
        KEYS["renter"],
        broker=REQUESTS["broker"],
        method=request_["method"].lower(),
        target=request_["target"],
        body=request_["body"].encode(),
        time_ms=REQUESTS["now_ms"],
        nonce=headers["Sublet-Nonce"],
        idempotency_key=request_["key"],
    )
    caller = accept(request_)
    assert (caller.party, caller.nonce) == (KEYS["renter"].party, headers["Sublet-Nonce"])


SIGNATURE = REQUESTS["requests"][1]["headers"]["Sublet-Signature"]


@pytest.mark.parametrize(
    "change",
    [
        {"method": "PUT"},
        {"target": "/v1/jobs?x=1"},
        {"target": "/v1/job"},
        {"body_digest": "sha256:" + hashlib.sha256(b"other").hexdigest()},
        {"broker": KEYS["stranger"].party},
    ],
    ids=lambda c: str(next(iter(c))),
)
def test_a_request_holds_for_one_method_target_body_and_broker(change: dict[str, Any]) -> None:
    with pytest.raises(RequestRefused, match="does not match the request") as refused:
        accept(REQUESTS["requests"][1], **change)
    assert refused.value.header == "Sublet-Signature"


@pytest.mark.parametrize(
    ("header", "value", "said_of", "error"),
    [
        ("Sublet-Party", "", "Sublet-Party", "not signed"),
        ("Sublet-Party", KEYS["stranger"].party, "Sublet-Signature", "does not match"),
        ("Sublet-Party", "ed25519-" + "00" * 32, "Sublet-Party", "small order"),
        ("Sublet-Party", "me", "Sublet-Party", "not a party id"),
        ("Sublet-Nonce", "5a" * 15, "Sublet-Nonce", "32 hex digits"),
        ("Sublet-Nonce", "5b" * 16, "Sublet-Signature", "does not match"),
        ("Sublet-Nonce", "5a" * 16 + "\n", "Sublet-Nonce", "32 hex digits"),
        ("Sublet-Time-Ms", "", "Sublet-Time-Ms", "milliseconds since 1970"),
        ("Sublet-Time-Ms", "-1", "Sublet-Time-Ms", "milliseconds since 1970"),
        ("Sublet-Time-Ms", "9" * 4000, "Sublet-Time-Ms", "milliseconds since 1970"),
        ("Sublet-Time-Ms", "١٢٣", "Sublet-Time-Ms", "milliseconds since 1970"),
        ("Sublet-Time-Ms", str(REQUESTS["now_ms"] + 1), "Sublet-Signature", "does not match"),
        ("Sublet-Signature", "", "Sublet-Signature", "does not match"),
        ("Sublet-Signature", "!", "Sublet-Signature", "not base64"),
        ("Sublet-Signature", "é", "Sublet-Signature", "not base64"),
        (
            "Sublet-Signature",
            SIGNATURE[:-3] + chr(ord(SIGNATURE[-3]) + 1) + "==",
            "Sublet-Signature",
            "not canonical base64",
        ),
        ("Idempotency-Key", "try-2", "Sublet-Signature", "does not match"),
        ("Idempotency-Key", "x" * 129, "Idempotency-Key", "at most 128"),
    ],
)
def test_a_changed_header_is_refused(header: str, value: str, said_of: str, error: str) -> None:
    request = REQUESTS["requests"][1]
    with pytest.raises(RequestRefused, match=error) as refused:
        accept(request, headers={**request["headers"], header: value})
    assert refused.value.header == said_of


@pytest.mark.parametrize(("off_ms", "words"), [(300_001, "ago"), (-300_001, "in the future")])
def test_a_request_is_fresh(off_ms: int, words: str) -> None:
    request = REQUESTS["requests"][0]
    assert accept(request, now_ms=REQUESTS["now_ms"] + (off_ms // abs(off_ms)) * 300_000)
    with pytest.raises(RequestRefused, match=f"300 s {words} by the broker's clock") as refused:
        accept(request, now_ms=REQUESTS["now_ms"] + off_ms)
    assert refused.value.header == "Sublet-Time-Ms"


# The log


def tree_hash(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + tree_hash(leaves[:k]) + tree_hash(leaves[k:])).digest()


def audit_path(at: int, leaves: list[bytes]) -> list[bytes]:
    """RFC 6962, section 2.1.1, word for word."""
    if len(leaves) == 1:
        return []
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    if at < k:
        return [*audit_path(at, leaves[:k]), tree_hash(leaves[k:])]
    return [*audit_path(at - k, leaves[k:]), tree_hash(leaves[:k])]


def test_roots_are_those_of_the_rfc() -> None:
    ids = TREES["ids"]
    leaves = [bytes.fromhex(i) for i in ids]
    assert TREES["roots"][0] == merkle.EMPTY_ROOT
    for size, root in enumerate(TREES["roots"]):
        assert tree_hash(leaves[:size]).hex() == root == merkle.root(ids[:size])
        assert merkle.MerkleLog(ids[:size]).root() == root


def test_every_proof_is_that_of_the_rfc_and_no_other_place_fits_it() -> None:
    ids = TREES["ids"]
    leaves = [bytes.fromhex(i) for i in ids]
    for proof in TREES["proofs"]:
        path = [h.hex() for h in audit_path(proof["position"], leaves[: proof["size"]])]
        assert path == proof["path"]
    for size in range(1, len(ids) + 1):
        log = merkle.MerkleLog(ids[:size])
        for at in range(size):
            path = [h.hex() for h in audit_path(at, leaves[:size])]
            assert merkle.inclusion_proof(ids[:size], at) == path == log.inclusion_proof(at)
            for other in range(size):
                led = merkle.root_from_inclusion(ids[at], other, size, path)
                assert (led == TREES["roots"][size]) == (other == at)


def test_a_log_grown_in_any_steps_is_the_same_log() -> None:
    ids = TREES["ids"]
    for first in range(len(ids) + 1):
        for second in range(first, len(ids) + 1):
            start = merkle.MerkleLog(ids[:first])
            grown = start.grown(ids[first:second]).grown(ids[second:])
            assert grown.root() == TREES["roots"][-1]
            assert start.root() == TREES["roots"][first]
            assert grown.inclusion_proof(3) == merkle.inclusion_proof(ids, 3)


@pytest.mark.parametrize(
    ("position", "size", "path"),
    [
        (0, 0, []),
        (-1, 2, ["0" * 64]),
        (2, 2, ["0" * 64]),
        (0, 2, []),
        (0, 2, ["0" * 64] * 2),
        (0, 2, ["zz" * 32]),
        (0, 2, ["0" * 63]),
        (0, 2, ["  " + "0" * 62]),
        (0, 1, ["0" * 64]),
        (0, 2**70, ["0" * 64] * 65),
    ],
)
def test_what_is_no_proof_leads_nowhere(position: int, size: int, path: list[str]) -> None:
    assert merkle.root_from_inclusion(TREES["ids"][0], position, size, path) is None


def test_a_proof_of_what_is_not_there_cannot_be_asked_for() -> None:
    for log in (merkle.MerkleLog(), merkle.MerkleLog(TREES["ids"][:3])):
        with pytest.raises(IndexError, match=f"has {log.size} entries"):
            log.inclusion_proof(log.size)


def test_an_id_depends_on_the_type_too() -> None:
    assert document_id("a", b"b") != document_id("ab", b"")
    assert document_id("a", b"b") == hashlib.sha256(dsse("a", b"b")).hexdigest()
