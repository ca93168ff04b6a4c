"""Work on packs that takes reading them: whether what lies there is what it should be, and moving
what is needed of some into a new one. It may be done elsewhere (ports.PackWork); this is the work.
"""

from collections.abc import Sequence

from sublet_broker.market.facts import ContentFact
from sublet_broker.service.content.hashes import is_content
from sublet_broker.service.ports import BlobMissing, BlobStore, PackVerdict
from sublet_contracts.packs import ChunkDiffers, PackReader, PackRefused

READ_BYTES = 4 * 1024 * 1024
READS = 2
"""A bit that flipped on the way is no damage: what doesn't match is read once more."""


class OwnPackWork:
    """ports.PackWork in this process."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    def check(self, pack: str, name: str, table: bytes, size_bytes: int) -> PackVerdict:
        """See ports.PackWork."""
        reader = PackReader(name)
        try:
            reader.feed(table)
            at = 0
            # One byte more than there should be: what comes then is too long.
            while at <= size_bytes:
                asked = min(READ_BYTES, size_bytes + 1 - at)
                data = self._blobs.read_pack(pack, at, asked)
                reader.feed(data)
                at += len(data)
                if len(data) < asked:
                    break
            reader.close()
        except BlobMissing:
            return PackVerdict(there=False)
        except ChunkDiffers as error:
            return PackVerdict(there=True, wrong=str(error), chunk=error.digest)
        except PackRefused as error:
            return PackVerdict(there=True, wrong=str(error))
        return PackVerdict(there=True)

    def whole(self, contents: Sequence[ContentFact]) -> list[bool]:
        """See ports.PackWork."""
        return [self.read(content) is not None for content in contents]

    def move(self, contents: Sequence[ContentFact], to: str) -> list[bool]:
        """See ports.PackWork."""
        found = [self.read(content) for content in contents]
        parts = [data for data in found if data is not None]
        if parts:
            self._blobs.put_pack(to, parts)
        return [data is not None for data in found]

    def read(self, content: ContentFact) -> bytes | None:
        """Return content that lies in a pack, if it lies there whole."""
        for _ in range(READS):
            try:
                data = self._blobs.read_pack(content.pack, content.offset_bytes, content.size_bytes)
            except BlobMissing:
                return None
            if is_content(content, data):
                return data
        return None
