"""The town behind a door, anew for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.histories.asgi import Door
from tests.histories.town import Town


@pytest.fixture
def town_door() -> Iterator[Door]:
    """Return the way into a fresh town."""
    with Door(Town()) as made:
        yield made
