"""Receiving many megabytes for little processor time.

Rules:
- While a large body comes, up to READ_BYTES of it are read at once, and handed on as they came:
  uvicorn would copy them twice.
- Memory that becomes free is kept for the next piece: asked of the system anew each time, the pages
  cost more than to receive, hash and write what comes into them.
- What is said besides a body (request line, headers, the framing of a body in chunks) is bounded
  before it is kept: httptools itself takes any length.
"""

import asyncio
import ctypes
from typing import Self

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

READ_BYTES = 1 << 20
LARGE_BYTES = 4 * READ_BYTES
"""A body of so many bytes is large."""
MAX_HEAD_BYTES = 64 * 1024
_FRAMING = 8
"""times a body's bytes may come besides, so that one in tiny chunks is taken as well"""
_KEPT_BYTES = 96 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_BYTES = 32 << 20
"""the most that glibc takes"""


class _Pieces:
    """What of a body has come and wasn't asked for yet: of a bytearray what uvicorn uses, without a
    copy where it is one piece."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size_bytes = 0

    def __iadd__(self, piece: bytes) -> Self:
        self._pieces.append(piece)
        self._size_bytes += len(piece)
        return self

    def __len__(self) -> int:
        return self._size_bytes

    def __bytes__(self) -> bytes:
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)


class LargeBodies(HttpToolsProtocol):
    """One connection."""

    _usual_bytes = _come_bytes = _body_bytes = 0
    _is_large = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._usual_bytes = int(getattr(transport, "max_size", 0))

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._come_bytes += len(data)
        super().data_received(data)
        besides = self._come_bytes - self._body_bytes
        too_much = besides > MAX_HEAD_BYTES + _FRAMING * self._body_bytes
        if too_much and not self.transport.is_closing():
            self.logger.warning("a request says too much besides its body")
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response("Its head is too long.")
            else:
                self.transport.abort()

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        super().on_headers_complete()
        length = next((value for name, value in self.headers if name == b"content-length"), b"")
        self._is_large = length.isdigit() and int(length[:20]) >= LARGE_BYTES
        self._read_at_once(READ_BYTES if self._is_large else self._usual_bytes)

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._body_bytes += len(body)
        if self._is_large and not self.cycle.body:
            self.cycle.body = _Pieces()  # type: ignore[assignment]
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        super().on_message_complete()
        self._come_bytes = self._body_bytes = 0
        self._is_large = False
        self._read_at_once(self._usual_bytes)

    def _read_at_once(self, size_bytes: int) -> None:
        if self._usual_bytes:  # asyncio's own transport: it has this attribute
            self.transport.max_size = size_bytes  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Have this process keep memory that becomes free, up to _KEPT_BYTES. Where the C library isn't
    glibc all works as well, and slower."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
