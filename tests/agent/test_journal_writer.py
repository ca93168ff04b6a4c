"""The journal's thread: the loop goes on while the disk is waited for, and nothing is too soon."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sublet_agent.adapters.session.journal import Journal, Rows, rows_of
from sublet_agent.adapters.session.journal_writer import NOTHING, JournalWriter
from sublet_agent.core.effects import Queued, Save
from sublet_contracts.wire import Withdraw


class SlowDisk(Journal):
    """Writes when it is let to, and fails where it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.goes_on = threading.Event()
        self.asked = threading.Event()
        self.batches: list[int] = []
        self.fails = False

    def write(self, changes: Sequence[Rows]) -> None:
        self.asked.set()
        assert self.goes_on.wait(60)
        if self.fails:
            raise sqlite3.OperationalError("disk I/O error")
        self.batches.append(len(changes))
        super().write(changes)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SlowDisk]:
    made = SlowDisk(tmp_path)
    yield made
    made.goes_on.set()
    made.close()


def step(number: int) -> Rows:
    return rows_of(Save(queue=[Queued(number, "lease", Withdraw(offer_sequence=number))]))


def on_disk(journal: Journal) -> list[int]:
    return [pending.number for pending in journal.pending()]


async def test_the_loop_goes_on_and_effects_wait_for_their_own_step(disk: SlowDisk) -> None:
    failed: list[BaseException] = []
    writer = JournalWriter(disk, failed.append)
    done: list[str] = []

    def note(name: str) -> None:
        # Whatever is done is on disk, and all before it.
        done.append(f"{name} {on_disk(disk)}")

    writer.write(NOTHING, lambda: note("at once"))
    assert done == ["at once []"]
    writer.write(step(1), lambda: note("first"))
    await asyncio.to_thread(disk.asked.wait)
    # The disk is waited for; nothing else is.
    writer.write(step(2), lambda: note("second"))
    writer.write(NOTHING, lambda: note("no change"))

    def third() -> None:
        note("third")
        writer.write(step(4), lambda: note("fourth"))

    writer.write(step(3), third)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(done) == 1
    disk.goes_on.set()
    await writer.written()
    await writer.written()
    assert done[1:] == [
        "first [1]",
        *("second [1, 2, 3]", "no change [1, 2, 3]", "third [1, 2, 3]"),
        "fourth [1, 2, 3, 4]",
    ]
    assert disk.batches == [1, 4, 1]
    assert failed == []
    writer.close()


async def test_after_a_failed_write_nothing_is_written_or_done(disk: SlowDisk) -> None:
    failed: list[BaseException] = []
    writer = JournalWriter(disk, failed.append)
    done: list[str] = []
    disk.fails = True
    writer.write(step(1), lambda: done.append("first"))
    writer.write(step(2), lambda: done.append("second"))
    waiting = asyncio.create_task(writer.written())
    await asyncio.sleep(0)
    disk.goes_on.set()
    with pytest.raises(sqlite3.OperationalError):
        await waiting
    disk.fails = False
    writer.write(step(3), lambda: done.append("third"))
    with pytest.raises(sqlite3.OperationalError):
        await writer.written()
    writer.close()
    assert [type(error) for error in failed] == [sqlite3.OperationalError]
    assert (done, on_disk(disk)) == ([], [])


async def test_what_is_left_at_the_end_is_written_and_not_done(disk: SlowDisk) -> None:
    failed: list[BaseException] = []
    writer = JournalWriter(disk, failed.append)
    done: list[str] = []
    for number in (1, 2, 3):
        writer.write(step(number), lambda: done.append("too late"))
    await asyncio.to_thread(disk.asked.wait)
    disk.goes_on.set()
    writer.close()
    await asyncio.sleep(0.05)
    assert on_disk(disk) == [1, 2, 3]
    assert (done, failed) == ([], [])
