"""The open offers of the whole market, in memory: what a job could get, without asking a database.

The order book (order_book.py) of a pool decides who gets what. This one answers whoever asks:
"would any machine do", "which would be next best", "why does none". It is never the truth: what it
says is checked against the facts, by key, before anything is decided.

Costs: a question whose like was answered before looks at one offer; another one at offers from the
cheapest on until one fits; only "why does none" looks at all of them, once until an offer changes.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator

from sublet_broker.market.accepted import accepted
from sublet_broker.market.matching import (
    BookEntry,
    Explanation,
    Rank,
    Requirements,
    explain,
    fits,
    pick_devices,
    rank_of,
)
from sublet_contracts.documents import Offer

REMEMBERED_ANSWERS = 10_000


class OfferBook:
    """Offers by provider, ranked from the cheapest on. One caller at a time."""

    def __init__(self) -> None:
        self._entries: dict[str, BookEntry] = {}
        self._ranks: list[tuple[Rank, str]] = []
        self._version = 0
        """Changes with the set of offers, not with what is free of them."""
        self._able: OrderedDict[Requirements, str] = OrderedDict()
        """For requirements a provider whose machine would do, when it was last asked."""
        self._unable: OrderedDict[Requirements, tuple[int, Explanation]] = OrderedDict()
        """For requirements that no machine met why, and at which version."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[BookEntry]:
        """All entries, the cheapest first."""
        return (self._entries[provider] for _, provider in self._ranks)

    def put(self, entry: BookEntry) -> None:
        """Take up a provider's offer in place of its older one, or what is free of it now."""
        provider = entry.offer.provider
        known = self._entries.get(provider)
        if known is None or known.offer.id != entry.offer.id:
            self.remove(provider)
            insort(self._ranks, (rank_of(entry.offer), provider))
            self._version += 1
        self._entries[provider] = entry

    def remove(self, provider: str) -> None:
        """Forget a provider's offer."""
        entry = self._entries.pop(provider, None)
        if entry is not None:
            del self._ranks[bisect_left(self._ranks, (rank_of(entry.offer), provider))]
            self._version += 1

    def could(self, requirements: Requirements, now_ms: int) -> bool:
        """Say whether some machine on offer would do, busy or not."""
        witness = self._able.get(requirements)
        if witness is not None and self._would_do(requirements, witness, now_ms):
            self._able.move_to_end(requirements)
            return True
        known = self._unable.get(requirements)
        if known is not None and known[0] == self._version:
            return False
        for (price, *_), provider in self._ranks:
            if price > requirements.max_price_ucr_per_device_hour:
                break  # The ranks begin with the price.
            if self._would_do(requirements, provider, now_ms):
                self._able[requirements] = provider
                while len(self._able) > REMEMBERED_ANSWERS:
                    self._able.popitem(last=False)
                return True
        return False

    def _would_do(self, requirements: Requirements, provider: str, now_ms: int) -> bool:
        entry = self._entries.get(provider)
        if entry is None or entry.offer.expires_ms <= now_ms:
            return False
        offer = accepted(entry.offer.envelope, Offer)
        return not fits(requirements, offer, [device.id for device in offer.devices])

    def explain(self, requirements: Requirements, now_ms: int) -> Explanation:
        """Judge all offers: what fits, what is busy, and if nothing does, how far off the nearest
        one is."""
        known = self._unable.get(requirements)
        if known is not None and known[0] == self._version:
            return known[1]
        explanation = explain(requirements, (e for e in self if e.offer.expires_ms > now_ms))
        if not explanation.some_offer_could:
            self._unable[requirements] = (self._version, explanation)
            while len(self._unable) > REMEMBERED_ANSWERS:
                self._unable.popitem(last=False)
        return explanation

    def candidates(self, requirements: Requirements, now_ms: int) -> Iterator[BookEntry]:
        """Yield the offers that fit and are free now, in the order in which the market chooses:
        providers to avoid last, then by rank."""
        avoided: list[BookEntry] = []
        for (price, *_), provider in self._ranks:
            if price > requirements.max_price_ucr_per_device_hour:
                break
            entry = self._entries[provider]
            if len(entry.free_device_ids) < requirements.resources.devices:
                continue
            offer = accepted(entry.offer.envelope, Offer)
            if entry.offer.expires_ms <= now_ms or not _fits_now(requirements, offer, entry):
                continue
            if provider in requirements.avoid:
                avoided.append(entry)
            else:
                yield entry
        yield from avoided


def _fits_now(requirements: Requirements, offer: Offer, entry: BookEntry) -> bool:
    if fits(requirements, offer, entry.free_device_ids):
        return False
    return pick_devices(requirements, offer, entry.free_device_ids) is not None
