"""One market for the tests of whole agents: a broker with short times, a renter with money."""

from collections.abc import Iterator

import pytest

from sublet_agent.adapters.shell import UNEXPECTED
from tests.e2e.bad_market import BadMarket

TIMES = ("--heartbeat-ms", "500", "--unknown-after-ms", "1500")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BadMarket]:
    """Agents are told apart by region: each test starts its own. The books are checked last."""
    world = BadMarket(tmp_path_factory.mktemp("agents"), TIMES)
    try:
        world.start()
        yield world
        world.balanced()
        for log in (world.market.root / "logs").iterdir():
            assert UNEXPECTED not in log.read_text(errors="replace"), log
    finally:
        world.stop()
