"""A fresh broker for each test that asks for one; it starts in milliseconds."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.http.world import World, running


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A running broker without agents."""
    async with running() as made:
        yield made
