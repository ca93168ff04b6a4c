"""One Ray for the whole session: it takes seconds to start, and the machines are small."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import pytest

from sublet_broker.adapters.blobs.file_blobs import FileBlobs
from sublet_broker.adapters.data_folder import DataFolder
from sublet_broker.adapters.ray.engine import EngineConfig
from sublet_broker.adapters.ray.ports import RayPorts
from sublet_broker.adapters.sql.migrations import migrate
from sublet_broker.adapters.sql.store import SqlStore
from sublet_broker.service.ports import MatcherAway, Proposal
from tests.ray.market import NOW_MS

T = TypeVar("T")
LIMIT_S = 300.0


@dataclass
class RayMarket:
    """Ray over a database and a folder of blobs."""

    store: SqlStore
    blobs: FileBlobs
    ports: RayPorts

    def propose(self) -> list[Proposal] | None:
        """Ask once; None: it is away."""
        try:
            return self.ports.matcher.propose(NOW_MS)
        except MatcherAway:
            return None


def eventually(look: Callable[[], T | None]) -> T:
    """Return the first thing that `look` finds. Fails after LIMIT_S."""
    deadline = time.monotonic() + LIMIT_S
    while (found := look()) is None:
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="session")
def ray_market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayMarket]:
    """The session's Ray, with two shards."""
    folder = DataFolder.open(tmp_path_factory.mktemp("ray"))
    migrate(folder.database_url)
    store = SqlStore(folder.database_url)
    blobs = FileBlobs(folder.blobs_root)
    blobs.prepare()
    config = EngineConfig(
        database_url=folder.database_url, blobs_root=folder.blobs_root, shards=2, cpus=2
    )
    ports = RayPorts.over(config, store, blobs)
    ports.start()
    assert ports.engine.wait_up(LIMIT_S), "Ray did not start"
    yield RayMarket(store, blobs, ports)
    ports.stop()
    store.close()
    folder.close()
