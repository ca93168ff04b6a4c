"""Which image a renter gets on the owner's machine, and how it comes here.

- A renter gets what this agent pulled for renters (image_records.py), or what the owner lists. All
  else that lies in the engine is the owner's own: asked for by name it is pulled anew, without a
  login, and for a private one that fails.
- Pulled once for all who want it, in a thread of its own. Whoever no longer waits leaves, and the
  last one who does ends the pull.
- A tag is looked up first, before its job's lease is signed; it is pulled by digest and run by the
  image's id. Lookups are repeated after a while (`FRESH_MS`); if the registry is in trouble then,
  the image of before is used.

Not covered: who knows the hashes of a private image's layers, packed and unpacked, can name them in
an image of his own, and the engine takes layers that it has from itself. They stand in the private
image's manifest only, and are as secret as that.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import docker
import requests
from docker.errors import DockerException

from sublet_agent.adapters.docker.image_engine import (
    Ending,
    EngineLost,
    Found,
    ImageEngine,
    Refused,
    printable,
)
from sublet_agent.adapters.docker.image_records import ImageRecords
from sublet_agent.core import registry_addresses
from sublet_agent.core.kept_images import (
    FRESH_MS,
    PulledImage,
    fits_platform,
    held_bytes,
    images_to_evict,
    room_for_images,
)
from sublet_agent.core.pull_progress import PullProgress
from sublet_agent.core.pull_troubles import PullTrouble, trouble_of
from sublet_agent.core.runner_port import (
    Cancel,
    ImageNeeds,
    ImageNotAllowed,
    ImageTrouble,
    ImageUnknown,
    PullCancelled,
    PullFailed,
    ResolvedImage,
    RunnerError,
    RunnerUnavailable,
    require_pinned,
)
from sublet_contracts.amounts import format_bytes
from sublet_contracts.image_references import (
    ImageReference,
    ReferenceRefused,
    host_and_port,
    is_image_id,
    parse_reference,
)

THREAD_NAME = "sublet-agent-pull"
NO_CAP_BYTES = 2**62
LOOK_UP_S = 10.0
"""how long a registry may take to say what a tag means; the lease that waits for it has less"""
MAX_TAGS_FOUND = 256
LEAST_FREE_BYTES = 2**30
"""A pull ends when the engine's disk has less left, or less than half of what it had before."""
_LOOK_S = 0.1
_DISK_LOOK_S = 1.0
_TELL_S = 15.0
_HTTPS_PORT = 443


@dataclass(frozen=True)
class ImageRules:
    """What the owner lets renters use."""

    allowed: tuple[str, ...] = ()
    """images, local ones too, by name or id"""
    registries: tuple[str, ...] = ()
    """registries, HOST or HOST:PORT, that may have any address"""
    cap_bytes: int = NO_CAP_BYTES
    """the most for one image, packed and unpacked"""
    stall_s: float = 120.0
    """A pull without bytes for so long is ended."""


EVERYBODYS = ImageRules()
"""nothing but what anybody can pull"""


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def addresses_of(host: str, port: int) -> list[str]:
    """Return where a host is, by this machine's resolver. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(info[4][0]).partition("%")[0] for info in found]


class _Pull:
    """One image on its way, for all who wait for it."""

    def __init__(self, progress: PullProgress) -> None:
        self.progress = progress
        self.ending = Ending()
        self.finished = threading.Event()
        self.waiting = 0
        self.trouble: PullTrouble | None = None
        """why it was ended from here; None: it wasn't"""
        self.free_before_bytes = 0
        self.free_looked_s = time.monotonic()
        self.image: PulledImage | None = None
        self.error: Exception | None = None
        self.note = ""

    def end(self, trouble: PullTrouble) -> None:
        """End it."""
        self.trouble = self.trouble or trouble
        self.ending.end()


class DockerImages:
    """The images of one agent. All methods may be called from several threads."""

    def __init__(
        self,
        client: Callable[[], docker.DockerClient],
        *,
        rules: ImageRules = EVERYBODYS,
        state: Path | None = None,
        now_ms: Callable[[], int] = _now_ms,
        addresses: Callable[[str, int], Iterable[str]] = addresses_of,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        """`state` is the agent's folder; without one nothing is remembered. Raises OSError."""
        self._engine = ImageEngine(client, rules.stall_s)
        self._rules = rules
        self._state = state
        self._records = ImageRecords(state / "images.json" if state else None)
        self._now_ms = now_ms
        self._addresses = addresses
        self._free_bytes = free_bytes or self._engine.free_bytes
        self._lock = threading.Lock()
        self._pulls: dict[str, _Pull] = {}
        self._tags_found: dict[str, tuple[ImageReference, int]] = {}
        """what tags mean that were looked up and not pulled yet: digest -> tag, and when"""
        self._half_pulled = {one.pinned for one in self._records.all() if not one.image_id}

    # -- what the runner asks ----------------------------------------------------------------------

    def ensure(
        self,
        image: str,
        progress: Callable[[str], None],
        policy: Literal["digest", "any"],
        cancel: Cancel | None = None,
    ) -> ResolvedImage:
        """Have an image here that a renter may use. Raises ImageTrouble, PullCancelled,
        RunnerUnavailable."""
        reference = _read(image)
        known = self._recorded(reference) if reference else None
        require_pinned(image, policy, known.pinned if known else None)
        at_hand = self._at_hand(image, reference)
        if at_hand is not None:
            return at_hand
        if reference is None:
            raise ImageUnknown(
                f"image {image} is not one that renters can use here, and an id alone can't be "
                "pulled: name it name@sha256:<digest>. A job that began on an owner's local image "
                "goes on only where the owner allows that image too (--allow-image)"
            )
        pull = self._join(reference)
        try:
            progress(f"pulling the image {reference}")
            return self._wait(pull, image, progress, cancel or threading.Event())
        finally:
            self._leave(reference, pull)

    def look_up(self, image: str) -> str:
        """Return what a tag means now, by content: REGISTRY/REPOSITORY@sha256:..., or the id of an
        image that the owner lists and no registry knows. Raises ImageTrouble, RunnerUnavailable."""
        reference = _read(image)
        at_hand = self._at_hand(image, reference)
        if at_hand is not None:
            return at_hand.digest or at_hand.image_id
        if reference is None or reference.is_pinned:
            return image
        try:
            self._check_registry(reference)
            found = self._engine.look_up(reference, LOOK_UP_S)
            self._check_platform(found)
        except Refused as refused:
            known = self._recorded(reference)
            if known is None or refused.trouble.is_unknown or not self._is_here(known):
                raise _failure(image, refused, self._rules) from refused
            return known.pinned
        except Exception as error:
            raise _failure(image, error, self._rules) from error
        pinned = str(reference.pinned(found.digest))
        known = self._records.get(pinned)
        if known is not None:
            with suppress(OSError):  # Then it is looked up again.
                self._records.put(_looked_up(known, reference, self._now_ms()))
        else:
            with self._lock:
                self._tags_found[pinned] = (reference, self._now_ms())
                while len(self._tags_found) > MAX_TAGS_FOUND:
                    del self._tags_found[next(iter(self._tags_found))]
        return pinned

    def id_of(self, image: str) -> str:
        """Return the id of an image that is here, by which it is run. Raises ImageTrouble."""
        found = self._at_hand(image, _read(image))
        if found is None:
            raise PullFailed(f"image {_shown(image)}: it is not here any more")
        return found.image_id

    def tidy(self, needs: ImageNeeds) -> list[str]:
        """Let go of images until the rest fits. Returns what went, in words."""
        self._finish_records()
        said = []
        if self._records.damaged:
            said.append(
                "the list of images that were pulled for renters could not be read and lies in "
                f"{self._records.damaged} now: those images are not deleted by this agent"
            )
            self._records.damaged = ""
        images = self._records.all()
        held = held_bytes(images)
        shares = self._state is not None and self._engine.shares_disk_with(self._state)
        limit = room_for_images(
            offered_bytes=needs.offered_bytes,
            reserved_bytes=needs.reserved_bytes,
            held_bytes=held,
            free_bytes=self._free_bytes(),
            unwritten_bytes=needs.unwritten_bytes if shares else 0,
        )
        with self._lock:
            on_their_way = set(self._pulls)
        in_use = {*_written_out(needs.in_use), *on_their_way}
        if images_to_evict(images, limit, in_use):
            in_use |= self._allowed_ids()
        for image in images_to_evict(images, limit, in_use):
            if self._engine.remove(image.pinned):
                self._records.drop(image.pinned)
                said.append(f"let go of {image.pinned} ({format_bytes(image.size_bytes)})")
        return said

    def hold_bytes(self, folder: Path) -> int:
        """Return what renters' images hold of a folder's disk."""
        return held_bytes(self._records.all()) if self._engine.shares_disk_with(folder) else 0

    # -- what is here ------------------------------------------------------------------------------

    def _at_hand(self, image: str, reference: ImageReference | None) -> ResolvedImage | None:
        """Return an image that a renter may use and that needs no look-up."""
        allowed = self._allowed_ids()
        if allowed:
            local = self._engine.inspect(image)
            if local is not None and str(local["Id"]) in allowed:
                pinned = _pinned_name(local, reference)
                return _resolved(image, str(local["Id"]), pinned, local.get("Size"))
        if reference is None:
            known = next((one for one in self._records.all() if one.image_id == image), None)
        else:
            known = self._recorded(reference)
            if known is not None and not reference.is_pinned:
                looked_up_ms = known.looked_up_ms(str(reference)) or 0
                if not 0 <= self._now_ms() - looked_up_ms < FRESH_MS:
                    return None
        return self._used(image, known) if known else None

    def _recorded(self, reference: ImageReference) -> PulledImage | None:
        if reference.is_pinned:
            return self._records.get(str(reference))
        name = str(reference)
        return next((one for one in self._records.all() if one.looked_up_ms(name)), None)

    def _used(self, image: str, known: PulledImage) -> ResolvedImage | None:
        """Return a recorded image if the engine still has it."""
        if not self._is_here(known):
            return None
        # A full disk is others' to tell of: this goes earlier, that is all.
        with suppress(OSError):
            self._records.put(replace(known, last_used_ms=self._now_ms()))
        return _resolved(image, known.image_id, known.pinned, known.size_bytes)

    def _is_here(self, known: PulledImage) -> bool:
        too_big = known.size_bytes > self._rules.cap_bytes and not known.owner_had
        return bool(known.image_id) and not too_big and bool(self._engine.inspect(known.image_id))

    def _allowed_ids(self) -> set[str]:
        found = (self._engine.inspect(name) for name in self._rules.allowed)
        return {str(one["Id"]) for one in found if one}

    def _finish_records(self) -> None:
        """See what became of pulls whose end nobody saw, because the agent died."""
        with self._lock:
            half_pulled, self._half_pulled = self._half_pulled, set()
        for pinned in half_pulled:
            known = self._records.get(pinned)
            if known is not None and not known.image_id:
                self._finished(known)

    # -- waiting -----------------------------------------------------------------------------------

    def _join(self, reference: ImageReference) -> _Pull:
        name = str(reference)
        with self._lock:
            pull = self._pulls.get(name)
            if pull is None or pull.trouble is not None:
                progress = PullProgress(
                    stall_ms=int(self._rules.stall_s * 1000),
                    cap_bytes=self._rules.cap_bytes,
                    moved_ms=_monotonic_ms(),
                )
                pull = self._pulls[name] = _Pull(progress)
                threading.Thread(
                    target=self._run, args=(reference, pull), name=THREAD_NAME, daemon=True
                ).start()
            pull.waiting += 1
            return pull

    def _leave(self, reference: ImageReference, pull: _Pull) -> None:
        with self._lock:
            pull.waiting -= 1
            if pull.waiting == 0:
                if self._pulls.get(str(reference)) is pull:
                    del self._pulls[str(reference)]
                pull.end(PullTrouble.OTHER)

    def _wait(
        self,
        pull: _Pull,
        image: str,
        progress: Callable[[str], None],
        cancel: Cancel,
    ) -> ResolvedImage:
        told_s = time.monotonic()
        while not pull.finished.wait(_LOOK_S):
            if cancel.is_set():
                raise PullCancelled(f"image {_shown(image)}: nobody waits for it any more")
            self._look(pull)
            if pull.trouble is not None:
                raise _failure(image, Refused(pull.trouble), self._rules)
            if time.monotonic() - told_s >= _TELL_S:
                told_s = time.monotonic()
                progress(_so_far(pull.progress))
        if pull.trouble is not None:
            raise _failure(image, Refused(pull.trouble), self._rules)
        if pull.note:
            progress(pull.note)
        if pull.image is not None:
            found = pull.image
            return _resolved(image, found.image_id, found.pinned, found.size_bytes)
        raise _failure(image, pull.error, self._rules) from pull.error

    def _look(self, pull: _Pull) -> None:
        if pull.progress.is_still(_monotonic_ms()):
            pull.end(PullTrouble.STILL)
        elif pull.progress.is_too_big:
            pull.end(PullTrouble.TOO_BIG)
        elif time.monotonic() - pull.free_looked_s >= _DISK_LOOK_S and pull.free_before_bytes:
            # A small layer can unpack to anything: the engine sets no bound to it.
            pull.free_looked_s = time.monotonic()
            with suppress(RunnerError, DockerException, requests.RequestException, OSError):
                if self._free_bytes() < min(LEAST_FREE_BYTES, pull.free_before_bytes // 2):
                    pull.end(PullTrouble.NO_ROOM)

    # -- pulling, in a thread of its own -----------------------------------------------------------

    def _run(self, reference: ImageReference, pull: _Pull) -> None:
        try:
            pull.image = self._pull(reference, pull)
        except Exception as error:  # noqa: BLE001 - those who wait raise it
            pull.error = error
        finally:
            pull.finished.set()

    def _pull(self, reference: ImageReference, pull: _Pull) -> PulledImage:
        self._check_registry(reference)
        self._finish_records()
        known = self._recorded(reference)
        try:
            found = self._engine.look_up(reference)
        except Refused as refused:
            if known is None or refused.trouble.is_unknown or not self._is_here(known):
                raise
            pull.note = (
                f"{refused.trouble.value}: the image that it had for this name before is used"
            )
            return known
        pinned = reference.pinned(found.digest)
        now_ms = self._now_ms()
        before = self._records.get(str(pinned))
        if before is not None and self._is_here(before):
            image = _looked_up(replace(before, last_used_ms=now_ms), reference, now_ms)
            self._records.put(image)
            return image
        self._check_platform(found)
        image = PulledImage(
            str(pinned),
            pulled_ms=now_ms,
            last_used_ms=now_ms,
            owner_had=before.owner_had if before else bool(self._engine.inspect(str(pinned))),
        )
        self._records.put(image)
        try:
            self._fetch(pinned, pull)
        finally:
            # Also of one that was ended in its last moment: what is here must be known as ours.
            found_here = self._finished(image)
        if found_here is None:
            raise Refused(PullTrouble.OTHER, "it was pulled, and the engine does not have it")
        if not self._is_here(found_here):
            if self._engine.remove(str(pinned)):
                self._records.drop(str(pinned))
            raise Refused(PullTrouble.TOO_BIG, f"{found_here.size_bytes} bytes")
        image = _looked_up(found_here, reference, now_ms)
        with self._lock:
            asked_as = self._tags_found.pop(str(pinned), None)
        if asked_as is not None:
            image = _looked_up(image, *asked_as)
        self._records.put(image)
        return image

    def _finished(self, image: PulledImage) -> PulledImage | None:
        """Write down what has become of a pull; None: the image is not here."""
        found = self._engine.inspect(image.pinned)
        if found is None:
            if self._records.get(image.pinned) == image:  # else somebody pulls it again already
                self._records.drop(image.pinned)
            return None
        image = replace(image, image_id=str(found["Id"]), size_bytes=int(found.get("Size") or 0))
        self._records.put(image)
        return image

    def _fetch(self, pinned: ImageReference, pull: _Pull) -> None:
        pull.free_before_bytes = self._free_bytes()
        for event in self._engine.pull(pinned, pull.ending):
            pull.progress.take(event, _monotonic_ms())
            if pull.progress.error:
                raise Refused(trouble_of(pull.progress.error), pull.progress.error)
            if pull.trouble is not None:
                raise Refused(pull.trouble)

    def _check_platform(self, found: Found) -> None:
        architecture = self._engine.architecture()
        if not fits_platform(architecture, found.platforms):
            raise Refused(PullTrouble.OTHER_PLATFORM, f"{architecture}; it has {found.platforms}")

    def _check_registry(self, reference: ImageReference) -> None:
        if registry_addresses.needs_no_look(reference, self._rules.registries):
            return
        host, port = host_and_port(reference.registry)
        try:
            addresses = list(self._addresses(host, port or _HTTPS_PORT))
        except (OSError, UnicodeError) as error:
            raise Refused(PullTrouble.NO_HOST, str(error)) from error
        why = registry_addresses.why_not(addresses)
        if why:
            raise _NotAllowed(why)


class _NotAllowed(Exception):
    """The registry is not one for renters."""


def _read(image: str) -> ImageReference | None:
    """Return an image's name, None for an id. Raises ImageUnknown."""
    if is_image_id(image):
        return None
    try:
        return parse_reference(image)
    except ReferenceRefused as error:
        raise ImageUnknown(f"image {error}") from error


def _failure(image: str, error: Exception | None, rules: ImageRules) -> RunnerError:
    """Return what those who wait raise: in our words, with the engine's kept for the owner."""
    what = f"image {_shown(image)}"
    match error:
        case Refused(trouble=trouble, raw=raw):
            says = f"{what}: {trouble.value}"
            if trouble is PullTrouble.STILL:
                says = f"{what}: no bytes for {rules.stall_s:g} s"
            elif trouble is PullTrouble.TOO_BIG:
                says += f" ({format_bytes(rules.cap_bytes)})"
            kind: type[ImageTrouble] = ImageUnknown if trouble.is_unknown else PullFailed
            full = errno.ENOSPC if trouble is PullTrouble.NO_ROOM else None
            return kind(says, raw, errno=full)
        case _NotAllowed():
            return ImageNotAllowed(
                f"{what}: {error}, and this machine's owner allows only public registries and "
                "those that he names with --allow-registry"
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return PullFailed(f"{what}: {PullTrouble.NO_ROOM.value}", str(error), errno=error.errno)
        case EngineLost() | DockerException() | requests.RequestException():
            raw = printable(str(error))
            return RunnerUnavailable(
                f"{what}: the Docker Engine went away, or did not do as it was asked",
                "is dockerd running?",
                raw,
            )
        case RunnerError():
            return error
    return PullFailed(f"{what}: {PullTrouble.OTHER.value}", printable(repr(error)))


def _looked_up(image: PulledImage, reference: ImageReference, now_ms: int) -> PulledImage:
    if reference.is_pinned:
        return image
    name = str(reference)
    others = tuple(pair for pair in image.tags if pair[0] != name)
    return replace(image, tags=(*others, (name, now_ms)))


def _written_out(images: Iterable[str]) -> set[str]:
    """Return references as records have them; ids and what can't be read as they are."""
    found = set()
    for image in images:
        try:
            found.add(image if is_image_id(image) else str(parse_reference(image)))
        except ReferenceRefused:
            found.add(image)
    return found


def _so_far(progress: PullProgress) -> str:
    return (
        f"pulling: {format_bytes(progress.downloaded_bytes)} of "
        f"{format_bytes(progress.announced_bytes)} so far"
    )


def _resolved(image: str, image_id: str, pinned: str, size: Any) -> ResolvedImage:
    return ResolvedImage(image, image_id, pinned, int(size or 0))


def _pinned_name(image: dict[str, Any], reference: ImageReference | None) -> str:
    """Return a local image by its digest in the repository that it is asked for by, else its id:
    by what other names the owner has it is his own business."""
    digests = [_read(str(name)) for name in image.get("RepoDigests") or ()]
    of_repository = [d for d in digests if d and reference and d.name == reference.name]
    if reference in of_repository:
        return str(reference)
    return str(of_repository[0]) if of_repository else str(image["Id"])


def _shown(image: str) -> str:
    return ascii(image[:200])


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000
