"""One market for all tests of the SDK: a broker and one machine, real processes, no Docker."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sublet.client import Client
from sublet.demo.local import LocalMarket

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "e2e" / "training_job.py"


@dataclass(frozen=True)
class SmallMarket:
    """A running market and its renter, who has 5 credits."""

    local: LocalMarket
    client: Client

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which `sublet` is this renter at this market."""
        return {**os.environ, **self.local.environment}


@contextmanager
def small_market(root: Path) -> Iterator[SmallMarket]:
    """Start it; stop it at the end."""
    local = LocalMarket(root, ray="off")
    try:
        local.start_broker()
        config = Path(local.environment["XDG_CONFIG_HOME"]) / "sublet"
        client = Client(broker=local.url, config_dir=config)
        local.start_agent(
            *("alice", "--runner", "process", "--trust", client.party),
            *("--region", "here", "--image-policy", "any"),
        )
        local.wait_for(lambda: client.offers().offers, "an offer", local.agents["alice"])
        client.fund(client.party, 5, operator_key=local.operator_key)
        yield SmallMarket(local, client)
    finally:
        local.stop()
