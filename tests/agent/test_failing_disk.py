"""An agent that can't write to its journal acknowledges nothing more, and comes to its end."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any, cast

import pytest

from sublet_agent.adapters.session.link import _cancel_all
from sublet_agent.adapters.shell import Shell
from sublet_agent.core import effects
from sublet_agent.core.effects import Save, Step
from sublet_contracts.wire import Unprepare


class BrokenJournal:
    """Fails once: the kernel tells of a lost write once."""

    def __init__(self) -> None:
        self.commits = 0

    def write(self, _changes: Any) -> None:
        self.commits += 1
        if self.commits == 1:
            raise sqlite3.OperationalError("disk I/O error")


class Core:
    def handle(self, _event: Any, _now_ms: int) -> Step:
        return Step(Save(next_mid=7), [effects.Say("done all the same")])


async def test_nothing_is_taken_after_a_failed_commit(tmp_path: Path) -> None:
    unused = cast(Any, None)
    journal = BrokenJournal()
    said: list[str] = []
    shell = Shell(
        state=tmp_path,
        core=cast(Any, Core()),
        journal=cast(Any, journal),
        spool=unused,
        runner=unused,
        transfer=unused,
        helper=tmp_path,
        now_ms=lambda: 0,
        say=said.append,
    )
    message = Unprepare(job="0" * 64)
    # The link acknowledges what was taken once `written` returns.
    shell.arrived(message)
    with pytest.raises(sqlite3.OperationalError):
        await shell.written()
    with pytest.raises(sqlite3.OperationalError):
        shell.arrived(message)
    with pytest.raises(sqlite3.OperationalError):
        await shell.written()
    assert journal.commits == 1
    assert shell.done.is_set()
    assert said == []
    shell.close()


async def test_an_end_that_comes_while_the_line_breaks_is_heard() -> None:
    ending = asyncio.Event()

    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            await asyncio.sleep(0)

    inner = asyncio.create_task(slow_to_end())
    await asyncio.sleep(0)
    outer = asyncio.create_task(_cancel_all([inner]))
    await ending.wait()
    outer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await outer
    await asyncio.gather(inner, return_exceptions=True)


async def test_what_broke_besides_the_line_is_raised() -> None:
    async def breaks() -> None:
        raise sqlite3.OperationalError("disk I/O error")

    task = asyncio.create_task(breaks())
    await asyncio.sleep(0)
    with pytest.raises(sqlite3.OperationalError):
        await _cancel_all([task])
