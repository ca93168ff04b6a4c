"""Signed requests: each HTTP request is signed by the party's own key; there are no passwords.

The signature covers method, target (path and query), body, time, nonce, idempotency key and the
broker it is meant for, as DSSE PAE over canonical JSON, so a captured request can neither be
altered, nor sent to another broker, nor sent twice.

    Sublet-Party: ed25519-...      Sublet-Time-Ms: 1767225600000
    Sublet-Nonce: 32 hex digits    Sublet-Signature: base64    Idempotency-Key: (optional)
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sublet_contracts.encoding import canonical_json
from sublet_contracts.envelope import pae
from sublet_contracts.keys import KeyRefused, SigningKey, verify

REQUEST_TYPE = "application/vnd.sublet.request.v1+json"
MAX_REQUEST_SKEW_MS = 300_000


def body_digest_of(body: bytes) -> str:
    """Return what stands for a body in the signature."""
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


EMPTY_DIGEST = body_digest_of(b"")


class RequestRefused(ValueError):
    """The request isn't authentic; `header` names what is wrong with it."""

    def __init__(self, message: str, header: str) -> None:
        super().__init__(message)
        self.header = header


@dataclass(frozen=True)
class Caller:
    """Who sent an authentic request, and the nonce that must not be seen again."""

    party: str
    nonce: str
    time_ms: int


def _message(
    *,
    broker: str,
    party: str,
    method: str,
    target: str,
    body_digest: str,
    time_ms: int,
    nonce: str,
    idempotency_key: str,
) -> bytes:
    statement = {
        "body_digest": body_digest,
        "broker": broker,
        "idempotency_key": idempotency_key,
        "method": method.upper(),
        "nonce": nonce,
        "party": party,
        "target": target,
        "time_ms": time_ms,
    }
    return pae(REQUEST_TYPE, canonical_json(statement))


def sign_request(
    key: SigningKey,
    *,
    broker: str,
    method: str,
    target: str,
    body: bytes,
    time_ms: int,
    nonce: str,
    idempotency_key: str = "",
    body_digest: str = "",
) -> dict[str, str]:
    """Return the headers that authenticate a request. `target` is path and query as sent.
    `body_digest`: instead of the body's own, where a digest in the target stands for it."""
    message = _message(
        broker=broker,
        party=key.party,
        method=method,
        target=target,
        body_digest=body_digest or body_digest_of(body),
        time_ms=time_ms,
        nonce=nonce,
        idempotency_key=idempotency_key,
    )
    headers = {
        "Sublet-Party": key.party,
        "Sublet-Time-Ms": str(time_ms),
        "Sublet-Nonce": nonce,
        "Sublet-Signature": base64.b64encode(key.sign(message)).decode(),
    }
    if idempotency_key:
        headers["Idempotency-Key"] = idempotency_key
    return headers


def authenticate(
    headers: Mapping[str, str],
    *,
    broker: str,
    method: str,
    target: str,
    body_digest: str,
    now_ms: int,
) -> Caller:
    """Return who signed the request. `headers` must look names up without regard to case.

    The caller must still refuse a nonce it has seen. Raises RequestRefused.
    """
    party = headers.get("Sublet-Party", "")
    nonce = headers.get("Sublet-Nonce", "")
    time_text = headers.get("Sublet-Time-Ms", "")
    idempotency_key = headers.get("Idempotency-Key", "")
    if not party:
        raise RequestRefused("the request is not signed; use the sublet client", "Sublet-Party")
    if not re.fullmatch(r"[0-9a-f]{32}", nonce):
        raise RequestRefused("must be 32 hex digits", "Sublet-Nonce")
    # Without leading zeros: one request has one form, or what was signed could be sent in others.
    if not re.fullmatch(r"0|[1-9][0-9]{0,14}", time_text):
        raise RequestRefused("must be milliseconds since 1970", "Sublet-Time-Ms")
    if len(idempotency_key) > 128:
        raise RequestRefused("at most 128 characters", "Idempotency-Key")
    time_ms = int(time_text)
    if abs(now_ms - time_ms) > MAX_REQUEST_SKEW_MS:
        raise RequestRefused(
            f"signed {abs(now_ms - time_ms) // 1000} s "
            f"{'ago' if now_ms > time_ms else 'in the future'} by the broker's clock",
            "Sublet-Time-Ms",
        )
    signature_text = headers.get("Sublet-Signature", "")
    try:
        signature = base64.b64decode(signature_text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestRefused("is not base64", "Sublet-Signature") from error
    if base64.b64encode(signature).decode() != signature_text:
        raise RequestRefused("is not canonical base64", "Sublet-Signature")
    message = _message(
        broker=broker,
        party=party,
        method=method,
        target=target,
        body_digest=body_digest,
        time_ms=time_ms,
        nonce=nonce,
        idempotency_key=idempotency_key,
    )
    try:
        authentic = verify(party, signature, message)
    except KeyRefused as error:
        raise RequestRefused(str(error), "Sublet-Party") from error
    if not authentic:
        raise RequestRefused("does not match the request", "Sublet-Signature")
    return Caller(party, nonce, time_ms)
