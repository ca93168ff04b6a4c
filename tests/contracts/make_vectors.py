"""Writes tests/contracts/vectors/*.json: python -m tests.contracts.make_vectors

Run it only when a document's format changes on purpose: the vectors are what other programs, and
documents signed before, rely on. The tests read the files and never run this.
"""

import base64
import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sublet_contracts import merkle
from sublet_contracts.auth import sign_request
from sublet_contracts.documents import Document, sign_document
from sublet_contracts.envelope import pae, sign_payload
from tests.contracts.samples import BROKER, HOUR_MS, KEYS, NOW_MS, RENTER, SEEDS, older, samples

VECTORS = Path(__file__).parent / "vectors"
_SMALL_ORDER = (
    "01" + "00" * 31,
    "ec" + "ff" * 30 + "7f",
    "00" * 32,
    "00" * 31 + "80",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
)
# Other ways to write the same points: the sign of an x that is zero, and y + p.
_SMALL_ORDER_AGAIN = (
    "01" + "00" * 30 + "80",
    "ec" + "ff" * 31,
    "ed" + "ff" * 30 + "7f",
    "ed" + "ff" * 31,
    "ee" + "ff" * 30 + "7f",
    "ee" + "ff" * 31,
)
_GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493


def documents() -> Any:
    """Return a vector for each kind of document, and for each older version that is still read."""
    return {
        "keys": {n: {"seed": SEEDS[n].hex(), "party": KEYS[n].party} for n in SEEDS},
        "documents": _signed(samples()),
        "older": _signed(older()),
    }


def _signed(documents: list[tuple[Document, tuple[str, ...]]]) -> Any:
    vectors = []
    for document, signers in documents:
        signed = sign_document(document, *(KEYS[name] for name in signers))
        vectors.append(
            {
                "kind": document.KIND,
                "payload_type": document.payload_type(),
                "payload": signed.envelope.payload_bytes.decode(),
                "id": signed.id,
                "signers": list(signers),
                "envelope": signed.envelope.model_dump(mode="json"),
            }
        )
    return vectors


def requests() -> Any:
    """Return signed requests."""
    cases = (
        {"method": "GET", "target": "/v1/offers?kind=gpu&region=eu", "body": "", "key": ""},
        {"method": "POST", "target": "/v1/jobs", "body": '{"a":1}', "key": "try-1"},
    )
    result = []
    for case in cases:
        headers = sign_request(
            KEYS["renter"], broker=BROKER, method=case["method"], target=case["target"],
            body=case["body"].encode(), time_ms=NOW_MS, nonce="5a" * 16,
            idempotency_key=case["key"],
        )  # fmt: skip
        statement = {
            "body_digest": "sha256:" + hashlib.sha256(case["body"].encode()).hexdigest(),
            "broker": BROKER,
            "idempotency_key": case["key"],
            "method": case["method"],
            "nonce": "5a" * 16,
            "party": RENTER,
            "target": case["target"],
            "time_ms": NOW_MS,
        }
        text = json.dumps(statement, sort_keys=True, separators=(",", ":"))
        signed = pae("application/vnd.sublet.request.v1+json", text.encode())
        result.append({**case, "signed_bytes": signed.decode(), "headers": headers})
    return {"broker": BROKER, "now_ms": NOW_MS, "requests": result}


def trees() -> Any:
    """Return roots and proofs of logs of 0 to 17 documents."""
    ids = [hashlib.sha256(b"document %d" % number).hexdigest() for number in range(17)]
    return {
        "ids": ids,
        "roots": [merkle.root(ids[:size]) for size in range(len(ids) + 1)],
        "proofs": [
            {"size": size, "position": at, "path": merkle.inclusion_proof(ids[:size], at)}
            for size, at in ((1, 0), (2, 1), (3, 2), (7, 3), (8, 7), (11, 10), (17, 0), (17, 16))
        ],
    }


def keys() -> Any:
    """Return public keys that must be refused, and why."""
    refused = [{"hex": h, "error": "small order"} for h in _SMALL_ORDER]
    for text in _SMALL_ORDER_AGAIN:
        y = int.from_bytes(bytes.fromhex(text), "little") % 2**255
        error = "canonically" if y >= 2**255 - 19 else "small order"
        refused.append({"hex": text, "error": error})
    for above in (2, 3, 18):
        y = 2**255 - 19 + above
        refused.append({"hex": y.to_bytes(32, "little").hex(), "error": "canonically"})
    return {"refused": refused}


def hostile() -> Any:
    """Return envelopes that must be refused: at which stage, with which field and words."""
    by_kind = {document.KIND: (document, signers) for document, signers in samples()}
    cases: list[dict[str, Any]] = []

    def add(name: str, kind: str, envelope: Any, stage: str, field: str, error: str) -> None:
        case = {"name": name, "kind": kind, "stage": stage, "field": field, "error": error}
        cases.append({**case, "envelope": envelope})

    def signed_text(kind: str, text: str) -> Any:
        document, signers = by_kind[kind]
        envelope = sign_payload(
            document.payload_type(), text.encode(), [KEYS[name] for name in signers]
        )
        return envelope.model_dump(mode="json")

    def text_of(document: Document) -> str:
        return sign_document(document, KEYS["stranger"]).envelope.payload_bytes.decode()

    def rewritten(name: str, kind: str, old: str, new: str, field: str, error: str) -> None:
        text = text_of(by_kind[kind][0])
        if text.count(old) != 1:
            raise ValueError(f"{name}: {old} stands {text.count(old)} times")
        add(name, kind, signed_text(kind, text.replace(old, new)), "document", field, error)

    budget = '"budget_ucr":5000000'
    whole = "budget_ucr: Input should be a valid integer"
    rewritten("duplicate key", "job", budget, f"{budget},{budget}", "payload", "stands twice")
    rewritten("duplicate key, one escaped", "job", budget, f'{budget},"\\u0062udget_ucr":1',
              "payload", "stands twice")  # fmt: skip
    rewritten("float", "job", budget, '"budget_ucr":5000000.0', "payload", "is not an integer")
    rewritten("exponent", "job", budget, '"budget_ucr":5e6', "payload", "is not an integer")
    rewritten("NaN", "job", budget, '"budget_ucr":NaN', "payload", "NaN is not a number")
    rewritten("infinity", "job", budget, '"budget_ucr":-Infinity', "payload", "is not a number")
    rewritten("integer of 2**53", "job", budget, f'"budget_ucr":{2**53}', "payload", "2**53 - 1")
    rewritten("integer of 4000 digits", "job", budget, f'"budget_ucr":{"9" * 4000}', "payload",
              "4000 digits")  # fmt: skip
    rewritten("negative", "job", budget, '"budget_ucr":-1', "budget_ucr", "greater than or equal")
    rewritten("string for integer", "job", budget, '"budget_ucr":"5000000"', "budget_ucr", whole)
    rewritten("digit in a string", "job", budget, '"budget_ucr":"1"', "budget_ucr", whole)
    rewritten("true for integer", "job", budget, '"budget_ucr":true', "budget_ucr", whole)
    rewritten("null for integer", "job", budget, '"budget_ucr":null', "budget_ucr", whole)
    rewritten("integer for true", "offer", '"egress":false', '"egress":0', "egress",
              "valid boolean")  # fmt: skip
    rewritten("unknown field", "job", budget, f'{budget},"budget":1', "budget", "not permitted")
    rewritten("unknown field within", "offer", '"driver":"550.54"', '"driver":"1","x":1',
              "devices.0.x", "not permitted")  # fmt: skip
    rewritten("missing field", "job", f"{budget},", "", "budget_ucr", "required")
    rewritten("white space is fine, a second value is not", "job", budget, budget + "} {",
              "payload", "not JSON")  # fmt: skip
    rewritten("half of a surrogate pair", "job", '"name":"ft"', '"name":"\\ud800"', "payload",
              "surrogate")  # fmt: skip
    rewritten("raw control character", "job", '"name":"ft"', '"name":"f\nt"', "payload", "not JSON")
    rewritten("line feed at the end of a name", "job", '"name":"ft"', '"name":"ft\\n"', "name",
              "use letters")  # fmt: skip
    rewritten("line feed at the end of a party", "offer", f'"broker":"{BROKER}"',
              f'"broker":"{BROKER}\\n"', "broker", "pattern")  # fmt: skip
    for path in ("/data/../etc/passwd", "/data/./x", "/data//x", "data/x", "/", "/data/x/"):
        rewritten(f"destination {path}", "job", "/data/data.csv", path, "inputs.0.destination",
                  "must")  # fmt: skip
        rewritten(f"outputs {path}", "job", '"/out"', json.dumps(path), "outputs", "must")
    rewritten("our variable", "job", '"SEED"', '"SUBLET_EPOCH"', "env", "SUBLET_ are ours")
    rewritten("ends before it begins", "offer", f'"expires_ms":{NOW_MS + HOUR_MS}',
              f'"expires_ms":{NOW_MS}', "", "later than issued_ms")  # fmt: skip
    rewritten("accepts more than budget", "job", '"accept_receipts_up_to_ucr":5000000',
              '"accept_receipts_up_to_ucr":5000001', "", "not be above budget_ucr")  # fmt: skip
    rewritten("isolates nothing and serves all", "offer", '"docker"', '"process"', "", "accepts")
    rewritten("more durable than used", "receipt", '"durable_device_ms":600000',
              '"durable_device_ms":900001', "", "durable_device_ms")  # fmt: skip
    rewritten("third receipt follows none", "receipt", f'"previous":"{"e" * 64}"',
              '"previous":null', "", "previous must be null on the first")  # fmt: skip
    rewritten("final without a reason", "receipt", '"reason":"provider_lost"', '"reason":null', "",
              "reason must stand")  # fmt: skip
    rewritten("a reason that nobody knows", "settlement", '"provider_lost"', '"bad_luck"',
              "reason", "should be")  # fmt: skip

    job_text = text_of(by_kind["job"][0])
    padded = job_text[:-1] + " " * (65_537 - len(job_text.encode())) + "}"
    big = copy.deepcopy(signed_text("job", job_text))
    raw = padded.encode()
    big["payload"] = base64.b64encode(raw).decode()
    message = pae(by_kind["job"][0].payload_type(), raw)
    big["signatures"][0]["sig"] = base64.b64encode(KEYS["renter"].sign(message)).decode()
    add("65 537 bytes", "job", big, "document", "payload", "at most 65536")
    huge = {**big, "payload": base64.b64encode(b" " * 70_000).decode()}
    add("70 000 bytes", "job", huge, "envelope", "payload", "at most 87384 characters")
    add("33 levels", "job", signed_text("job", "[" * 33 + "1" + "]" * 33), "document", "payload",
        "deeper than 32")  # fmt: skip
    add("20 000 levels", "job", signed_text("job", "[" * 20_000), "document", "payload",
        "deeper than 32")  # fmt: skip
    add("not an object", "job", signed_text("job", "[]"), "document", "", "object")
    latin = sign_payload(by_kind["job"][0].payload_type(), b'{"a":"\xff"}', [KEYS["renter"]])
    add("not UTF-8", "job", latin.model_dump(mode="json"), "document", "payload", "not UTF-8")

    def envelopes(name: str, change: Callable[[Any], None], stage: str, field: str, error: str,
                  kind: str = "job") -> None:  # fmt: skip
        document, signers = by_kind[kind]
        made = sign_document(document, *(KEYS[s] for s in signers))
        envelope = made.envelope.model_dump(mode="json")
        change(envelope)
        add(name, kind, envelope, stage, field, error)

    def set_sig(make: Callable[[bytes], bytes]) -> Callable[[Any], None]:
        def change(envelope: Any) -> None:
            first = envelope["signatures"][0]
            first["sig"] = base64.b64encode(make(base64.b64decode(first["sig"]))).decode()

        return change

    def flip_payload(envelope: Any) -> None:
        payload = bytearray(base64.b64decode(envelope["payload"]))
        payload[-3] ^= 1
        envelope["payload"] = base64.b64encode(bytes(payload)).decode()

    def signed_by_another(envelope: Any) -> None:
        payload = base64.b64decode(envelope["payload"])
        made = sign_payload(envelope["payloadType"], payload, [KEYS["stranger"]])
        envelope["signatures"] = made.model_dump(mode="json")["signatures"]

    def anothers_signature_under_my_name(envelope: Any) -> None:
        mine = envelope["signatures"][0]["keyid"]
        signed_by_another(envelope)
        envelope["signatures"][0]["keyid"] = mine

    def add_stranger_badly(envelope: Any) -> None:
        first = envelope["signatures"][0]
        envelope["signatures"].append({**first, "keyid": KEYS["stranger"].party})

    def small_order(envelope: Any) -> None:
        # With the neutral point as key, R = S*B verifies for every message: here S = 0.
        forged = base64.b64encode(bytes([1]) + bytes(63)).decode()
        envelope["signatures"] = [{"keyid": "ed25519-" + _SMALL_ORDER[0], "sig": forged}]

    def swap_type(envelope: Any) -> None:
        envelope["payloadType"] = by_kind["offer"][0].payload_type()

    def set_type(value: str) -> Callable[[Any], None]:
        return lambda envelope: envelope.update(payloadType=value)

    def last_letter(where: str) -> Callable[[Any], None]:
        # The last letter before '=' carries bits that belong to no byte: set one of them.
        def change(envelope: Any) -> None:
            holder = envelope if where == "payload" else envelope["signatures"][0]
            text = holder[where].rstrip("=")
            alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
            other = alphabet[alphabet.index(text[-1]) + 1]
            holder[where] = text[:-1] + other + "=" * (len(holder[where]) - len(text))

        return change

    wrong = "does not match the document"
    envelopes("one bit of the payload", flip_payload, "document", "signatures", wrong)
    envelopes("one bit of the signature", set_sig(lambda s: bytes([s[0] ^ 1]) + s[1:]),
              "document", "signatures", wrong)  # fmt: skip
    envelopes("signature with S + L",
              set_sig(lambda s: s[:32] + (int.from_bytes(s[32:], "little") + _GROUP_ORDER)
                      .to_bytes(32, "little")), "document", "signatures", wrong)  # fmt: skip
    envelopes("signature of 65 bytes", set_sig(lambda s: s + b"\0"), "document", "signatures",
              wrong)  # fmt: skip
    envelopes("signature of zeros", set_sig(lambda s: bytes(64)), "document", "signatures", wrong)
    envelopes("signed by another", signed_by_another, "document", "signatures", "not signed by")
    envelopes("another's signature under my name", anothers_signature_under_my_name, "document",
              "signatures", wrong)  # fmt: skip
    envelopes("a bad signature beside a good one", add_stranger_badly, "document", "signatures",
              wrong)  # fmt: skip
    envelopes("key of small order", small_order, "document", "signatures", "small order")
    envelopes("no signature", lambda e: e.update(signatures=[]), "envelope", "signatures",
              "at least 1")  # fmt: skip
    envelopes("five signatures", lambda e: e.update(signatures=e["signatures"] * 5), "envelope",
              "signatures", "at most 4")  # fmt: skip
    envelopes("type of an offer", swap_type, "document", "payloadType", "expected")
    envelopes("version 2", set_type("application/vnd.sublet.job.v2+json"), "document",
              "payloadType", "expected")  # fmt: skip
    envelopes("type of another's making", set_type("application/json"), "envelope", "payloadType",
              "pattern")  # fmt: skip
    odd = "key"  # its payload and signature end in '='
    envelopes("payload in base64 with stray bits", last_letter("payload"), "envelope", "payload",
              "not canonical base64", odd)  # fmt: skip
    envelopes("signature in base64 with stray bits", last_letter("sig"), "envelope",
              "signatures.0.sig", "not canonical base64", odd)  # fmt: skip
    envelopes("line feed in base64", lambda e: e.update(payload=e["payload"][:4] + "\n"
              + e["payload"][4:]), "envelope", "payload", "not base64")  # fmt: skip
    envelopes("URL-safe base64", lambda e: e.update(payload=e["payload"][:-4] + "-_-_"),
              "envelope", "payload", "not base64")  # fmt: skip
    envelopes("signature that is no base64", lambda e: e["signatures"][0].update(sig="!" * 88),
              "envelope", "signatures.0.sig", "not base64")  # fmt: skip
    envelopes("unknown field of the envelope", lambda e: e.update(note="hello"), "envelope",
              "note", "not permitted")  # fmt: skip
    envelopes("signer that is no party", lambda e: e["signatures"][0].update(keyid="me"),
              "envelope", "signatures.0.keyid", "pattern")  # fmt: skip
    return {"now_ms": NOW_MS, "cases": cases}


def main() -> None:
    """Write the files."""
    VECTORS.mkdir(exist_ok=True)
    made = {"documents": documents(), "requests": requests(), "merkle": trees(), "keys": keys(),
            "hostile": hostile()}  # fmt: skip
    for name, content in made.items():
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (VECTORS / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
