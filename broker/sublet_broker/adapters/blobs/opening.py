"""Where blobs lie, in one text: a folder's path, or s3://bucket/prefix."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from sublet_broker.adapters.blobs.file_blobs import FileBlobs
from sublet_broker.adapters.blobs.s3_blobs import S3Blobs
from sublet_broker.adapters.blobs.s3_place import SCHEME, credentials, place_of
from sublet_broker.service.ports import BlobStore


def open_s3(where: str, environment: Mapping[str, str]) -> S3Blobs:
    """Return the store at an s3:// address. Raises PlaceRefused."""
    return S3Blobs(place_of(where, environment), partial(credentials, environment))


def open_blobs(where: str, environment: Mapping[str, str]) -> BlobStore:
    """Return the store that lies there. Raises PlaceRefused."""
    if where.startswith(SCHEME):
        return open_s3(where, environment)
    return FileBlobs(Path(where))
