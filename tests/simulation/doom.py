"""Where the processes of one market could die, and at which of these crash points each does.

A crash point is one side of one kind of commit, effect or call, and bears the name of what the
process was doing.
"""

from dataclasses import dataclass, field

_EVERY_FEW_SECONDS = ("a heartbeat", "Tick", "Supervision.sweep")


@dataclass
class CrashPoints:
    """Those of one market."""

    met: set[str] = field(default_factory=set)
    died_at: set[str] = field(default_factory=set)


class Doom:
    """When one process dies next."""

    def __init__(self, points: CrashPoints) -> None:
        self._points = points
        self.countdown = 0
        """At so many crash points from now; 0: it doesn't."""
        self.passes_common = False
        """Those that come every few seconds don't count: the others get their turn."""
        self.at_new = False
        """At the next one that nobody in this market has come to yet: so the rare ones, which a
        count hardly ever hits, are died at where they are met at all."""

    def lift(self) -> None:
        """It doesn't die after all."""
        self.countdown = 0
        self.at_new = False

    def strikes(self, point: str) -> bool:
        """Come to a crash point; say whether the process dies there."""
        points = self._points
        dies = False
        if point not in points.met:
            points.met.add(point)
            dies = self.at_new
        if self.countdown and not (self.passes_common and _is_common(point)):
            self.countdown -= 1
            dies = dies or not self.countdown
        if dies:
            self.at_new = False
            points.died_at.add(point)
        return dies


def _is_common(point: str) -> bool:
    return point.rpartition(" of ")[2] in _EVERY_FEW_SECONDS
