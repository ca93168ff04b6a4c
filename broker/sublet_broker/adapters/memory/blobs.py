"""Content in memory."""

from collections.abc import Iterable

from sublet_broker.service.ports import (
    BlobMissing,
)
from sublet_contracts.digests import digest_of, shortened


class MemoryBlobs:
    """Content in memory (ports.BlobStore)."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self._packs: dict[str, bytes] = {}

    def put(self, digest: str, data: bytes) -> None:
        """Keep data. Raises ValueError if it hasn't that hash."""
        if digest_of(data) != digest:
            raise ValueError(f"the content is not that of {shortened(digest)}")
        self._blobs[digest] = data

    def get(self, digest: str) -> bytes:
        """Return the content. Raises BlobMissing, also for damaged content: that is dropped, as
        FileBlobs does it, so that it counts as missing and is sent again."""
        data = self._blobs.get(digest)
        if data is None:
            raise BlobMissing(f"no content {shortened(digest)} here")
        if digest_of(data) != digest:
            self.delete(digest)
            raise BlobMissing(f"content {shortened(digest)} was damaged")
        return data

    def has(self, digest: str) -> bool:
        """Say whether content of that name is there."""
        return digest in self._blobs

    def delete(self, digest: str) -> None:
        """Forget the content."""
        self._blobs.pop(digest, None)

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

    def damage(self, digest: str) -> None:
        """Flip a bit, as a bad disk would: for tests and the simulator."""
        data = self._blobs[digest]
        self._blobs[digest] = bytes([data[0] ^ 1]) + data[1:] if data else b"\0"
