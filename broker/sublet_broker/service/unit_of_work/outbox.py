"""The outbox: reliable messages wait in the database until their recipient has acknowledged them.

They are sent in order, and again on each connection; recipients act once, however often they come.
Notices (prepare, unprepare) are kept in memory only: losing one costs time, never correctness.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable

from sublet_broker.market.facts import OutboxFact
from sublet_broker.service.ports import Store
from sublet_contracts.wire import MESSAGES, Message

MAX_NOTICES = 256


class Outbox:
    """Messages to agents."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._notices: dict[str, deque[Message]] = {}
        self.on_new: Callable[[str], None] | None = None

    def pending(
        self, party: str, limit: int = 100, known: Collection[str] = ()
    ) -> list[tuple[str, Message]]:
        """Return those of the oldest `limit` messages that `party` hasn't acknowledged, with their
        mids, but not the `known` ones: they are under way."""
        with self._store.snapshot() as tx:
            facts = tx.find(OutboxFact, {"recipient": party}, order_by="order", limit=limit)
        return [
            (fact.id, MESSAGES[fact.type].model_validate_json(fact.body))
            for fact in facts
            if fact.id not in known
        ]

    def acked(self, party: str, mids: Iterable[str]) -> None:
        """Forget messages that `party` has on its disk."""
        with self._store.transaction() as tx:
            for fact in tx.find(OutboxFact, {"recipient": party, "id": tuple(mids)}):
                tx.delete(OutboxFact, fact.id)

    def add_notice(self, party: str, message: Message) -> None:
        """Queue an unreliable message; the oldest gives way when nobody takes them."""
        self._notices.setdefault(party, deque(maxlen=MAX_NOTICES)).append(message)

    def notices(self, party: str) -> list[Message]:
        """Take the unreliable messages for `party`."""
        waiting = self._notices.get(party)
        taken: list[Message] = []
        while waiting:
            taken.append(waiting.popleft())
        return taken

    def drop_notices(self, party: str) -> None:
        """Forget what was queued for a connection that is gone."""
        self._notices.pop(party, None)
