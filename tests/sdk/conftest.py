"""The market of these tests is started once."""

from collections.abc import Iterator

import pytest

from tests.sdk.market import SmallMarket, small_market


@pytest.fixture(scope="session")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallMarket]:
    with small_market(tmp_path_factory.mktemp("sdk-market")) as running:
        yield running


@pytest.fixture
def at_market(market: SmallMarket, monkeypatch: pytest.MonkeyPatch) -> SmallMarket:
    """The market, and this process's environment is that of its renter."""
    for name, value in market.local.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_COLOR", "1")
    return market
