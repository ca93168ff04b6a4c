"""Whether a snapshot of the folders that a job named as its checkpoint can be taken now. Pure.

The rules stand in `sublet_contracts.checkpoint_folders`; what is seen of each file comes from
adapters/workspace/folder_watch.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sublet_contracts.checkpoint_folders import is_log, quiet_needed_ms

Ended = Literal["", "by itself", "killed"]
"""How the run ended: with all its files closed as its script meant it, or in the midst of them."""
State = Literal["same", "noted", "busy", "torn", "ready"]
"""same: nothing that counts has changed; noted: nothing is due; busy and torn: not yet; ready: it
can be taken"""


@dataclass(frozen=True)
class FileSeen:
    """What was seen of one file."""

    path: str
    new: bool
    """whether it has changed since the snapshot before"""
    at_rest: bool
    """whether nobody had it open for writing when it was seen as it is now, while its run lived"""
    quiet_ms: float
    """for how long it has not changed"""
    writers_known: bool = True
    """whether it can be known who has it open"""
    grows: bool = False
    """whether it has only grown"""
    torn: Callable[[], str] = lambda: ""
    """why it isn't whole; '' if nothing says so"""
    sure: Callable[[], bool] = lambda: True
    """whether its own format says that it is whole"""

    @property
    def counts(self) -> bool:
        """Whether a change of it makes a new checkpoint: it is no log."""
        return not self.grows and not is_log(self.path)


def decide(
    files: Sequence[FileSeen],
    *,
    waited_ms: int | None,
    interval_ms: int,
    ended: Ended,
    in_the_making: Callable[[], str] = lambda: "",
    links_quiet_ms: float = math.inf,
) -> tuple[State, str]:
    """Return what can be done, and why not more. `waited_ms`: for how long a snapshot is due, None:
    it isn't; `interval_ms`: how often one is to be due; `links_quiet_ms`: for how long no link
    beside the files has changed."""
    counted = [file for file in files if file.counts]
    if not any(file.new for file in counted):
        return "same", ""
    if waited_ms is None and not ended:
        return "noted", ""
    if not ended and (says := _unrest(counted, waited_ms or 0, interval_ms)):
        return "busy", says
    if not ended and links_quiet_ms < quiet_needed_ms(
        waited_ms or 0, interval_ms, writers_known=True
    ):
        return "busy", "a link has just been changed"
    if says := in_the_making():
        return "torn", says
    for file in counted:
        if says := file.torn():
            return "torn", f"{file.path}: {says}"
        if ended == "killed" and file.new and not file.at_rest and not file.sure():
            return "torn", (
                f"{file.path}: it was written just before the run was killed, and nothing says "
                "that it is all there"
            )
    return "ready", ""


def _unrest(counted: Sequence[FileSeen], waited_ms: int, interval_ms: int) -> str:
    """Return what is not at rest yet, with why; '' if all is."""
    for file in counted:
        if not file.at_rest:
            return f"{file.path} is open for writing"
    writers_known = all(file.writers_known for file in counted)
    needed_ms = quiet_needed_ms(waited_ms, interval_ms, writers_known=writers_known)
    for file in counted:
        if file.quiet_ms < needed_ms:
            return f"{file.path} has just been changed"
    return ""
