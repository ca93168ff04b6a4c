"""Content in memory."""

import hashlib

from sublet_broker.service.ports import (
    BlobMissing,
)


class MemoryBlobs:
    """Content in memory (ports.BlobStore)."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

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

    def damage(self, sha256: str) -> None:
        """Flip a bit, as a bad disk would: for tests and the simulator."""
        data = self._blobs[sha256]
        self._blobs[sha256] = bytes([data[0] ^ 1]) + data[1:] if data else b"\0"
