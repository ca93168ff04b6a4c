"""How content is named: by the algorithm and what it makes of the bytes.

    blake3:<64 hex digits>

Chunks, tree indexes and the tables of packs are named so; documents, the log and signatures have
SHA-256 of their own. There is one algorithm today. The name says which, so that another can come
beside it without a doubt of what an old name means; a name with one that isn't known is refused.
"""

import re
from typing import Self

from blake3 import blake3

ALGORITHM = "blake3"
RAW_BYTES = 32
"""of a digest as it stands in a pack's table"""
PATTERN = rf"{ALGORITHM}:[0-9a-f]{{{2 * RAW_BYTES}}}"
_PREFIX = f"{ALGORITHM}:"
_WHOLE = re.compile(PATTERN)
_SHOWN_DIGITS = 10

Bytes = bytes | bytearray | memoryview


class Hasher:
    """Hashes content that passes by piece by piece."""

    def __init__(self) -> None:
        self._hash = blake3()

    def update(self, data: Bytes) -> Self:
        """Take the next piece. Other threads run meanwhile."""
        self._hash.update(data)
        return self

    def digest(self) -> str:
        """Return the digest of all that has passed."""
        return _PREFIX + self._hash.hexdigest()


def digest_of(data: Bytes) -> str:
    """Return the digest of content."""
    return _PREFIX + blake3(data).hexdigest()


def is_digest(text: str) -> bool:
    """Say whether this is a digest, by an algorithm that is known."""
    return _WHOLE.fullmatch(text) is not None


def hex_of(digest: str) -> str:
    """Return the hex digits of a digest. Raises ValueError: it is none."""
    if not is_digest(digest):
        raise ValueError(f"content is named {_PREFIX} and 64 lower-case hex digits")
    return digest[len(_PREFIX) :]


def from_hex(digits: str) -> str:
    """Return the digest that has these hex digits. Raises ValueError: there is none."""
    digest = _PREFIX + digits
    hex_of(digest)
    return digest


def raw_of(digest: str) -> bytes:
    """Return a digest as it stands in a pack's table. Raises ValueError: it is none."""
    return bytes.fromhex(hex_of(digest))


def from_raw(raw: bytes) -> str:
    """Return the digest that stands in a pack's table. Raises ValueError: there is none."""
    return from_hex(raw.hex())


def shortened(digest: str) -> str:
    """Return as much of a digest as people need to tell it from others."""
    return digest[: len(_PREFIX) + _SHOWN_DIGITS]
