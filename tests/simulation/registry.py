"""The registry that machines pull from: it has its moods, everywhere or for some of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sublet_contracts.reasons import Reason

if TYPE_CHECKING:
    from tests.simulation.engine import Engine

NOWHERE = "nowhere@sha256:" + "f" * 64
"""No registry has ever had it."""
IMAGES = tuple(f"train-{n}@sha256:{n:064x}" for n in range(4))
BUSY = ("the registry answers 429", "the registry answers 503", "no bytes came for 2 minutes")
EVERYBODY = ""


class Registry:
    """What it answers whom. Machines keep no image here, so that each run asks it anew."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._busy_until_ms: dict[str, int] = {}
        self._unknown_until_ms: dict[tuple[str, str], int] = {}

    def is_busy(self, span_ms: int, machine: str = EVERYBODY) -> None:
        """For a while it gives nothing to this machine, or to nobody."""
        self._busy_until_ms[machine] = self._engine.now_ms + span_ms

    def lacks(self, image: str, span_ms: int, machine: str = EVERYBODY) -> None:
        """For a while it knows nothing of an image, or its mirror near one machine doesn't."""
        self._unknown_until_ms[image, machine] = self._engine.now_ms + span_ms

    def calm(self) -> None:
        """It has what it ever had."""
        self._busy_until_ms.clear()
        self._unknown_until_ms.clear()

    def pull(self, image: str, machine: str) -> tuple[Reason, str] | None:
        """Return why the machine can't have the image now; None: it has it."""
        asked = (machine, EVERYBODY)
        now_ms = self._engine.now_ms
        if any(self._busy_until_ms.get(whom, 0) > now_ms for whom in asked):
            return Reason.PULL_FAILED, self._engine.random.choice(BUSY)
        unknown = any(self._unknown_until_ms.get((image, whom), 0) > now_ms for whom in asked)
        if unknown or image == NOWHERE:
            return Reason.IMAGE_UNKNOWN, "the registry says: manifest unknown"
        return None
