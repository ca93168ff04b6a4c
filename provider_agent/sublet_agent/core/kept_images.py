"""Which images of renters this machine keeps, and which go when room is short. Pure. Rules:

1. A renter may use an image that this agent pulled for renters: it came without the owner's login,
   so anybody can have it. What else lies in the engine is the owner's.
2. Counted against the disk that is offered, together with what runs may write: what was pulled for
   renters and wasn't here before. Layers that two images share count twice: they go rather early.
3. The least recently used goes first; never one that a lease still needs, nor one that the owner
   had before, nor one that he lists.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

FRESH_MS = 3_600_000
"""A tag is looked up anew once it was looked up so long ago."""
RESERVED_BYTES = 2 * 2**30
"""what is left free on the engine's disk"""
MAX_TAGS = 32
MAX_IMAGES = 1_000


@dataclass(frozen=True)
class PulledImage:
    """An image that was pulled for renters."""

    pinned: str
    """registry/repository@sha256:..."""
    image_id: str = ""
    """'': the pull has begun, and nobody has seen its end"""
    size_bytes: int = 0
    pulled_ms: int = 0
    last_used_ms: int = 0
    owner_had: bool = False
    """It was in the engine before, and not by us."""
    tags: tuple[tuple[str, int], ...] = ()
    """what was looked up and gave this image, and when"""

    def looked_up_ms(self, reference: str) -> int | None:
        """Return when a reference was last found to mean this image; None: it wasn't."""
        return dict(self.tags).get(reference)

    def is_named_by(self, names: Collection[str]) -> bool:
        """Say whether one of these references or ids means it."""
        own = {self.pinned, self.image_id, *(tag for tag, _ in self.tags)}
        return not own.isdisjoint(names)


def room_for_images(
    *,
    offered_bytes: int,
    reserved_bytes: int,
    held_bytes: int,
    free_bytes: int,
    unwritten_bytes: int,
) -> int:
    """Return how much images may hold now.

    `offered_bytes` is what the owner offers in all (0: what the disk has), `reserved_bytes` what
    the runs asked for; `held_bytes` is what images hold now, `free_bytes` what the engine's disk
    has left, and `unwritten_bytes` what runs may still write there.
    """
    by_disk = held_bytes + free_bytes - unwritten_bytes - RESERVED_BYTES
    by_offer = offered_bytes - reserved_bytes if offered_bytes else by_disk
    return max(0, min(by_disk, by_offer))


def held_bytes(images: Iterable[PulledImage]) -> int:
    """Return what counts as held by renters' images."""
    return sum(image.size_bytes for image in images if not image.owner_had)


def images_to_evict(
    images: Collection[PulledImage], limit_bytes: int, in_use: Collection[str]
) -> list[PulledImage]:
    """Return what has to go so that the rest fits `limit_bytes`, in that order. `in_use` are
    references and ids that are needed."""
    held = held_bytes(images)
    chosen: list[PulledImage] = []
    for image in sorted(images, key=lambda one: (one.last_used_ms, one.pinned)):
        if held <= limit_bytes and len(images) - len(chosen) <= MAX_IMAGES:
            break
        if image.owner_had or not image.image_id or image.is_named_by(in_use):
            continue
        chosen.append(image)
        held -= image.size_bytes
    return chosen


def fits_platform(architecture: str, platforms: Iterable[tuple[str, str]]) -> bool:
    """Say whether a machine can run one of an image's (os, architecture); if none is told, it may.

    An entry of `unknown` describes no image (build records are listed so).
    """
    told = [one for one in platforms if one[0] not in ("", "unknown") and one[1] != "unknown"]
    runs = _ALSO_RUNS.get(architecture, (architecture,))
    return not told or any(os == "linux" and (not arch or arch in runs) for os, arch in told)


_ALSO_RUNS = {"amd64": ("amd64", "386"), "arm64": ("arm64", "arm")}
