"""What runs in Ray's workers: a match shard's actor, and the tasks. Nothing here knows Ray.

A worker is handed ids, facts and paths, never a stranger's bytes; what strangers sent lies in blob
files, which are hashed and not interpreted.
"""

import json
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from sublet_broker.adapters.blobs.file_blobs import FileBlobs
from sublet_broker.adapters.blobs.verifying import check_checkpoint
from sublet_broker.adapters.ray.shards import Shard
from sublet_broker.adapters.sql.store import SqlStore
from sublet_broker.market.settling import SettlementCase, SettlementDecision, decide
from sublet_broker.service.ports import VerifyResult, VerifyTask

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


def verify(task: VerifyTask, blobs_root: str) -> VerifyResult:
    """Check a checkpoint's content in the folder of the blobs."""
    return check_checkpoint(task, FileBlobs(Path(blobs_root)))


def settle_batch(cases: Sequence[SettlementCase]) -> list[SettlementDecision]:
    """Decide a batch of settlements; the broker checks and commits them."""
    return [decide(case) for case in cases]
