"""Migrations: they make what tables.py says, once, and never touch what a newer release wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from sublet_broker.adapters.sql.engine import DatabaseUnsupported, connect_engine
from sublet_broker.adapters.sql.migrations import NewerData, alembic_config, migrate, release
from sublet_broker.adapters.sql.store import SqlStore
from sublet_broker.adapters.sql.tables import Row
from sublet_broker.market.facts import BlobFact


def test_a_migrated_database_is_what_the_tables_say(database_url: str) -> None:
    migrate(database_url)
    engine = connect_engine(database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = compare_metadata(context, Row.metadata)
        assert differences == []
        inspector = inspect(connection)
        for name, table in Row.metadata.tables.items():
            # Alembic compares no CHECKs.
            there = {str(check["name"]) for check in inspector.get_check_constraints(name)}
            said = {str(c.name) for c in table.constraints if str(c.name).startswith("ck_")}
            assert there == said, name
    engine.dispose()


def test_migrating_again_keeps_everything(database_url: str) -> None:
    migrate(database_url)
    store = SqlStore(database_url)
    with store.transaction() as tx:
        tx.add(BlobFact("s", "blake3:" + "a" * 64, 1))
    store.close()
    migrate(database_url)
    store = SqlStore(database_url)
    with store.snapshot() as tx:
        assert tx.find(BlobFact) == [BlobFact("s", "blake3:" + "a" * 64, 1)]
    store.close()


def test_a_newer_database_is_refused_and_not_touched(database_url: str) -> None:
    migrate(database_url)
    engine = connect_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        connection.execute(text("UPDATE about SET value = '7.1.0' WHERE id = 'written_by'"))
    engine.dispose()
    before = _content(database_url)
    with pytest.raises(NewerData) as refused:
        migrate(database_url)
    assert "7.1.0" in str(refused.value)
    assert release() in str(refused.value)
    assert "--data" in str(refused.value)
    assert _content(database_url) == before


def test_a_failed_migration_changes_nothing(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_way(config: Any, revision: str) -> None:
        config.attributes["connection"].execute(text("CREATE TABLE half (id BIGINT)"))
        raise OSError("killed")

    monkeypatch.setattr(command, "upgrade", half_way)
    with pytest.raises(OSError, match="killed"):
        migrate(database_url)
    monkeypatch.undo()
    engine = connect_engine(database_url)
    with engine.connect() as connection:
        assert inspect(connection).get_table_names() == []
    engine.dispose()
    migrate(database_url)


def test_going_back(database_url: str) -> None:
    migrate(database_url)
    engine = connect_engine(database_url)
    with engine.begin() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    with engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
    engine.dispose()
    migrate(database_url)


def test_a_folder_with_odd_characters(tmp_path: Path) -> None:
    folder = tmp_path / "data 100%d #1?"
    folder.mkdir()
    url = f"sqlite:///{folder / 'sublet.sqlite'}".replace("?", "%3F").replace("#", "%23")
    migrate(url)
    migrate(url)


@pytest.mark.parametrize("url", ["mysql://h/d", "sqlite://", "sqlite:///:memory:"])
def test_what_can_not_be_used_is_refused(url: str) -> None:
    with pytest.raises(DatabaseUnsupported, match="sqlite:///"):
        migrate(url)


def _content(url: str) -> bytes:
    """The bytes of an SQLite database and what waits in its WAL; nothing for PostgreSQL."""
    if not url.startswith("sqlite"):
        return b""
    path = Path(url.removeprefix("sqlite:///"))
    wal = path.with_name(path.name + "-wal")
    return path.read_bytes() + (wal.read_bytes() if wal.exists() else b"")
