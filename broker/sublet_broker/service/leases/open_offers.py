"""The open offers in memory, kept up by what commits have changed: what use-cases ask instead of
loading every offer.

A commit notes the providers of whom something has changed (UnitOfWork.touch_offer). Whoever asks
next reads just those from the database, by key, and before any transaction of its own. So an answer
is as old as the last question, and the facts are looked at once more before anything rests on it.
"""

import threading
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TypeVar

from sublet_broker.market.matching import BookEntry, Explanation, Requirements
from sublet_broker.market.offer_book import OfferBook
from sublet_broker.service.leases.candidates import PROVIDERS_AT_ONCE, load_entries
from sublet_broker.service.unit_of_work.context import Context

T = TypeVar("T")


class OpenOffers:
    """The offer book and its upkeep. Any thread may ask."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._book = OfferBook()
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        """Held while the database is read; whoever asks inside a transaction never waits for it."""

    def refresh(self) -> None:
        """Take up what has changed since the last question. Not inside a unit of work."""
        dirty = self._context.dirty.open_offers
        # Also where nothing is dirty: another thread may be about to take up what it has read.
        with self._refreshing:
            while some := list(dirty)[:PROVIDERS_AT_ONCE]:
                # Taken off before they are read, so that a change meanwhile isn't missed.
                for provider in some:
                    dirty.pop(provider, None)
                try:
                    with self._context.read() as snapshot:
                        entries = load_entries(snapshot.tx, some, snapshot.now_ms)
                except BaseException:
                    dirty.update(dict.fromkeys(some))
                    raise
                with self._lock:
                    self._take_up(entries)

    def _take_up(self, entries: Mapping[str, BookEntry | None]) -> None:
        for provider, entry in entries.items():
            if entry is None:
                self._book.remove(provider)
            else:
                self._book.put(entry)

    def _ask(self, question: Callable[[OfferBook, int], T]) -> T:
        with self._lock:
            return question(self._book, self._context.ports.clock.now_ms())

    def all(self) -> list[BookEntry]:
        """Return every open offer, the cheapest first."""
        self.refresh()
        return self._ask(lambda book, now_ms: [e for e in book if e.offer.expires_ms > now_ms])

    def could(self, requirements: Requirements) -> bool:
        """Say whether some machine on offer would do, busy or not."""
        self.refresh()
        return self._ask(lambda book, now_ms: book.could(requirements, now_ms))

    def explain(self, requirements: Requirements) -> Explanation:
        """Return what fits now, what is busy, and where nothing would do, why."""
        self.refresh()
        return self._ask(lambda book, now_ms: book.explain(requirements, now_ms))

    def candidates(self, requirements: Requirements, limit: int) -> list[BookEntry]:
        """Return the best offers that fitted when last looked at, at most `limit`. It may be asked
        inside a unit of work, because it asks nobody: refresh before it."""
        return self._ask(
            lambda book, now_ms: list(islice(book.candidates(requirements, now_ms), limit))
        )
