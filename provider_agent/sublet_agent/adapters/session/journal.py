"""The journal: SQLite in the state folder, synchronous FULL. What is committed survives anything.

One transaction for one Step of the core, or for several in their order. A lock on the folder keeps
a second agent out. What is to be written is made into rows first (`rows_of`), for records change
while the disk is waited for; what reads has a connection of its own, which waits for no writer.
"""

import fcntl
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sublet_agent.adapters.session.disk_reserve import Reserve, with_reserve
from sublet_agent.core.effects import Save
from sublet_agent.core.records import IssuedOffer, RunRecord, Saved
from sublet_agent.core.status import Income
from sublet_contracts.durable import make_folder
from sublet_contracts.envelope import Envelope
from sublet_contracts.wire import MESSAGES, Message

VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs (lease TEXT PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS epochs (job TEXT PRIMARY KEY, epoch INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (
    mid INTEGER PRIMARY KEY, lease TEXT NOT NULL, type TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS settlements (id TEXT PRIMARY KEY, envelope TEXT NOT NULL);
"""


class StateFolderInUse(Exception):
    """Another agent works with this state folder."""


class NewerState(Exception):
    """The state folder was written by a newer release."""


@dataclass(frozen=True)
class Pending:
    """A reliable message that has not been acknowledged."""

    number: int
    mid: str
    message: Message | None
    """None: what was written can't be read any more"""


@dataclass(frozen=True)
class Rows:
    """Changes as they are written."""

    statements: tuple[tuple[str, tuple[object, ...]], ...] = ()
    settlements: tuple[tuple[str, str, int], ...] = ()
    """id, envelope, and what it earned"""
    records: Mapping[str, str | None] = field(default_factory=dict)
    """each run's record that is among the changes; None: it is forgotten"""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return not (self.statements or self.settlements)


class Journal:
    """The core's memory on disk. One thread writes at a time; what reads is called from one."""

    def __init__(self, folder: Path) -> None:
        """Open or make it. Raises StateFolderInUse, NewerState, OSError, sqlite3.Error."""
        make_folder(folder, 0o700)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise StateFolderInUse(
                f"another agent is using {folder}; stop it, or give this one its own --state"
            ) from error
        self.reserve = Reserve(folder / "reserve")
        self._reading: sqlite3.Connection | None = None
        path = folder / "journal.db"
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        # Asked first: a newer release's file is left as it is, to the byte.
        found = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if found > VERSION:
            self.close()
            raise NewerState(
                f"{folder} was written by a newer release (version {found}); update sublet"
            )
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        self._db.execute(f"PRAGMA user_version={VERSION}")
        self._db.execute(
            "INSERT OR IGNORE INTO meta VALUES ('state_id', ?)", (os.urandom(8).hex(),)
        )
        self._reading = sqlite3.connect(path, isolation_level=None)
        self.state_id = self._meta("state_id")
        self.unreadable: dict[str, str] = {}
        """lease id -> the saved record that `load` could not read"""
        earned = [_earned(envelope) for envelope in self.settlements()]
        self._income = Income(earned_ucr=sum(earned), leases=len(earned))

    def close(self) -> None:
        """Let go of the folder."""
        if self._reading is not None:
            self._reading.close()
        self._db.close()
        os.close(self._lock)

    def load(self) -> Saved:
        """Return all that was saved."""
        offers = json.loads(self._meta("offers", "[]"))
        return Saved(
            broker=self._meta("broker"),
            offer_sequence=int(self._meta("offer_sequence", "0")),
            next_mid=int(self._meta("next_mid", "1")),
            offers=[IssuedOffer.model_validate_json(json.dumps(o)) for o in offers],
            runs=self._load_runs(),
            epochs=dict(self._db.execute("SELECT job, epoch FROM epochs").fetchall()),
            reclaimed=self._meta("reclaimed") == "yes",
        )

    def _load_runs(self) -> dict[str, RunRecord]:
        found: dict[str, RunRecord] = {}
        for lease, text in self._db.execute("SELECT lease, record FROM runs"):
            try:
                found[lease] = RunRecord.model_validate_json(text)
            except ValueError:
                # One record must not keep the agent, and with it all other runs, from starting.
                self.unreadable[lease] = text
        return found

    def commit(self, save: Save) -> None:
        """Write one step's changes, all or nothing, and wait for the disk."""
        self.write((rows_of(save),))

    @with_reserve
    def write(self, changes: Sequence[Rows]) -> None:
        """Write these in their order, all or nothing, and wait for the disk."""
        if all(rows.empty for rows in changes):
            return
        run = self._db.execute
        run("BEGIN IMMEDIATE")
        try:
            earned: list[int] = []
            for rows in changes:
                for statement, values in rows.statements:
                    run(statement, values)
                earned += [ucr for id, text, ucr in rows.settlements if self._add(id, text)]
            run("COMMIT")
            before = self._income
            self._income = Income(
                earned_ucr=before.earned_ucr + sum(earned), leases=before.leases + len(earned)
            )
        except BaseException:
            if self._db.in_transaction:
                run("ROLLBACK")
            raise

    def run(self, lease_id: str) -> RunRecord | None:
        """Return a run's record as it was committed last; None: it never was."""
        row = self._read("SELECT record FROM runs WHERE lease=?", (lease_id,)).fetchone()
        return RunRecord.model_validate_json(row[0]) if row else None

    @with_reserve
    def forget(self, lease_id: str) -> None:
        """Drop what is saved of a run."""
        self._db.execute("DELETE FROM runs WHERE lease=?", (lease_id,))
        self._db.execute("DELETE FROM outbox WHERE lease=?", (lease_id,))

    def pending(self, after: int = 0, limit: int = 1000) -> list[Pending]:
        """Return unacknowledged messages in order, past number `after`."""
        rows = self._read(
            "SELECT mid, type, body FROM outbox WHERE mid>? ORDER BY mid LIMIT ?", (after, limit)
        )
        return [
            Pending(number, f"{self.state_id}-{number}", _message(kind, body))
            for number, kind, body in rows
        ]

    def acknowledged(self, mids: tuple[str, ...]) -> None:
        """Forget messages that are on the broker's disk."""
        self.write((self.rows_of_acknowledged(mids),))

    def rows_of_acknowledged(self, mids: tuple[str, ...]) -> Rows:
        """Return the same as changes."""
        prefix = self.state_id + "-"
        numbers = [
            int(mid[len(prefix) :])
            for mid in mids
            if mid.startswith(prefix) and mid[len(prefix) :].isdigit()
        ]
        return Rows(tuple(("DELETE FROM outbox WHERE mid=?", (number,)) for number in numbers))

    def settlements(self) -> list[Envelope]:
        """Return the settlements received, oldest first."""
        rows = self._db.execute("SELECT envelope FROM settlements ORDER BY rowid")
        return [Envelope.model_validate_json(text) for (text,) in rows]

    def income(self) -> Income:
        """Return what the settlements received add up to."""
        return self._income

    def _add(self, settlement_id: str, envelope: str) -> bool:
        """Write a settlement; False: it is here already."""
        added = self._db.execute(
            "INSERT OR IGNORE INTO settlements VALUES (?,?)", (settlement_id, envelope)
        )
        return added.rowcount == 1

    def _read(self, query: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        assert self._reading is not None
        return self._reading.execute(query, values)

    def _meta(self, name: str, default: str = "") -> str:
        row = self._db.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        return str(row[0]) if row else default


def rows_of(save: Save) -> Rows:
    """Return one step's changes as they are now. Raises ValueError for what can't be written."""
    run: list[tuple[str, tuple[object, ...]]] = []
    records: dict[str, str | None] = {}
    for lease in save.drop_messages_of:
        run.append(("DELETE FROM outbox WHERE lease=?", (lease,)))
    for lease, record in save.runs.items():
        text = records[lease] = record.model_dump_json()
        run.append(("INSERT OR REPLACE INTO runs VALUES (?,?)", (lease, text)))
    for lease in save.forget_runs:
        records[lease] = None
        run.append(("DELETE FROM runs WHERE lease=?", (lease,)))
    for queued in save.queue:
        body = queued.message.model_dump_json()
        row = (queued.mid, queued.lease_id, queued.message.TYPE, body)
        run.append(("INSERT INTO outbox VALUES (?,?,?,?)", row))
    for job, epoch in save.epochs.items():
        run.append(("INSERT OR REPLACE INTO epochs VALUES (?,?)", (job, epoch)))
    named: dict[str, str | None] = {
        name: None if (value := getattr(save, name)) is None else str(value)
        for name in ("broker", "offer_sequence", "next_mid")
    }
    if save.offers is not None:
        named["offers"] = json.dumps([offer.model_dump(mode="json") for offer in save.offers])
    if save.reclaimed is not None:
        named["reclaimed"] = "yes" if save.reclaimed else "no"
    for name, value in named.items():
        if value is not None:
            run.append(("INSERT OR REPLACE INTO meta VALUES (?,?)", (name, value)))
    settlements = tuple((e.id, e.model_dump_json(), _earned(e)) for e in save.settlements)
    return Rows(tuple(run), settlements, records)


def _earned(envelope: Envelope) -> int:
    """Return a settlement's provider_ucr; the core has verified it before it was written."""
    return int(json.loads(envelope.payload_bytes)["provider_ucr"])


def unwritable(save: Save) -> dict[str, str]:
    """Return the leases of which something in `save` can't be written down, and why."""
    found: dict[str, str] = {}
    things = [*save.runs.items(), *((each.lease_id, each.message) for each in save.queue)]
    for lease_id, thing in things:
        try:
            thing.model_dump_json()
        except ValueError as error:
            found[lease_id] = f"{type(error).__name__}: {error}"
    return found


def _message(kind: str, body: str) -> Message | None:
    try:
        return MESSAGES[kind].model_validate_json(body)
    except (KeyError, ValueError):
        return None
