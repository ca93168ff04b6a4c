"""Why an image can't be had: from the engine's answer to a kind, and on to words of ours. Pure.

The engine's and the registry's own texts stay with the owner: they tell of his network, and a
registry writes in them what it likes. The renter reads the sentence of the kind, nothing else.

A registry that refuses an anonymous client (401, 403, `denied`) is taken at its word that there is
no such image for anybody: Docker Hub, GHCR and others answer so on purpose, for an image that isn't
there just as for a private one, and every machine here asks without a login. Asked elsewhere the
answer is the same: so it counts as `image_unknown`, and not as trouble of this machine.
"""

import re
from enum import Enum


class PullTrouble(Enum):
    """The kinds, each with its sentence."""

    UNKNOWN = "the registry has no such image"
    DENIED = (
        "the registry gives it to nobody without a login, or has no such image; renters' images "
        "are pulled without any"
    )
    DAMAGED = "what the registry sent does not fit its digest"
    BUSY = "the registry is busy and wants to be asked later"
    DOWN = "the registry answers with an error of its own"
    NO_HOST = "the registry's host name was not found here"
    UNREACHABLE = "the registry can't be reached from here"
    NOT_TRUSTED = "the registry's certificate is not to be trusted, or it speaks no TLS"
    TOO_SLOW = "the registry did not answer in time"
    CUT_OFF = "the connection to the registry was cut off"
    PART_MISSING = "the registry lacks a part of it"
    OTHER_PLATFORM = "there is none for this machine's architecture"
    NOT_MAPPED = "this machine can't unpack it: its files belong to users that can't exist here"
    NO_ROOM = "this machine's disk has no room for it"
    STILL = "no bytes came for too long"
    TOO_BIG = "it is bigger than this machine's owner lets images be"
    GARBLED = "the registry sent something that can't be read"
    OTHER = "it could not be pulled"

    @property
    def is_unknown(self) -> bool:
        """Whether the image can't be had anywhere, as far as this machine can tell."""
        return self in (PullTrouble.UNKNOWN, PullTrouble.DENIED, PullTrouble.DAMAGED)


_BY_STATUS = {
    400: PullTrouble.UNKNOWN,
    401: PullTrouble.DENIED,
    403: PullTrouble.DENIED,
    404: PullTrouble.UNKNOWN,
    429: PullTrouble.BUSY,
}
_BY_TEXT = tuple(
    (re.compile(pattern, re.IGNORECASE), kind)
    for pattern, kind in (
        # The first that fits; a more certain sign stands before one that may come along with it.
        (r"no space left on device|disk quota exceeded", PullTrouble.NO_ROOM),
        (r"toomanyrequests|too many requests|rate limit|status:? 429", PullTrouble.BUSY),
        (r"no matching manifest|no match for platform|does not provide.*platform|"
         r"image operating system", PullTrouble.OTHER_PLATFORM),
        (r"verification failed for digest|digest mismatch|unexpected.*digest|failed digest",
         PullTrouble.DAMAGED),
        (r"lchown|can'?t be mapped to a host id|container id \d+|remap", PullTrouble.NOT_MAPPED),
        (r"unknown blob|blob unknown|failed to copy: .*not found", PullTrouble.PART_MISSING),
        (r"manifest unknown|name unknown|repository name not known|manifest.*not found",
         PullTrouble.UNKNOWN),
        (r"no such host|server misbehaving|name resolution|lookup \S+", PullTrouble.NO_HOST),
        (r"x509|certificate|tls:|http response to https", PullTrouble.NOT_TRUSTED),
        (r"error parsing HTTP 4\d\d", PullTrouble.GARBLED),
        (r"no basic auth credentials|unauthorized|authentication required|\bdenied\b|"
         r"insufficient_scope", PullTrouble.DENIED),
        (r"status:? 5\d\d|service unavailable|internal server error", PullTrouble.DOWN),
        (r"connection refused|no route to host|network is unreachable", PullTrouble.UNREACHABLE),
        (r"timeout|timed out|deadline exceeded|request canceled", PullTrouble.TOO_SLOW),
        (r"connection reset|unexpected EOF|\bEOF\b|broken pipe|byte range", PullTrouble.CUT_OFF),
        (r"JSON|invalid character|invalid tar header|gzip|unsupported|media type|"
         r"mediatype|schema", PullTrouble.GARBLED),
    )
)  # fmt: skip
_READ_CHARACTERS = 4_096


def trouble_of(text: str, status: int = 0) -> PullTrouble:
    """Return the kind of an engine's refusal: `status` is its HTTP status, 0 if it has none.

    A status below 500 is the registry's own, which the engine hands through; above, it is the
    engine's, and the text has to say.
    """
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    for pattern, kind in _BY_TEXT:
        if pattern.search(text[:_READ_CHARACTERS]):
            return kind
    return PullTrouble.OTHER
