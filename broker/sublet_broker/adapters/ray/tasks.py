"""What runs in Ray's workers: a match shard's actor, and the tasks. Nothing here knows Ray.

A worker is handed ids, facts and places, never a stranger's bytes; what strangers sent lies in the
blob store, and is hashed and not interpreted. The key to a store that has one comes from the
worker's own environment.
"""

import functools
import json
import logging
import os
import secrets
from collections.abc import Sequence

from sublet_broker.adapters.blobs.opening import open_blobs
from sublet_broker.adapters.blobs.verifying import check_checkpoint
from sublet_broker.adapters.ray.shards import Shard
from sublet_broker.adapters.sql.store import SqlStore
from sublet_broker.market.facts import ContentFact
from sublet_broker.market.settling import SettlementCase, SettlementDecision, decide
from sublet_broker.service.content.pack_work import OwnPackWork
from sublet_broker.service.ports import BlobStore, PackVerdict, VerifyResult, VerifyTask

log = logging.getLogger("sublet.ray.work")


class ShardActor(Shard):
    """A shard in whatever process it is made: it opens the database by itself, read-only."""

    def __init__(self, database_url: str, number: int, shards: int) -> None:
        store = SqlStore(database_url, read_only=True)
        try:
            with store.snapshot() as tx:
                super().__init__(tx, number, shards, secrets.token_hex(8))
        finally:
            store.close()
        built = {"shard": number, "pid": os.getpid(), "pools": len(self._books)}
        log.info("shard built %s", json.dumps(built | {"jobs": len(self._jobs)}))

    def pid(self) -> int:
        """Return the process's id."""
        return os.getpid()


def verify(task: VerifyTask, blobs: str) -> VerifyResult:
    """Check a checkpoint's content where the blobs lie."""
    return check_checkpoint(task, _opened(blobs))


def check_pack(pack: str, name: str, table: bytes, size_bytes: int, blobs: str) -> PackVerdict:
    """Hash a pack that was put there by address."""
    return OwnPackWork(_opened(blobs)).check(pack, name, table, size_bytes)


def whole_in_packs(contents: Sequence[ContentFact], blobs: str) -> list[bool]:
    """Hash what lies in packs."""
    return OwnPackWork(_opened(blobs)).whole(contents)


def move_packs(contents: Sequence[ContentFact], to: str, blobs: str) -> list[bool]:
    """Write what is whole of these into a new pack."""
    return OwnPackWork(_opened(blobs)).move(contents, to)


@functools.cache
def _opened(blobs: str) -> BlobStore:
    return open_blobs(blobs, os.environ)


def settle_batch(cases: Sequence[SettlementCase]) -> list[SettlementDecision]:
    """Decide a batch of settlements; the broker checks and commits them."""
    return [decide(case) for case in cases]
