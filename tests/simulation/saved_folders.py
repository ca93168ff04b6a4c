"""Jobs that name a folder as their checkpoint: what lies in it in truth, and what is seen of it.

A script that has never heard of sublet writes its file in place, which takes a while, and is deaf
to SAVE: TERM ends it wherever it is. What was half written then is torn: some formats show that,
others don't. One kind never closes its file; one closes it and only ever appends to it: neither is
ever paid for it. The agent decides by the real rules (core/folders_at_rest.py) when to copy it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sublet_agent.core.folders_at_rest import FileSeen
from tests.simulation.engine import Engine

if TYPE_CHECKING:
    from tests.simulation.auditor import Auditor
    from tests.simulation.jobs import Container, Program
    from tests.simulation.models import LeaseModel

FOLDERS = ("ckpts",)
NEVER_SAVED = ("open", "appends")
"""Ways to save of which nothing is ever durable."""
PREEMPTED = 75
TOLERANCE_MS = 1_500


@dataclass
class SavedFolder:
    """A job's folder on one machine. Times are true."""

    engine: Engine
    way: str
    """torch: torn shows; raw: it doesn't; open and appends: it only grows"""
    content: tuple[int, str] = (0, "")
    """step and state that were written last"""
    torn: bool = False
    open: bool = False
    changed_ms: int = -1
    """when it was last changed; -1: nothing was written yet"""
    saved_at: dict[int, int] = field(default_factory=dict)
    """step -> the run's device clock (ms) when that was complete, in truth"""
    taken_ms: int = -1
    """the change that the newest copy has: on disk, as last.json is"""
    copied: dict[int, tuple[int, tuple[int, str]]] = field(default_factory=dict)
    """snapshot's step -> the change that it has, and what it holds in truth"""

    def begin(self, content: tuple[int, str], write_ms: int, done: Callable[[], None]) -> None:
        """Begin to write; `done` comes when it is written, unless its job has ended."""
        self.content = content
        self.torn = self.open = True
        self.changed_ms = began_ms = self.engine.now_ms

        def end() -> None:
            if self.changed_ms == began_ms and self.way != "open":
                done()

        self.engine.after(write_ms, end)

    def written(self, clocked_ms: int) -> None:
        """All of it is there, and closed."""
        self.torn = self.open = False
        self.changed_ms = self.engine.now_ms
        self.saved_at[self.content[0]] = clocked_ms

    def closed(self) -> None:
        """Its job has ended, wherever it was."""
        self.open = False

    def seen(self, rested_ms: int) -> list[FileSeen]:
        """Return what is seen of it. `rested_ms`: the change at which it was last seen at rest."""
        if self.changed_ms < 0:
            return []
        shows = self.way == "torch"
        state = FileSeen(
            "state.bin",
            new=self.changed_ms > self.taken_ms,
            at_rest=not self.open and rested_ms == self.changed_ms,
            quiet_ms=self.engine.now_ms - self.changed_ms,
            grows=self.way == "appends",
            torn=lambda: "its end is missing" if shows and self.torn else "",
            sure=lambda: shows and not self.torn,
        )
        return [FileSeen("train.log", new=True, at_rest=False, quiet_ms=0), state]

    def copy(self, step: int) -> bytes:
        """Copy what lies there."""
        self.taken_ms = self.changed_ms
        self.copied[step] = (self.changed_ms, self.content)
        number, state = self.content
        return json.dumps([number, state[:7] if self.torn else state]).encode()


def can_end(program: Program) -> Program:
    """Return a program that comes to its end: what ends halfway until it goes on from there has to
    save by the protocol, or, if it only yields, in a way that is saved."""
    never = program.ending in ("hangs", "suicide")
    never |= program.ending == "yield" and program.saves in NEVER_SAVED
    return replace(program, saves="") if never else program


def unpacked(content: bytes) -> tuple[int, str]:
    """Return the step and the state that a copy holds."""
    number, state = json.loads(content)
    return int(number), str(state)


def job_saves(document: dict[str, object]) -> str:
    """Return by its own command how a job saves; '': by the protocol."""
    command = document["command"]
    assert isinstance(command, list)
    return str(json.loads(command[1])["saves"])


def never_saved(way: str, container: Container) -> bool:
    """Say whether nothing of a run may count: its file only grew, and it was not the run itself
    that closed it in the end."""
    return way == "appends" or (way == "open" and container.exit_code not in (0, PREEMPTED))


def check_paid(
    auditor: Auditor, lease: LeaseModel, id: str, payable_ms: int, *, durable_only: bool
) -> str:
    """Return what is wrong with a settlement of such a job: '' if nothing is.

    Where only durable progress is paid, that ends with the newest change in what was saved: neither
    what the run did between that and the copy counts, nor a file that only grows.
    """
    way = job_saves(auditor.jobs[lease.document["job"]].document)
    container = auditor.runs.get(id)
    if not way or not durable_only or container is None or container.folder is None:
        return ""
    if never_saved(way, container):
        return f"{payable_ms} ms are paid for a file that only grows" if payable_ms else ""
    durable = lease.chain[-1].document["durable_checkpoint"] if lease.chain else None
    step = auditor.saved.get(durable or "", (0, ""))[0]
    at_ms = container.folder.saved_at.get(step, 0) + TOLERANCE_MS
    most_ms = at_ms * len(lease.document["device_ids"]) if durable else 0
    if durable:  # and what its pull took, which pulls.py has judged
        most_ms += lease.chain[-1].document.get("pull_device_ms", 0)
    return (
        f"{payable_ms} ms are paid; what was saved was complete at {most_ms}"
        if payable_ms > most_ms
        else ""
    )
