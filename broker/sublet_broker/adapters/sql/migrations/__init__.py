"""The database's history, by Alembic: `migrate` brings a database to the newest form at start.

A migration is a file in versions/ (CONTRIBUTING.md says how to write one). All of them run in one
transaction, so a broker that is killed half-way has changed nothing.
"""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, make_url, text

from sublet_broker.adapters.sql.engine import connect_engine

_WRITER_LOCK = 0x5B1E7  # PostgreSQL's advisory lock of this name: one broker migrates at a time


class NewerData(Exception):
    """The database was written by a newer release; nothing was touched."""


def migrate(url: str) -> None:
    """Bring the database at `url` (SQLAlchemy's form) to the form this release expects.

    An SQLite file is made if it is not there. Raises NewerData, and sqlalchemy's
    OperationalError when the database does not answer.
    """
    database = make_url(url).database
    is_file = make_url(url).get_backend_name() == "sqlite"
    if is_file and database and Path(database).exists():
        # A look that cannot write: even opening in WAL mode would touch a newer release's file.
        looking = connect_engine(url, read_only=True)
        try:
            with looking.connect() as connection:
                _refuse_newer(connection)
        finally:
            looking.dispose()
    engine = connect_engine(url)
    try:
        with engine.execution_options(begin="BEGIN IMMEDIATE").begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _WRITER_LOCK})
            _refuse_newer(connection)
            config = alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.execute(
                text(
                    "INSERT INTO about (id, value) VALUES ('written_by', :version) "
                    "ON CONFLICT (id) DO UPDATE SET value = excluded.value"
                ),
                {"version": release()},
            )
    finally:
        engine.dispose()


def alembic_config() -> Config:
    """Return Alembic's configuration, without any file of its own."""
    config = Config()
    # Alembic interpolates %, which a folder's name may hold.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def release() -> str:
    """Return this release's version number."""
    try:
        return version("sublet")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0"


def _refuse_newer(connection: Connection) -> None:
    current = MigrationContext.configure(connection).get_current_heads()
    script = ScriptDirectory.from_config(alembic_config())
    for revision in current:
        try:
            known = script.get_revision(revision) is not None
        except CommandError:
            known = False
        if known:
            continue
        row = connection.execute(text("SELECT value FROM about WHERE id = 'written_by'")).first()
        writer = str(row[0]) if row else "of a newer version"
        raise NewerData(
            f"the data folder was written by sublet {writer}, and this is {release()}: install "
            f"that release (pip install 'sublet[broker]=={writer}') or name another folder with "
            "--data; nothing was changed"
            if re.match(r"\d", writer)
            else f"the data was written by a release {writer} than {release()}: install a newer "
            "release or name another folder with --data; nothing was changed"
        )
