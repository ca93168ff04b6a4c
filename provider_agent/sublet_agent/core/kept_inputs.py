"""Which inputs of renters this machine keeps for their next runs, and which go. Pure. Rules:

1. A renter finds again what his own runs fetched; whose runs fetched what is never mixed, so that
   nobody can tell from the time that it takes what others have here.
2. All of them together hold no more than the owner said (`cap_bytes`), and one that takes more than
   half of it isn't kept: it would push out everything else.
3. The least recently used goes first, and what nobody has used for a week goes in any case: it is a
   stranger's data. What a run uses may go too: the run has its own.
4. Where the disk gets short they all make room, for they can be fetched again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

MAX_KEPT = 1_000
UNUSED_MS = 7 * 86_400_000
DEFAULT_SHARE = 10
"""unless the owner says otherwise: one part in so many of the disk that is offered"""


@dataclass(frozen=True)
class KeptInput:
    """A tree that was fetched for a run of a renter."""

    name: str
    size_bytes: int
    used_ms: int
    """when a run last began with it"""


def is_worth_keeping(size_bytes: int, cap_bytes: int) -> bool:
    """Say whether a tree of this size is kept at all."""
    return 0 < size_bytes <= cap_bytes // 2


def inputs_to_evict(
    kept: Iterable[KeptInput],
    cap_bytes: int,
    now_ms: int,
    *,
    for_bytes: int = 0,
    short_bytes: int = 0,
) -> list[KeptInput]:
    """Return what has to go, in that order, so that another `for_bytes` fit below `cap_bytes`.
    `short_bytes`: so much has to go in any case, because the disk lacks it."""
    oldest_first = sorted(kept, key=lambda one: (one.used_ms, one.name))
    held, count = sum(one.size_bytes for one in oldest_first), len(oldest_first)
    gone: list[KeptInput] = []
    for one in oldest_first:
        fits = held + for_bytes <= cap_bytes and count + bool(for_bytes) <= MAX_KEPT
        fresh = now_ms - one.used_ms < UNUSED_MS
        if fits and fresh and short_bytes <= 0:
            break
        gone.append(one)
        held -= one.size_bytes
        short_bytes -= one.size_bytes
        count -= 1
    return gone
