"""What the auditor's model of a market consists of, and how it reads signed documents.

Nothing here is shared with the broker.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


class Violation(AssertionError):
    """Something that must never be."""


def never(wrong: bool, what: str) -> None:
    """Raise Violation where something is wrong."""
    if wrong:
        raise Violation(what)


def read(envelope: Any) -> dict[str, Any]:
    """Return the document in an envelope, from the bytes that were signed."""
    value: dict[str, Any] = json.loads(base64.b64decode(envelope.payload))
    return value


SIGNED: set[tuple[str, bytes, bytes]] = set()
"""Party, signature and message of what a key has signed in this process, noted where it did so:
who looks knows that for certain, and needn't compute it again."""


def is_signed_by(envelope: Any, party: str) -> bool:
    """Say whether `party`'s signature is on these bytes, by its public key alone."""
    payload, kind = base64.b64decode(envelope.payload), envelope.payloadType.encode()
    message = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    for signature in envelope.signatures:
        if signature.keyid == party:
            raw = base64.b64decode(signature.sig)
            if (party, raw, message) in SIGNED:
                return True
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(party[8:]))
            try:
                public.verify(raw, message)
            except InvalidSignature:
                return False
            return True
    return False


@dataclass
class JobModel:
    """A job, as its renter's documents say, and what became of it."""

    document: dict[str, Any]
    budget_ucr: int
    accept_ucr: int
    state: str = ""
    epoch: int = 0
    charged_ucr: int = 0
    unsigned_ucr: int = 0
    """Charged without the renter's signature on the receipt."""
    fruitless: int = 0
    """Runs without a new step, one after the other;"""
    unstarted: int = 0
    """and leases under which nothing ever ran."""
    live: str = ""
    """The lease that isn't closed."""
    threads: int = 0
    """Of the lease that made the first thing that was durable; 0: nothing is."""


@dataclass
class ReceiptModel:
    """A receipt in its chain."""

    id: str
    document: dict[str, Any]
    received_ms: int
    """True time, by which this model measures."""
    received_stopwatch_ms: int
    countersigned: bool


@dataclass
class LeaseModel:
    """A lease, its receipts and its settlement."""

    document: dict[str, Any]
    proposed_ms: int
    """True time, by which this model measures."""
    proposed_stopwatch_ms: int
    state: str = "proposed"
    signed: bool = False
    chain: list[ReceiptModel] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    settled: bool = False
    unsigned_ucr: int = 0
    reason: str = ""
    run: str = ""
    ran: bool = False
    """Whether the broker has heard that its command was running."""
    preparing_ms: int = 0
    """For how long it has heard that it wasn't yet, by its own account."""


@dataclass
class CheckpointModel:
    """A checkpoint or outputs."""

    document: dict[str, Any]
    state: str
    kept: bool = True
