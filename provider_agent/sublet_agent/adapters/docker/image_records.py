"""Which images this agent pulled for renters: a small file in its state folder.

It is written before a pull begins, so that an image that a dying agent left half-way is known as
ours, and after it. What can't be read counts for nothing: those images are pulled anew before a
renter gets them, and are never deleted, as if they were the owner's.
"""

import json
import os
import threading
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sublet_agent.core.kept_images import MAX_TAGS, PulledImage
from sublet_contracts.durable import fsync_folder, make_folder

_IMAGES = TypeAdapter(list[PulledImage])
MAX_FILE_BYTES = 8 * 2**20


class ImageRecords:
    """The file, or with no path the same in memory. Used from several threads."""

    def __init__(self, path: Path | None) -> None:
        """Read it. Raises OSError where it is there and can't be opened."""
        self._path = path
        self._lock = threading.Lock()
        self._images: dict[str, PulledImage] = {}
        self.damaged = ""
        """where a file was put that could not be read; '' if all is well"""
        if path is not None and path.exists():
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
            try:
                if len(data) > MAX_FILE_BYTES:
                    raise ValueError("too long")
                self._images = {one.pinned: one for one in _IMAGES.validate_json(data)}
            except (ValueError, ValidationError):
                aside = path.with_suffix(".damaged")
                path.replace(aside)
                self.damaged = str(aside)

    def all(self) -> list[PulledImage]:
        """Return what is known."""
        with self._lock:
            return list(self._images.values())

    def get(self, pinned: str) -> PulledImage | None:
        """Return the record of an image by its digest."""
        with self._lock:
            return self._images.get(pinned)

    def put(self, image: PulledImage) -> None:
        """Keep a record; it is on disk when this returns. A tag means one image at a time. Raises
        OSError."""
        with self._lock:
            looked_up = {tag for tag, _ in image.tags}
            for pinned, other in list(self._images.items()):
                left = tuple(pair for pair in other.tags if pair[0] not in looked_up)
                if left != other.tags:
                    self._images[pinned] = replace(other, tags=left)
            self._images[image.pinned] = replace(image, tags=image.tags[-MAX_TAGS:])
            self._write()

    def drop(self, pinned: str) -> None:
        """Forget one. Raises OSError."""
        with self._lock:
            if self._images.pop(pinned, None) is not None:
                self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        make_folder(self._path.parent, 0o700)
        text = json.dumps([asdict(image) for image in self._images.values()])
        part = self._path.with_suffix(".part")
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)
        fsync_folder(self._path.parent)
