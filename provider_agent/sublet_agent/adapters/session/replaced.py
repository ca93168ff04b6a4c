"""The mark of an agent that ended because another one has its key. Who starts it again at once, as
a service manager does, would only drive the other away, and so on in turns: a start without a
terminal stays away while the mark is fresh.
"""

import time
from pathlib import Path

FRESH_S = 3_600.0
_NAME = "replaced"


class StaysAway(Exception):
    """This agent was replaced a short time ago; the text says what to do."""


def mark(state: Path) -> None:
    """Note that another agent with this key has joined. Raises OSError."""
    (state / _NAME).touch()


def check(state: Path, *, by_hand: bool) -> None:
    """Raise StaysAway while the mark is fresh; by hand: the owner knows what he does."""
    path = state / _NAME
    try:
        since_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return
    if not by_hand and 0 <= since_s < FRESH_S:
        raise StaysAway(
            f"{int(since_s)} s ago another agent with this key took over: stop that one and delete "
            f"{path}, or give one of them its own --state folder; this one stays away"
        )
    path.unlink(missing_ok=True)
