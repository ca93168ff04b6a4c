"""Documents from outside: verified, parsed, and checked to be meant for this broker, now."""

from typing import Any, TypeVar

from sublet_broker.service.core import Core
from sublet_broker.service.errors import Refusal
from sublet_contracts.documents import Document, DocumentRefused, Signed, check_time, open_document
from sublet_contracts.envelope import Envelope
from sublet_contracts.keys import short

D = TypeVar("D", bound=Document)


def receive_document(
    core: Core, envelope: Envelope, kind: type[D], *, signed_by: tuple[str, ...] = ()
) -> Signed[D]:
    """Open a document and check that it is for this broker. Raises DocumentRefused."""
    signed = open_document(envelope, kind, signed_by=signed_by)
    broker: Any = getattr(signed.document, "broker", core.party)
    if broker != core.party:
        raise DocumentRefused(
            f"it was signed for broker {short(broker)}, this is {short(core.party)}", "broker"
        )
    return signed


def check_fresh(core: Core, now_ms: int, *, issued_ms: int, expires_ms: int | None = None) -> None:
    """Refuse a document from the future or past its end. Raises DocumentRefused."""
    check_time(
        now_ms=now_ms, issued_ms=issued_ms, expires_ms=expires_ms, skew_ms=core.settings.skew_ms
    )


def as_refusal(error: DocumentRefused) -> Refusal:
    """Return a refused document as the answer to a request."""
    return Refusal(
        422, "document_refused", "Document refused", str(error), field=error.field,
        fix="sign a new document with the sublet client, and check the clock and the key",
    )  # fmt: skip
