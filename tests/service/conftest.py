"""The SQL stores of tests/stores, for the stories that are told on them too."""

from __future__ import annotations

from tests.stores.conftest import (
    postgres_migrated,
    postgres_store,
    sqlite_store,
    sqlite_url,
)

__all__ = ["postgres_migrated", "postgres_store", "sqlite_store", "sqlite_url"]
