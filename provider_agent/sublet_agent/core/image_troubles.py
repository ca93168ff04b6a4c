"""Images that could not be pulled here: leases for them are refused for a while. Pure. Rules:

1. After a pull that failed the image isn't tried again for FIRST_WAIT_MS, twice as long after each
   further failure, MOST_WAIT_MS at most; a good pull forgets it.
2. MOST_IMAGES are remembered, those that failed last: nobody can fill this machine with bad names.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from sublet_agent.core.events import Event, ImageReady, LookUpFailed, PreparationFailed
from sublet_contracts.reasons import Reason

FIRST_WAIT_MS = 30_000
MOST_WAIT_MS = 900_000
MOST_IMAGES = 256


_SAYS = {
    Reason.PULL_FAILED: "it could not be pulled here",
    Reason.IMAGE_NOT_ALLOWED: "this machine's owner does not let renters use it, as was found",
}


@dataclass(frozen=True)
class _Trouble:
    says: str
    failures: int
    failed_ms: int
    until_ms: int


@dataclass
class ImageTroubles:
    """What failed, by the image's name as jobs have it."""

    _troubles: OrderedDict[str, _Trouble] = field(default_factory=OrderedDict)

    def take(self, image: str, event: Event, now_ms: int) -> None:
        """Take what became of a run's image; other events say nothing about it."""
        match event:
            case ImageReady():
                self._troubles.pop(image, None)
            case PreparationFailed(_, reason) | LookUpFailed(_, reason) if reason in _SAYS:
                self._failed(image, _SAYS[reason], now_ms)

    def _failed(self, image: str, says: str, now_ms: int) -> None:
        before = self._troubles.pop(image, None)
        failures = before.failures if before else 0
        wait_ms = min(MOST_WAIT_MS, FIRST_WAIT_MS * 2 ** min(failures, 9))
        self._troubles[image] = _Trouble(says, failures + 1, now_ms, now_ms + wait_ms)
        while len(self._troubles) > MOST_IMAGES:
            self._troubles.popitem(last=False)

    def why_not(self, image: str, now_ms: int) -> str:
        """Return why a lease for this image isn't signed now; '' if it may be."""
        trouble = self._troubles.get(image)
        # Also where the clock went back: it would wait for ever.
        if trouble is None or not trouble.failed_ms <= now_ms < trouble.until_ms:
            return ""
        ago_s = (now_ms - trouble.failed_ms) // 1000
        again_s = -(-(trouble.until_ms - now_ms) // 1000)
        return f"image: {trouble.says} {ago_s} s ago; it is tried again in {again_s} s"
