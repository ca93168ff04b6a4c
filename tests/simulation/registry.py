"""The registry that machines pull from: it has its moods, everywhere or for some of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sublet_contracts.reasons import Reason

if TYPE_CHECKING:
    from tests.simulation.engine import Engine

NOWHERE = "nowhere@sha256:" + "f" * 64
"""No registry has ever had it."""
TAGS = ("train-4:latest", "train-5")
IMAGES = (*(f"train-{n}@sha256:{n:064x}" for n in range(2)), *TAGS)
BUSY = ("the registry answers 429", "the registry answers 503", "no bytes came for 2 minutes")
EVERYBODY = ""


class Registry:
    """What it answers whom. Machines keep no image here, so that each run asks it anew."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._busy_until_ms: dict[str, int] = {}
        self._slow_until_ms: dict[str, int] = {}
        self._unknown_until_ms: dict[tuple[str, str], int] = {}
        self._pushed = dict.fromkeys(TAGS, 0)
        """How often each tag has been given to another image."""

    def is_busy(self, span_ms: int, machine: str = EVERYBODY) -> None:
        """For a while it gives nothing to this machine, or to nobody."""
        self._busy_until_ms[machine] = self._engine.now_ms + span_ms

    def is_slow(self, span_ms: int, machine: str = EVERYBODY) -> None:
        """Pulls that begin in this time take a quarter of an hour."""
        self._slow_until_ms[machine] = self._engine.now_ms + span_ms

    def pull_takes_ms(self, machine: str) -> int:
        """Return how long a pull takes that begins now."""
        now_ms = self._engine.now_ms
        if any(self._slow_until_ms.get(whom, 0) > now_ms for whom in (machine, EVERYBODY)):
            return self._engine.draw_ms(540_000, 1_500_000)
        return self._engine.draw_ms(50, 3_000)

    def lacks(self, image: str, span_ms: int, machine: str = EVERYBODY) -> None:
        """For a while it knows nothing of an image, or its mirror near one machine doesn't."""
        self._unknown_until_ms[image, machine] = self._engine.now_ms + span_ms

    def push(self, tag: str) -> None:
        """Somebody gives a tag to a new image; the one before is still there, by its digest."""
        self._pushed[tag] += 1

    def meaning(self, image: str) -> str:
        """Return what an image means now, by content."""
        if image not in self._pushed:
            return image
        name = image.partition(":")[0]
        return f"docker.io/library/{name}@sha256:{int(name[-1]):032x}{self._pushed[image]:032x}"

    def known(self) -> list[str]:
        """Return all names by which an image may be asked for."""
        return [*IMAGES, *(self.meaning(tag) for tag in TAGS for _ in range(3))]

    def calm(self) -> None:
        """It has what it ever had."""
        self._busy_until_ms.clear()
        self._slow_until_ms.clear()
        self._unknown_until_ms.clear()

    def trouble(self, image: str, machine: str) -> tuple[Reason, str] | None:
        """Return why the machine can't have the image now, nor what a tag means; None: it can."""
        asked = (machine, EVERYBODY)
        now_ms = self._engine.now_ms
        if any(self._busy_until_ms.get(whom, 0) > now_ms for whom in asked):
            return Reason.PULL_FAILED, self._engine.random.choice(BUSY)
        unknown = any(self._unknown_until_ms.get((image, whom), 0) > now_ms for whom in asked)
        if unknown or image == NOWHERE:
            return Reason.IMAGE_UNKNOWN, "the registry says: manifest unknown"
        return None
