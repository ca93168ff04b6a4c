"""Documents from outside: verified, parsed, and checked to be meant for this broker, now.

A document may carry the signatures of its own parties, each once, and nobody else's: it is kept
with them, and room for signatures is scarce. Checkpoints and receipts name no broker; the lease
that they name does. Their issued_ms is for people: what they may claim is bounded by this broker's
own clock.
"""

from typing import Any, TypeVar

from sublet_broker.service.errors import Refusal
from sublet_broker.service.unit_of_work.context import Context
from sublet_contracts.documents import (
    Document,
    DocumentRefused,
    Signed,
    author,
    check_time,
    open_document,
)
from sublet_contracts.envelope import Envelope, SignatureRefused
from sublet_contracts.keys import short
from sublet_contracts.problems import ProblemCode

D = TypeVar("D", bound=Document)


def receive_document(
    context: Context,
    envelope: Envelope,
    kind: type[D],
    *,
    signed_by: tuple[str, ...] = (),
    also_by: tuple[str, ...] = (),
) -> Signed[D]:
    """Open a document and check that it is for this broker. Raises DocumentRefused.

    `signed_by` must have signed it (nobody named: its author), `also_by` may have, nobody else.
    """
    signed = open_document(envelope, kind, signed_by=signed_by)
    parties = (*(signed_by or (author(signed.document),)), *also_by)
    refuse_strangers(envelope, parties)
    broker: Any = getattr(signed.document, "broker", context.party)
    if broker != context.party:
        raise DocumentRefused(
            f"it was signed for broker {short(broker)}, this is {short(context.party)}", "broker"
        )
    return signed


def refuse_strangers(envelope: Envelope, parties: tuple[str, ...]) -> None:
    """Refuse signatures that a document has no use for. Raises DocumentRefused."""
    strangers = [party for party in envelope.signers if party not in parties]
    if strangers:
        raise DocumentRefused(
            f"it carries a signature of {short(strangers[0])}, who is no party to it", "signatures"
        )
    if len(set(envelope.signers)) != len(envelope.signers):
        raise DocumentRefused("somebody's signature stands there twice", "signatures")


def merge(envelope: Envelope, other: Envelope) -> Envelope:
    """Return the document with the signatures of both. Raises DocumentRefused."""
    try:
        return envelope.merged(other)
    except SignatureRefused as error:
        raise DocumentRefused(str(error), "signatures") from error


def check_fresh(
    context: Context, now_ms: int, *, issued_ms: int, expires_ms: int | None = None
) -> None:
    """Refuse a document from the future or past its end. Raises DocumentRefused."""
    check_time(
        now_ms=now_ms, issued_ms=issued_ms, expires_ms=expires_ms, skew_ms=context.settings.skew_ms
    )


def as_refusal(error: DocumentRefused) -> Refusal:
    """Return a refused document as the answer to a request."""
    return Refusal(ProblemCode.DOCUMENT_REFUSED, str(error), field=error.field)
