"""Signed envelopes: DSSE (github.com/secure-systems-lab/dsse, protocol v1).

The signature covers PAE(type, payload), the exact bytes that were written. They are verified
before they are parsed and never serialised again. The id of a document is the SHA-256 of the same
PAE, so another signature on it (a countersignature) leaves its id as it is.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterable
from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sublet_contracts.encoding import MAX_DOCUMENT_BYTES
from sublet_contracts.keys import PARTY_PATTERN, SigningKey, short, verify

MAX_SIGNATURES = 4
_MAX_PAYLOAD_TEXT = (MAX_DOCUMENT_BYTES + 2) // 3 * 4


class SignatureRefused(ValueError):
    """A signature is missing or wrong; the message says whose."""


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding of a payload."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def document_id(payload_type: str, payload: bytes) -> str:
    """Return the document's id: SHA-256 of type and payload, 64 hex digits."""
    return hashlib.sha256(pae(payload_type, payload)).hexdigest()


class EnvelopeSignature(BaseModel):
    """One party's signature, base64."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    keyid: str = Field(pattern=PARTY_PATTERN)
    sig: str = Field(min_length=88, max_length=88)

    @field_validator("sig")
    @classmethod
    def _is_base64(cls, text: str) -> str:
        _decode(text)
        return text


class Envelope(BaseModel):
    """A payload with the signatures over it, as DSSE's JSON."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    payloadType: str = Field(max_length=128, pattern=r"^application/vnd\.sublet\.[a-z0-9.+-]+$")
    payload: str = Field(max_length=_MAX_PAYLOAD_TEXT)
    signatures: tuple[EnvelopeSignature, ...] = Field(min_length=1, max_length=MAX_SIGNATURES)

    @field_validator("payload")
    @classmethod
    def _is_base64(cls, text: str) -> str:
        _decode(text)
        return text

    @cached_property
    def payload_bytes(self) -> bytes:
        """The exact bytes that were signed."""
        return _decode(self.payload)

    @cached_property
    def id(self) -> str:
        """The id of the document inside: 64 hex digits, whoever signed it."""
        return document_id(self.payloadType, self.payload_bytes)

    @property
    def signers(self) -> tuple[str, ...]:
        """The parties whose signatures are claimed here (claimed: see require)."""
        return tuple(signature.keyid for signature in self.signatures)

    def require(self, *parties: str) -> None:
        """Check that each of `parties` signed these bytes. Raises SignatureRefused, KeyRefused."""
        message = pae(self.payloadType, self.payload_bytes)
        for party in parties:
            mine = [s for s in self.signatures if s.keyid == party]
            if not mine:
                raise SignatureRefused(f"the document is not signed by {short(party)}")
            if not all(verify(party, _decode(s.sig), message) for s in mine):
                raise SignatureRefused(
                    f"the signature of {short(party)} does not match the document"
                )

    def countersigned(self, key: SigningKey) -> "Envelope":
        """Return the same document with `key`'s signature added (or as it is, if it has one).

        Raises SignatureRefused if there is no room for another.
        """
        if key.party in self.signers:
            return self
        return self._with(_signature(key, pae(self.payloadType, self.payload_bytes)))

    def merged(self, other: "Envelope") -> "Envelope":
        """Return this document with the signatures that `other`, the same document, has besides.

        They are as unproven afterwards as before: see require. Raises SignatureRefused if `other`
        is another document, or if there is no room for so many.
        """
        if other.id != self.id:
            raise SignatureRefused("the signatures belong to another document")
        return self._with(*(s for s in other.signatures if s.keyid not in self.signers))

    def _with(self, *added: EnvelopeSignature) -> "Envelope":
        # model_copy does not validate, and an envelope with too many can never be read again.
        if len(self.signatures) + len(added) > MAX_SIGNATURES:
            raise SignatureRefused(f"a document carries at most {MAX_SIGNATURES} signatures")
        return self.model_copy(update={"signatures": (*self.signatures, *added)})


def sign_payload(payload_type: str, payload: bytes, keys: Iterable[SigningKey]) -> Envelope:
    """Return an envelope of `payload` signed by each of `keys`."""
    if len(payload) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"a document of {len(payload)} bytes; at most {MAX_DOCUMENT_BYTES} fit")
    message = pae(payload_type, payload)
    return Envelope(
        payloadType=payload_type,
        payload=base64.b64encode(payload).decode(),
        signatures=tuple(_signature(key, message) for key in keys),
    )


def _signature(key: SigningKey, message: bytes) -> EnvelopeSignature:
    return EnvelopeSignature(keyid=key.party, sig=base64.b64encode(key.sign(message)).decode())


def _decode(text: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("not base64") from error
    if base64.b64encode(raw).decode() != text:
        raise ValueError("not canonical base64")
    return raw
