"""Addresses of objects in S3, each signed for one move of content (ports.Addresses).

An upload's address is bound to the object's key, its length, its SHA-256 and If-None-Match: *. So
it brings exactly the content that was announced, and nothing that lies there is replaced, however
often and by whomever it is used. A read's is bound to the bytes of the chunks that were asked for:
in the same pack there may be other people's. Whether a store keeps to what is signed is tried at
the start: on one that doesn't, content goes through the broker.
"""

import base64
import hashlib
import logging
import secrets

import httpx

from sublet_broker.adapters.blobs.s3_blobs import SMALL_S, S3Blobs, blob_key, pack_key
from sublet_broker.adapters.blobs.s3_place import PlaceRefused
from sublet_broker.adapters.blobs.sigv4 import presigned
from sublet_broker.service.ports import BlobsAway
from sublet_contracts.addresses import range_of

log = logging.getLogger("sublet.blobs")

EXPIRES_S = 900
"""A store looks at it when the request begins."""


class S3Addresses:
    """ports.Addresses."""

    def __init__(self, blobs: S3Blobs, expires_s: int = EXPIRES_S) -> None:
        self._blobs = blobs
        self._place = blobs.place
        self._key = blobs.key
        self._expires_s = expires_s

    def upload(
        self, pack: str, size_bytes: int, sha256: str, now_ms: int
    ) -> tuple[str, dict[str, str]]:
        """See ports.Addresses."""
        return self._put(pack_key(pack), size_bytes, sha256, now_ms)

    def read_pack(self, pack: str, offset_bytes: int, size_bytes: int, now_ms: int) -> str:
        """See ports.Addresses."""
        return self._get(pack_key(pack), offset_bytes, size_bytes, now_ms)

    def read_blob(self, digest: str, size_bytes: int, now_ms: int) -> str:
        """See ports.Addresses."""
        return self._get(blob_key(digest), 0, size_bytes, now_ms)

    def _get(self, key: str, offset_bytes: int, size_bytes: int, now_ms: int) -> str:
        return self._signed("GET", key, now_ms, {"range": range_of(offset_bytes, size_bytes)})

    def _put(
        self, key: str, size_bytes: int, sha256: str, now_ms: int
    ) -> tuple[str, dict[str, str]]:
        headers = {
            "content-length": str(size_bytes),
            "if-none-match": "*",
            "x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(sha256)).decode(),
        }
        return self._signed("PUT", key, now_ms, headers), headers

    def _signed(self, method: str, key: str, now_ms: int, headers: dict[str, str]) -> str:
        try:
            mine = self._key()
        except PlaceRefused as error:
            raise BlobsAway(str(error)) from error
        return presigned(
            method,
            self._place,
            key,
            mine,
            now_ms=now_ms,
            expires_s=self._expires_s,
            headers=headers,
        )

    def why_not(self, now_ms: int) -> str:
        """Try whether the store keeps to what an address says; return what it doesn't, or ''.

        Raises PlaceRefused: it doesn't answer.
        """
        name = f"probe/{secrets.token_hex(32)}"
        said = secrets.token_bytes(64)
        sha256 = hashlib.sha256(said).hexdigest()
        url, headers = self._put(name, len(said), sha256, now_ms)
        without = {key: value for key, value in headers.items() if key != "if-none-match"}
        try:
            with httpx.Client(timeout=SMALL_S, verify=self._place.ca_bundle or True) as http:
                # In this order: what would be taken wrongly would lie there for the next.
                if http.put(url, content=secrets.token_bytes(64), headers=headers).is_success:
                    return "it takes other bytes than the address is for"
                if http.put(url, content=said, headers=without).is_success:
                    return "it takes uploads without the headers that were signed"
                if (first := http.put(url, content=said, headers=headers)).is_error:
                    return f"it refuses an upload to an address with {first.status_code}"
                if http.put(url, content=said, headers=headers).status_code != 412:
                    return "it replaces what is there"
                there = self._get(name, 1, 3, now_ms)
                read = http.get(there, headers={"range": range_of(1, 3)})
                if read.status_code != 206 or read.content != said[1:4]:
                    return "it doesn't give parts of an object"
                others = ({"range": range_of(0, 64)}, {"range": range_of(1, 4)}, None)
                if any(http.get(there, headers=other).is_success for other in others):
                    return "it gives other parts of an object than the address is for"
                return ""
        except httpx.HTTPError as error:
            raise PlaceRefused(
                f"{self._place.url} at {self._place.endpoint} does not answer: "
                f"{type(error).__name__}"
            ) from error
        finally:
            self._blobs.forget_probe(name)
