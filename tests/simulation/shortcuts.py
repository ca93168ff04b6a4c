"""What this process has made itself is not taken apart again each time.

Markets are bytes through codecs for a good part of their time, and these codecs have tests and
fuzzing of their own. So what was signed here verifies; a frame or a document that was written here
is read as what was written; an index is parsed once. Each SAMPLE-th frame and document goes the
whole way all the same, and must come out equal. Whatever somebody forged, bent or damaged has been
made by nobody here, and goes the whole way always.
"""

from __future__ import annotations

import functools
import gc
import itertools
import sys
from typing import Any, TypeVar

import sublet_broker.adapters.verifying as verifying
import sublet_broker.market.accepted as accepting
import sublet_broker.service.keeping as keeping
import sublet_contracts.documents as documents
import sublet_contracts.envelope as envelopes
import sublet_contracts.session as sessions
import tests.simulation.agents as agents
from sublet_contracts.documents import Document, Signed
from sublet_contracts.keys import SigningKey
from sublet_contracts.tree import parse_index
from sublet_contracts.wire import Message
from tests.simulation.auditor import SIGNED

SAMPLE = 16
MOST = 100_000
"""So many things of one kind are remembered; then all are forgotten, and looked at anew."""
D = TypeVar("D", bound=Document)


class Frame(bytes):
    """A frame that was never written out: stands for the bytes of its message."""

    message: Message
    mid: str | None


@functools.cache
def take() -> None:
    """Take the shortcuts in this process from now on."""
    _signatures()
    _frames()
    _documents()
    cached = functools.lru_cache(4_096)(parse_index)
    for module in (keeping, verifying, agents):
        module.parse_index = cached  # type: ignore[attr-defined]
    gc.freeze()


def _signatures() -> None:
    verify, sign = envelopes.verify, SigningKey.sign

    def signed(key: SigningKey, message: bytes) -> bytes:
        signature = sign(key, message)
        if len(SIGNED) > MOST:
            SIGNED.clear()
        SIGNED.add((key.party, signature, message))
        return signature

    def verified(party: str, signature: bytes, message: bytes) -> bool:
        return (party, signature, message) in SIGNED or verify(party, signature, message)

    SigningKey.sign = signed  # type: ignore[method-assign]
    envelopes.verify = verified


def _frames() -> None:
    encode, decode = sessions.encode_frame, sessions.decode_frame
    turns = itertools.count(1)

    def written(message: Message, mid: str | None = None) -> bytes:
        if not next(turns) % SAMPLE or (mid is not None) != message.RELIABLE:
            data = encode(message, mid)
            assert decode(data) == (message, mid)
            return data
        frame = Frame()
        frame.message, frame.mid = message, mid
        return frame

    def read(data: bytes) -> tuple[Message, str | None]:
        return (data.message, data.mid) if isinstance(data, Frame) else decode(data)

    sessions.encode_frame, sessions.decode_frame = written, read


def _documents() -> None:
    sign, parse = documents.sign_document, documents.parse_document
    known: dict[tuple[type[Document], bytes], Document] = {}
    turns = itertools.count(1)

    def signed(document: D, *keys: SigningKey) -> Signed[D]:
        made = sign(document, *keys)
        if len(known) > MOST:
            known.clear()
        known[type(document), made.envelope.payload_bytes] = document
        return made

    def parsed(payload: bytes, kind: type[Any]) -> Any:
        document = known.get((kind, payload))
        if document is None or not next(turns) % SAMPLE:
            read = parse(payload, kind)
            assert document is None or read == document
            return read
        return document

    def accepted(kind: type[Any], payload: bytes) -> Any:
        return known.get((kind, payload)) or opened(kind, payload)

    opened = accepting._large
    accepting._small = accepting._large = accepted  # type: ignore[assignment]
    documents.parse_document = parsed
    for module in _users(sign):
        module.sign_document = signed


def _users(function: Any) -> list[Any]:
    """Return the modules that have taken a function by its name."""
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith(("sublet", "tests.simulation"))
        and getattr(module, function.__name__, None) is function
    ]
