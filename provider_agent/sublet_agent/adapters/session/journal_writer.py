"""Has the journal written by a thread of its own, in order; what waits for that is done on the
loop.

A disk may take seconds for a commit, and the loop must not: while one is under way what comes
meanwhile is collected, and written together by the next. What is to be done once a change is on
disk is done in the order of the changes, so that nothing happens that a restart would not know of.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from sublet_agent.adapters.session.journal import Journal, Rows
from sublet_agent.core.records import RunRecord

Then = Callable[[], object]
NOTHING = Rows()


class JournalWriter:
    """Writes for one agent. Used from the event loop's thread."""

    def __init__(self, journal: Journal, failed: Callable[[BaseException], None]) -> None:
        """`failed` is told, once, that something could not be written. Nothing more is written, or
        done, from then on."""
        self._journal = journal
        self._failed = failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sublet-journal")
        self._waiting: list[tuple[Rows, Then, object]] = []
        self._under_way: list[tuple[Rows, Then, object]] = []
        self._answers: set[asyncio.Future[None]] = set()
        self._broken: BaseException | None = None
        self._closed = False

    def write(self, rows: Rows, then: Then, event: object = None) -> None:
        """Write changes, and then do what waits for them: at once, where there are none and nothing
        is under way. `event` is what they came of."""
        if self._broken is not None:
            return
        if rows.empty and not self._under_way and not self._waiting:
            then()
            return
        self._waiting.append((rows, then, event))
        self._go_on()

    async def written(self) -> None:
        """Return once all is on disk that was given before. Raises what could not be written."""
        if self._broken is not None:
            raise self._broken
        answer = asyncio.get_running_loop().create_future()

        def answered() -> None:
            if not answer.done():
                answer.set_result(None)

        self._answers.add(answer)
        try:
            self.write(NOTHING, answered)
            await answer
        finally:
            self._answers.discard(answer)

    def last_record(self, lease_id: str) -> RunRecord | None:
        """Return a run's record as it was given last; None: it never was, or is forgotten."""
        for rows, _, _ in reversed([*self._under_way, *self._waiting]):
            if lease_id in rows.records:
                text = rows.records[lease_id]
                return None if text is None else RunRecord.model_validate_json(text)
        return self._journal.run(lease_id)

    def close(self) -> None:
        """Write what is left; nothing that waits for it is done. Raises what can't be written."""
        self._closed = True
        self._thread.shutdown(wait=True)
        left, self._waiting = self._waiting, []
        if self._broken is None and left:
            self._journal.write([rows for rows, _, _ in left])

    def _go_on(self) -> None:
        """Write all that waits, unless something is under way."""
        while self._waiting and not self._under_way:
            self._under_way, self._waiting = self._waiting, []
            if all(rows.empty for rows, _, _ in self._under_way):
                self._finish()
                continue
            event = next(event for rows, _, event in self._under_way if not rows.empty)
            changes = [rows for rows, _, _ in self._under_way]
            loop = asyncio.get_running_loop()
            loop.run_in_executor(self._thread, self._write, changes, event).add_done_callback(
                self._written
            )

    def _write(self, changes: Sequence[Rows], event: object) -> None:
        """`event`: for who looks at the stack, as tests/chaos does, which names a write by it."""
        self._journal.write(changes)

    def _written(self, done: "asyncio.Future[None]") -> None:
        error = None if done.cancelled() else done.exception()
        if self._closed:
            return
        if error is None:
            self._finish()
            self._go_on()
            return
        self._broken = error
        self._waiting, self._under_way = [], []
        for answer in self._answers:
            if not answer.done():
                answer.set_exception(error)
        self._failed(error)

    def _finish(self) -> None:
        """Do what waited for what is now on disk. What comes of it is written after that."""
        try:
            for _, then, _ in self._under_way:
                then()
        finally:
            self._under_way = []
