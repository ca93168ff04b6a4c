"""Documents that were verified when they came in, opened again.

Facts keep the envelope as it was signed. Its signatures were checked on acceptance, so reading it
again only parses, and the parsed form is kept: a book of ten thousand offers is parsed once.
"""

from functools import lru_cache
from typing import TypeVar, cast

from sublet_contracts.documents import Document
from sublet_contracts.envelope import Envelope

D = TypeVar("D", bound=Document)


@lru_cache(maxsize=50_000)
def _parsed(kind: type[Document], payload: bytes) -> Document:
    return kind.model_validate_json(payload)


def accepted(envelope: Envelope, kind: type[D]) -> D:
    """Return the document in an envelope that this broker accepted (or made) before."""
    return cast(D, _parsed(kind, envelope.payload_bytes))
