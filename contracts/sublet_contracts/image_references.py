"""How an image is named: `[registry/]repository[:tag][@sha256:...]`, read strictly. Pure.

The grammar is the one that registries themselves use (the CNCF distribution project's), with its
bounds. What is short for something is written out: no registry means docker.io, one word there
means library/, neither tag nor digest means the tag latest. Two texts that name the same image give
equal references, and no other text does.
"""

import re
from dataclasses import dataclass

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"
MAX_CHARACTERS = 512
MAX_NAME_CHARACTERS = 255

_WORD = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[A-Fa-f0-9:.]{{2,45}}\])"
_REGISTRY = re.compile(rf"{_HOST}(?::[0-9]{{1,5}})?")
_REPOSITORY = re.compile(rf"{_WORD}(?:/{_WORD})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HEX_ID = re.compile(r"[0-9a-f]{64}")
_SHOWN_CHARACTERS = 100


class ReferenceRefused(ValueError):
    """A text names no image. The message says what is wrong, and is safe to show."""


@dataclass(frozen=True)
class ImageReference:
    """One image's name. With a digest the tag says nothing, and is empty."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Registry and repository."""
        return f"{self.registry}/{self.repository}"

    @property
    def is_pinned(self) -> bool:
        """Whether it names a content, which can't change."""
        return bool(self.digest)

    def pinned(self, digest: str) -> "ImageReference":
        """Return the same repository's image of this digest."""
        return ImageReference(self.registry, self.repository, digest=digest)

    def __str__(self) -> str:
        """Return it written out."""
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"


def parse_reference(text: str) -> ImageReference:
    """Read an image's name. Raises ReferenceRefused."""
    if not text or len(text) > MAX_CHARACTERS:
        raise ReferenceRefused(
            f"an image's name has 1 to {MAX_CHARACTERS} characters, not {len(text)}"
        )
    if is_image_id(text):
        raise _refused(text, "an image's id is known to no registry")
    left, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _refused(text, "after '@' comes sha256: and 64 hexadecimal digits in small letters")
    head, slash, last = left.rpartition("/")
    last, colon, tag = last.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise _refused(text, "a tag has 1 to 128 letters, digits, '_', '.' and '-'")
    first, found_slash, rest = f"{head}{slash}{last}".partition("/")
    if found_slash and _looks_like_registry(first):
        registry, repository = first.lower(), rest
        if not is_registry(registry):
            raise _refused(text, "before the first '/' stands a registry's host, and maybe a port")
    else:
        registry, repository = DEFAULT_REGISTRY, f"{head}{slash}{last}"
    if registry == f"index.{DEFAULT_REGISTRY}":
        registry = DEFAULT_REGISTRY
    if not _REPOSITORY.fullmatch(repository):
        raise _refused(
            text, "a repository has small letters and digits, with '.', '_', '-' and '/' between"
        )
    if registry == DEFAULT_REGISTRY and "/" not in repository:
        if _HEX_ID.fullmatch(repository):
            raise _refused(text, "an image's id is known to no registry")
        repository = f"library/{repository}"
    if len(registry) + 1 + len(repository) > MAX_NAME_CHARACTERS:
        raise _refused(text, f"registry and repository have {MAX_NAME_CHARACTERS} characters most")
    if digest:
        return ImageReference(registry, repository, digest=digest)
    return ImageReference(registry, repository, tag or DEFAULT_TAG)


def is_image_id(text: str) -> bool:
    """Say whether a text is an image's id on some machine: a content's hash without any name."""
    return _DIGEST.fullmatch(text) is not None


def has_tag(text: str) -> bool:
    """Say whether a job's image is named by what may come to mean another one: a tag, told or not.
    A text that names no image has none."""
    try:
        return not is_image_id(text) and not parse_reference(text).is_pinned
    except ReferenceRefused:
        return False


def can_mean(text: str, pinned: str) -> bool:
    """Say whether `pinned` is an image that a job's tag may have meant: one of the same repository
    by its digest, or an owner's local one by its id."""
    if not has_tag(text):
        return False
    if is_image_id(pinned):
        return True
    try:
        meant = parse_reference(pinned)
    except ReferenceRefused:
        return False
    return meant.is_pinned and meant.name == parse_reference(text).name


def host_and_port(registry: str) -> tuple[str, int | None]:
    """Return where a registry is: its host, an IPv6 address without brackets, and its port."""
    host, _, port = registry.rpartition(":")
    if not host or registry.endswith("]"):
        host, port = registry, ""
    return host.removeprefix("[").removesuffix("]"), int(port) if port else None


def is_registry(text: str) -> bool:
    """Say whether a text is a registry's host, and maybe its port."""
    if len(text) > MAX_NAME_CHARACTERS or not _REGISTRY.fullmatch(text):
        return False
    return (host_and_port(text)[1] or 0) <= 65_535


def _looks_like_registry(word: str) -> bool:
    # As the Docker Engine tells a registry from a user's name at the default one.
    return "." in word or ":" in word or word == "localhost"


def _refused(text: str, why: str) -> ReferenceRefused:
    shown = ascii(text[:_SHOWN_CHARACTERS]) + ("..." if len(text) > _SHOWN_CHARACTERS else "")
    return ReferenceRefused(f"{shown} names no image: {why}")
