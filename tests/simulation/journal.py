"""A provider's journal on its disk."""

from __future__ import annotations

import json

from sublet_agent.core.effects import Save
from sublet_agent.core.records import IssuedOffer, RunRecord, Saved
from sublet_contracts.wire import Message


class DiskFailed(Exception):
    """The journal could not be written: nothing was."""


class SimJournal:
    """What session/journal.py keeps, as bytes: nothing that wasn't committed can leak through."""

    def __init__(self) -> None:
        self._runs: dict[str, bytes] = {}
        self._offers: bytes = b"[]"
        self._meta: dict[str, int | str] = {"broker": "", "offer_sequence": 0, "next_mid": 1}
        self._epochs: dict[str, int] = {}
        self.outbox: dict[int, tuple[str, Message]] = {}
        self.settlements: dict[str, None] = {}
        self._reclaimed = False

    def commit(self, save: Save) -> None:
        """Write all of it."""
        for lease in save.drop_messages_of:
            for mid in [m for m, (owner, _) in self.outbox.items() if owner == lease]:
                del self.outbox[mid]
        for lease, record in save.runs.items():
            self._runs[lease] = record.__pydantic_serializer__.to_json(record)
        for lease in save.forget_runs:
            self._runs.pop(lease, None)
        for queued in save.queue:
            self.outbox[queued.mid] = (queued.lease_id, queued.message)
        self._epochs.update(save.epochs)
        for envelope in save.settlements:
            self.settlements[envelope.id] = None
        if save.offers is not None:
            self._offers = json.dumps([o.model_dump(mode="json") for o in save.offers]).encode()
        for name in ("broker", "offer_sequence", "next_mid"):
            value = getattr(save, name)
            if value is not None:
                self._meta[name] = value
        if save.reclaimed is not None:
            self._reclaimed = save.reclaimed

    def run(self, lease_id: str) -> RunRecord | None:
        """Return a run's record as it was saved last."""
        saved = self._runs.get(lease_id)
        return None if saved is None else RunRecord.model_validate_json(saved)

    def load(self) -> Saved:
        """Return all that was saved."""
        offers = json.loads(self._offers)
        return Saved(
            broker=str(self._meta["broker"]),
            offer_sequence=int(self._meta["offer_sequence"]),
            next_mid=int(self._meta["next_mid"]),
            offers=[IssuedOffer.model_validate_json(json.dumps(o)) for o in offers],
            runs={k: RunRecord.model_validate_json(v) for k, v in self._runs.items()},
            epochs=dict(self._epochs),
            reclaimed=self._reclaimed,
        )
