"""What this process has made itself is not taken apart again each time.

Markets are bytes through codecs for a good part of their time, and these codecs have tests and
fuzzing of their own. So what was signed here verifies, and what is signed gets a hash in the place
of a signature; a frame or a document that was written here is read as what was written; an index is
parsed once. Each SAMPLE-th signature, frame and document goes the whole way all the same, and must
come out right. Whatever somebody forged, bent or damaged has been
made by nobody here, and goes the whole way always.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import sublet_broker.adapters.blobs.verifying as verifying
import sublet_broker.market.accepted as accepting
import sublet_broker.service.content.retention as keeping
import sublet_contracts.documents as documents
import sublet_contracts.envelope as envelopes
import sublet_contracts.session as sessions
import tests.simulation.transfer as transfer
from sublet_contracts.documents import Document, Signed
from sublet_contracts.keys import SigningKey
from sublet_contracts.tree import parse_index
from sublet_contracts.versions import Reads
from sublet_contracts.wire import Message
from tests.simulation.models import SIGNED

SAMPLE = 16
MOST = 100_000
"""So many things of one kind are remembered; then all are forgotten, and looked at anew."""
D = TypeVar("D", bound=Document)


class Frame(bytes):
    """A frame that was never written out: stands for the bytes of its message."""

    message: Message
    mid: str | None


_known: dict[tuple[type[Document], bytes], Document] = {}
_turns = itertools.count(1)


@contextlib.contextmanager
def taken() -> Iterator[None]:
    """Take the shortcuts meanwhile, in one market."""
    SIGNED.clear()
    with contextlib.ExitStack() as undo:
        for place, name, value in _shortcuts():
            undo.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        yield


@functools.cache
def _shortcuts() -> tuple[tuple[Any, str, Any], ...]:
    """Return what is put into whose place, by module (or class) and name."""
    return (*_signatures(), *_frames(), *_documents(), *_indexes())


def _signatures() -> Iterator[tuple[Any, str, Any]]:
    verify, sign = envelopes.verify, SigningKey.sign

    def signed(key: SigningKey, message: bytes) -> bytes:
        if next(_turns) % SAMPLE:
            signature = hashlib.sha512(key.party.encode() + message).digest()
        else:
            signature = sign(key, message)
            assert verify(key.party, signature, message)
        SIGNED.add((key.party, signature, message))
        return signature

    def verified(party: str, signature: bytes, message: bytes) -> bool:
        return (party, signature, message) in SIGNED or verify(party, signature, message)

    yield SigningKey, "sign", signed
    yield envelopes, "verify", verified


def _frames() -> Iterator[tuple[Any, str, Any]]:
    encode, decode = sessions.encode_frame, sessions.decode_frame

    def written(message: Message, mid: str | None = None) -> bytes:
        if not next(_turns) % SAMPLE or (mid is not None) != message.RELIABLE:
            data = encode(message, mid)
            assert decode(data) == (message, mid)
            return data
        frame = Frame()
        frame.message, frame.mid = message, mid
        return frame

    def read(data: bytes) -> tuple[Message, str | None]:
        return (data.message, data.mid) if isinstance(data, Frame) else decode(data)

    yield sessions, "encode_frame", written
    yield sessions, "decode_frame", read


def _documents() -> Iterator[tuple[Any, str, Any]]:
    sign, parse, opened = documents.sign_document, documents.parse_document, accepting._large

    def signed(document: D, *keys: SigningKey, reads: Reads | None = None) -> Signed[D]:
        made = sign(document, *keys, reads=reads)
        if len(_known) > MOST:
            _known.clear()
        if made.envelope.payloadType == document.payload_type():
            _known[type(document), made.envelope.payload_bytes] = document
        return made

    def parsed(payload: bytes, kind: type[Any]) -> Any:
        document = _known.get((kind, payload))
        if document is None or not next(_turns) % SAMPLE:
            read = parse(payload, kind)
            assert document is None or read == document
            return read
        return document

    def accepted(kind: type[Any], payload: bytes) -> Any:
        return _known.get((kind, payload)) or opened(kind, payload)

    yield documents, "parse_document", parsed
    yield accepting, "_small", accepted
    yield accepting, "_large", accepted
    for module in _users(sign):
        yield module, "sign_document", signed


def _indexes() -> Iterator[tuple[Any, str, Any]]:
    cached = functools.lru_cache(4_096)(parse_index)
    for module in (keeping, verifying, transfer):
        yield module, "parse_index", cached


def _users(function: Any) -> list[Any]:
    """Return the modules that have taken a function by its name."""
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith(("sublet", "tests.simulation"))
        and getattr(module, function.__name__, None) is function
    ]
