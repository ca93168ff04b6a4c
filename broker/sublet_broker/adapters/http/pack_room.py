"""Room for packs on their way in: so many bytes in memory at once, and so many of one party's."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sublet_contracts.packs import MAX_BODY_BYTES

ROOM_BYTES = 4 * MAX_BODY_BYTES
PARTY_BYTES = MAX_BODY_BYTES
"""Four packs of the usual size, or the largest one."""


class PackRoom:
    """Who has none waits: the bytes stay with the sender. Event loop only."""

    def __init__(self, room_bytes: int = ROOM_BYTES, party_bytes: int = PARTY_BYTES) -> None:
        self._left_bytes = room_bytes
        self._party_bytes = party_bytes
        self._held: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def hold(self, party: str, size_bytes: int) -> AsyncIterator[None]:
        """Have room for a body, for as long as the block lasts."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_room(party, size_bytes))
            self._left_bytes -= size_bytes
            self._held[party] += size_bytes
        try:
            yield
        finally:
            self._left_bytes += size_bytes
            self._held[party] -= size_bytes
            if not self._held[party]:
                del self._held[party]
            async with self._changed:
                self._changed.notify_all()

    def _has_room(self, party: str, size_bytes: int) -> bool:
        mine = self._held[party] + size_bytes
        return size_bytes <= self._left_bytes and mine <= self._party_bytes
