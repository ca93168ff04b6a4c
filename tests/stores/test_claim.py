"""Two brokers never share a database."""

from __future__ import annotations

from pathlib import Path

import pytest

from sublet_broker.adapters.sql.engine import Claim, DatabaseInUse, connect_engine


@pytest.mark.postgres
def test_a_second_broker_on_the_same_database_is_refused(postgres_database: str) -> None:
    first = Claim(postgres_database)
    with pytest.raises(DatabaseInUse, match="another broker uses this database"):
        Claim(postgres_database)
    assert first.trouble() == ""
    first.close()
    Claim(postgres_database).close()


@pytest.mark.postgres
def test_a_claim_whose_connection_broke_is_made_again_or_says_so(postgres_database: str) -> None:
    first = Claim(postgres_database)
    engine = connect_engine(postgres_database)
    kill = (
        "SELECT pg_terminate_backend(pid, 60000) FROM pg_locks WHERE locktype = 'advisory' "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )

    def break_it() -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql(kill)

    break_it()
    assert first.trouble() == ""
    with pytest.raises(DatabaseInUse):
        Claim(postgres_database)
    break_it()
    second = Claim(postgres_database)
    assert "another broker" in first.trouble()
    second.close()
    assert first.trouble() == ""
    first.close()
    engine.dispose()


def test_an_sqlite_file_is_guarded_by_its_folder(tmp_path: Path) -> None:
    claim = Claim(f"sqlite:///{tmp_path / 'x.sqlite'}")
    assert claim.trouble() == ""
    claim.close()
