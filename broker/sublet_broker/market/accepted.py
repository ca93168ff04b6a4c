"""Documents that were verified when they came in, opened again.

Facts keep the envelope as it was signed. Its signatures were checked on acceptance, so reading it
again only parses, and the parsed form is kept: a book of ten thousand offers is parsed once.
"""

from functools import lru_cache
from typing import TypeVar

from sublet_contracts.documents import Document
from sublet_contracts.envelope import Envelope
from sublet_contracts.versions import model_of, upgraded

D = TypeVar("D", bound=Document)


SMALL_BYTES = 2_048


@lru_cache(maxsize=50_000)
def _small(kind: type[Document], payload: bytes) -> Document:
    return kind.model_validate_json(payload)


@lru_cache(maxsize=2_000)
def _large(kind: type[Document], payload: bytes) -> Document:
    return kind.model_validate_json(payload)


def accepted(envelope: Envelope, kind: type[D]) -> D:
    """Return the document in an envelope that this broker accepted (or made) before, whatever
    version it was signed as, in the newest's shape. Raises UnknownVersion: it isn't of `kind`."""
    payload = envelope.payload_bytes
    model = model_of(envelope.payloadType, kind)
    # Strangers choose how large their documents are: what is kept is bounded in bytes.
    parsed = _small if len(payload) <= SMALL_BYTES else _large
    return upgraded(parsed(model, payload), kind)
