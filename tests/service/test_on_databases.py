"""The same stories on SQLite and PostgreSQL: the use-cases know no difference between stores."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from sublet_broker.adapters.sql.store import SqlStore
from tests.service import (
    test_checkpoints_seen,
    test_evidence,
    test_logs,
    test_metrics,
    test_money,
    test_packs,
    test_retention,
    test_story,
)
from tests.service.world import World

Story = Callable[[], None]


def _stories() -> list[Story]:
    """Return the tests that take nothing: each composes one world of its own."""
    found: list[Story] = []
    for module in (
        test_story,
        test_money,
        test_logs,
        test_retention,
        test_packs,
        test_metrics,
        test_evidence,
        test_checkpoints_seen,
    ):
        for name, story in vars(module).items():
            if name.startswith("test_") and not inspect.signature(story).parameters:
                found.append(story)
    return found


@pytest.mark.parametrize("story", _stories(), ids=lambda story: story.__name__)
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_a_story(
    kind: str, story: Story, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: SqlStore = request.getfixturevalue(f"{kind}_store")
    given = iter([store])
    monkeypatch.setattr(World, "new_store", staticmethod(lambda: next(given)))
    story()
    store.close()
