"""Pins: content that somebody counts on at this moment, so that its file isn't deleted meanwhile.

A row that gives a scope the right to content must never stand without its file. The blob store is
not asked inside a transaction, so the file is looked at before the row is committed, and the
sweeper could delete it in between. Hence:
- Whoever adds rows pins the hashes first, then makes sure that the files are there, then commits,
  then unpins.
- The sweeper takes only hashes that nobody has pinned, and whoever wants one of them waits until it
  is done. After it has taken them it looks once more whether a row has come.

Pins are memory: one broker owns a blob store (data_folder.py, the database's claim). A crash leaves
files without rows at most, which the sweeper finds.
"""

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from sublet_broker.service.ports import StoreAway


class Pins:
    """Who counts on which content, and what is being deleted. Any thread may call this."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pinned: Counter[str] = Counter()
        self._deleting: set[str] = set()

    @contextmanager
    def hold(self, hashes: Iterable[str]) -> Iterator[None]:
        """Keep the sweeper from deleting these for as long as the block lasts."""
        mine = set(hashes)
        with self._changed:
            self._changed.wait_for(lambda: self._deleting.isdisjoint(mine))
            self._pinned.update(mine)
        doubtful = False
        try:
            yield
        except StoreAway:
            # The commit may come to be all the same, after whatever is read next: the files stay
            # until the broker starts again.
            doubtful = True
            raise
        finally:
            if not doubtful:
                self._release(mine)

    def _release(self, hashes: set[str]) -> None:
        with self._changed:
            self._pinned.subtract(hashes)
            for digest in hashes:
                if not self._pinned[digest]:
                    del self._pinned[digest]

    @contextmanager
    def deleting(self, hashes: Iterable[str]) -> Iterator[Collection[str]]:
        """Take those of these that nobody has pinned: nobody can pin them before the block ends."""
        with self._changed:
            mine = [digest for digest in hashes if digest not in self._pinned]
            self._deleting.update(mine)
        try:
            yield mine
        finally:
            with self._changed:
                self._deleting.difference_update(mine)
                self._changed.notify_all()
