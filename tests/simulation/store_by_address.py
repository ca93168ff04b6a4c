"""A store in memory that keeps to its addresses, as S3 does: for use-cases and the simulator."""

from __future__ import annotations

import hashlib
import json

from sublet_broker.service.ports import BlobMissing, BlobStore

EXPIRES_MS = 900_000
PREFIX = "https://store.example/"


class StoreByAddress:
    """ports.Addresses over blobs in memory, and what answers at them."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    def upload(
        self, pack: str, size_bytes: int, sha256: str, now_ms: int
    ) -> tuple[str, dict[str, str]]:
        """See ports.Addresses."""
        until_ms = now_ms + EXPIRES_MS
        return PREFIX + json.dumps(["PUT", pack, size_bytes, sha256, until_ms]), {}

    def read_pack(self, pack: str, offset_bytes: int, size_bytes: int, now_ms: int) -> str:
        """See ports.Addresses."""
        return PREFIX + json.dumps(["GET", pack, offset_bytes, size_bytes, now_ms + EXPIRES_MS])

    def read_blob(self, digest: str, size_bytes: int, now_ms: int) -> str:
        """See ports.Addresses."""
        return PREFIX + json.dumps(["BLOB", digest, 0, size_bytes, now_ms + EXPIRES_MS])

    def put(self, url: str, data: bytes, now_ms: int) -> int:
        """Put this at an upload's address; return the status."""
        method, _, size_bytes, sha256, until_ms = json.loads(url.removeprefix(PREFIX))
        if method != "PUT" or now_ms > until_ms or len(data) != size_bytes:
            return 403
        if hashlib.sha256(data).hexdigest() != sha256:
            return 400
        return self.keep(url, data)

    def keep(self, url: str, data: bytes) -> int:
        """Keep this, whatever it is, if nothing lies there."""
        pack: str = json.loads(url.removeprefix(PREFIX))[1]
        if self._blobs.has_pack(pack):
            return 412
        self._blobs.put_pack(pack, [data])
        return 200

    def get(self, url: str, offset_bytes: int, size_bytes: int, now_ms: int) -> bytes | None:
        """Return what is read at an address, if there is something."""
        method, name, *signed_for, until_ms = json.loads(url.removeprefix(PREFIX))
        assert [offset_bytes, size_bytes] == signed_for, "nothing else is read there"
        if now_ms > until_ms:
            return None
        try:
            if method == "BLOB":
                return self._blobs.get(name)[offset_bytes : offset_bytes + size_bytes]
            return self._blobs.read_pack(name, offset_bytes, size_bytes)
        except BlobMissing:
            return None
