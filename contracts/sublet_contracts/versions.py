"""Versions of documents: how two of a kind are read side by side, and which one is written.

The rules:
- A version that was ever released never changes, and a field is never added to it. Payload type and
  version are inside the signature: what was signed as version 1 is read as version 1 for ever.
- Each version is read strictly, by its own model. Then it is upgraded, here and nowhere else, to
  the newest one's shape: no other code knows that older ones exist.
- What is written is the newest version that its reader says it reads: each side of a session says
  so in the handshake (`reads` in hello and join, session.py). Who has no version in common with the
  other side is turned away there. Of a reader that nobody has asked yet the least is believed.
- A document that somebody else has signed can't be rewritten. An agent that can't read the job or
  the checkpoint of a lease refuses the lease, and the job goes to another one. So release what
  reads a new version before what writes it: brokers, then agents, then the SDK.

To change a kind that has been released:
1. Copy its model from documents.py into this file as <Kind>V<n>, with its validators, and never
   touch it again.
2. In documents.py change the model and set VERSION to the next number.
3. Here list the copy in OLDER with two functions: `upgrade` takes it and returns the fields of the
   next version, `downgrade` takes the next version and returns the fields of this one. What the
   older one doesn't say must come from what it does say, or be "not said"; never a guess.
4. tests/contracts: give a sample of the old version (samples.older), regenerate the vectors and
   contracts/README.md as their tests say. Nothing else knows of it, except a writer that must know
   who reads: sign_document(document, key, reads=...).

Receipt keeps its version 1 as the mechanism's own test (tests/contracts/test_versions.py, and with
whole programs of two releases tests/e2e/test_releases.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sublet_contracts.encoding import MAX_INTEGER
from sublet_contracts.fields import Count, DocumentId, Epoch, Issued, JobId, LeaseId, Provider
from sublet_contracts.reasons import Reason

Reads = Mapping[str, Sequence[int]]
"""Per kind of document the versions that a program reads."""


class Document(BaseModel):
    """What all documents share."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1
    SIGNED_BY: ClassVar[str]

    @classmethod
    def payload_type(cls) -> str:
        """The DSSE payload type: kind and version, inside the signature."""
        return f"application/vnd.sublet.{cls.KIND}.v{cls.VERSION}+json"


D = TypeVar("D", bound=Document)
Fields = dict[str, Any]


class UnknownVersion(ValueError):
    """A payload type that is no version of the kind that was expected, or none that is known."""


class NoCommonVersion(ValueError):
    """The other side reads no version of a kind that this side can write."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"no version of the document {kind!r} is known to both sides")
        self.kind = kind


@dataclass(frozen=True)
class Older:
    """A version that is still read, and the way to the next one and back."""

    model: type[Document]
    upgrade: Callable[[Any], Fields]
    downgrade: Callable[[Any], Fields]


# -- the older versions --------------------------------------------------------------------------


class ReceiptV1(Document):
    """The lease's usage so far: cumulative, hash-chained, signed by the provider and the renter."""

    KIND: ClassVar[str] = "receipt"
    VERSION: ClassVar[int] = 1
    SIGNED_BY: ClassVar[str] = "the provider, then the renter (or the job's bounds accept it)"

    provider: Provider
    job: JobId
    lease: LeaseId
    epoch: Epoch
    sequence: int = Field(ge=1, le=MAX_INTEGER, description="1, 2, 3 ... within the lease")
    previous: DocumentId | None = Field(description="the receipt before it; null for the first")
    cum_device_ms: Count = Field(description="wall ms times devices since the run started")
    durable_step: Count = Field(description="newest durable step of this lease; else start_step")
    durable_checkpoint: DocumentId | None = Field(description="its checkpoint, if of this lease")
    durable_device_ms: Count = Field(description="that checkpoint's cum_device_ms; else 0")
    charge_ucr: Count = Field(description="floor(price x cum_device_ms / 3 600 000), at most hold")
    final: bool = Field(description="the last of its lease")
    reason: Reason | None = Field(description="why the run ended; null unless final")
    issued_ms: Issued

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.durable_device_ms > self.cum_device_ms:
            raise ValueError("durable_device_ms must not be above cum_device_ms")
        if (self.sequence == 1) != (self.previous is None):
            raise ValueError("previous must be null on the first receipt and only there")
        if self.final != (self.reason is not None):
            raise ValueError("reason must stand on the final receipt and only there")
        return self


def _receipt_1_to_2(receipt: ReceiptV1) -> Fields:
    # What was durable had been reached; more isn't known, nor anything of a pull.
    return {**dict(receipt), "reached_step": receipt.durable_step, "pull_device_ms": 0}


def _receipt_2_to_1(receipt: Document) -> Fields:
    return without(receipt, "reached_step", "pull_device_ms")


OLDER: dict[str, dict[int, Older]] = {
    "receipt": {1: Older(ReceiptV1, _receipt_1_to_2, _receipt_2_to_1)},
}
"""Kind -> version -> what it was. The newest version of each kind is in documents.py."""


# -- the mechanism -------------------------------------------------------------------------------


def without(document: Document, *names: str) -> Fields:
    """Return a document's fields, but not those."""
    return {name: value for name, value in dict(document).items() if name not in names}


def versions_of(kind: type[Document]) -> dict[int, type[Document]]:
    """Return every version of a kind that is read here, from the oldest on."""
    older = OLDER.get(kind.KIND, {})
    return {number: older[number].model for number in sorted(older)} | {kind.VERSION: kind}


def model_of(payload_type: str, kind: type[Document]) -> type[Document]:
    """Return the model by which a payload of this type is read, where `kind` is expected.

    Raises UnknownVersion.
    """
    if payload_type == kind.payload_type():
        return kind
    for model in versions_of(kind).values():
        if payload_type == model.payload_type():
            return model
    raise UnknownVersion(f"expected {kind.payload_type()}, got {payload_type}")


def upgraded(document: Document, kind: type[D]) -> D:
    """Return a document of any version in the newest one's shape."""
    while not isinstance(document, kind):
        known = versions_of(kind)
        document = known[document.VERSION + 1].model_validate(
            OLDER[kind.KIND][document.VERSION].upgrade(document)
        )
    return document


def downgraded(document: Document, version: int) -> Document:
    """Return a document in the shape of an older version of its kind."""
    while version < document.VERSION:
        older = OLDER[document.KIND][document.VERSION - 1]
        document = older.model.model_validate(older.downgrade(document))
    return document


def newest_that(kind: type[Document], reads: Reads) -> int:
    """Return the newest version of `kind` that we can write and a peer that `reads` these can
    read. Of a peer that has said nothing of this kind the least is believed: the oldest.

    Raises NoCommonVersion.
    """
    ours = versions_of(kind)
    theirs = reads.get(kind.KIND)
    if theirs is None:
        return min(ours)
    common = ours.keys() & set(theirs)
    if not common:
        raise NoCommonVersion(kind.KIND)
    return max(common)
