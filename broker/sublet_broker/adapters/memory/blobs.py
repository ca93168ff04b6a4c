"""Content in memory."""

import hashlib
from collections.abc import Iterable

from sublet_broker.service.ports import (
    BlobMissing,
)


class MemoryBlobs:
    """Content in memory (ports.BlobStore)."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self._packs: dict[str, bytes] = {}

    def put(self, sha256: str, data: bytes) -> None:
        """Keep data. Raises ValueError if it hasn't that hash."""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"the content is not that of {sha256[:10]}")
        self._blobs[sha256] = data

    def get(self, sha256: str) -> bytes:
        """Return the content. Raises BlobMissing, also for damaged content: that is dropped, as
        FileBlobs does it, so that it counts as missing and is sent again."""
        data = self._blobs.get(sha256)
        if data is None:
            raise BlobMissing(f"no content {sha256[:10]} here")
        if hashlib.sha256(data).hexdigest() != sha256:
            self.delete(sha256)
            raise BlobMissing(f"content {sha256[:10]} was damaged")
        return data

    def has(self, sha256: str) -> bool:
        """Say whether content of that name is there."""
        return sha256 in self._blobs

    def delete(self, sha256: str) -> None:
        """Forget the content."""
        self._blobs.pop(sha256, None)

    def names(self) -> list[str]:
        """Return the hashes of all content."""
        return sorted(self._blobs)

    def put_pack(self, pack: str, parts: Iterable[bytes]) -> None:
        """Keep a pack."""
        self._packs[pack] = b"".join(parts)

    def read_pack(self, pack: str, offset_bytes: int, size_bytes: int) -> bytes:
        """Return some of a pack. Raises BlobMissing."""
        data = self._packs.get(pack)
        if data is None:
            raise BlobMissing(f"no pack {pack[:10]} here")
        return data[offset_bytes : offset_bytes + size_bytes]

    def has_pack(self, pack: str) -> bool:
        """Say whether the pack is there."""
        return pack in self._packs

    def delete_pack(self, pack: str) -> None:
        """Forget the pack."""
        self._packs.pop(pack, None)

    def set_pack_aside(self, pack: str) -> None:
        """Forget the pack."""
        self.delete_pack(pack)

    def packs(self) -> list[str]:
        """Return the ids of all packs."""
        return sorted(self._packs)

    def damage_pack(self, pack: str, offset_bytes: int) -> None:
        """Flip a bit of that byte."""
        data = bytearray(self._packs[pack])
        data[offset_bytes] ^= 1
        self._packs[pack] = bytes(data)

    def damage(self, sha256: str) -> None:
        """Flip a bit, as a bad disk would: for tests and the simulator."""
        data = self._blobs[sha256]
        self._blobs[sha256] = bytes([data[0] ^ 1]) + data[1:] if data else b"\0"
