"""Tells losses that a longer outage explains from those that nothing explains. Pure.

Nothing can be made durable while a run's agent, the broker or its Ray is away: that time is dark. A
run that is killed loses what it computed since its last durable step, so its loss may last as long
as the dark time before it, and about an interval more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PICTURE_MS = 3_000
"""A checkpoint's way: scanned, sent, verified, judged, on cores that others use, too."""
BACK_MS = 3_000
"""After its start an agent needs so long until it's connected: it tries again at least so often."""


@dataclass(frozen=True)
class Dark:
    """Something was away."""

    what: str
    """agent, broker, raylet, worker"""
    agent: str
    """Whose, or '' for all."""
    from_ms: int
    to_ms: int


@dataclass(frozen=True)
class Loss:
    """Steps that a run had made, and its successor made again."""

    job: str
    agent: str
    epoch: int
    steps: int
    due_ms: int
    """When the first checkpoint that was lost was saved."""
    lost_ms: int
    """When the run printed last."""


def lit_ms(loss: Loss, darks: Iterable[Dark]) -> int:
    """Return for how long, between the loss's two times, nothing that it needs was away."""
    spans = sorted(
        (max(dark.from_ms, loss.due_ms), min(dark.to_ms, loss.lost_ms))
        for dark in darks
        if dark.agent in ("", loss.agent) and dark.to_ms > loss.due_ms
    )
    lit, at = 0, loss.due_ms
    for begin, end in spans:
        lit += max(0, begin - at)
        at = max(at, end)
    return lit + max(0, loss.lost_ms - at)


def explained(loss: Loss, darks: Iterable[Dark], interval_ms: int) -> bool:
    """Say whether so much was to be lost: no more than an interval was computed, and a checkpoint
    was on its way, while all that it needs was there."""
    return lit_ms(loss, darks) <= interval_ms + PICTURE_MS


def dark_for_all(kills: Iterable[tuple[str, int]], moves: Iterable[tuple[int, int]]) -> list[Dark]:
    """Return the dark times after kills, each (what, when), of what everybody needs.

    `moves`: when anybody's durable step was seen to have moved, and the look before that. A dark
    time ends with the first move of which both looks came after the kill.
    """
    seen = sorted(moves)
    darks = []
    for what, at_ms in kills:
        end = next((ms for before, ms in seen if before >= at_ms), seen[-1][1] if seen else at_ms)
        darks.append(Dark(what, "", at_ms, max(end, at_ms)))
    return darks


def dark_for_one(agent: str, gone_and_back: Iterable[tuple[int, int]]) -> list[Dark]:
    """Return an agent's dark times, from when it was killed and when it was started again."""
    return [Dark("agent", agent, gone, back + BACK_MS) for gone, back in gone_and_back]
