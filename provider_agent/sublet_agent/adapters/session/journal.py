"""The journal: SQLite in the state folder, synchronous FULL. What is committed survives anything.

One transaction per Step of the core. A lock on the folder keeps a second agent out.
"""

import fcntl
import json
import os
import sqlite3
from dataclasses import dataclass
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


class Journal:
    """The core's memory on disk. Used from one thread."""

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
        self._db = sqlite3.connect(folder / "journal.db", isolation_level=None)
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
        self.state_id = self._meta("state_id")
        self.unreadable: dict[str, str] = {}
        """lease id -> the saved record that `load` could not read"""
        earned = [_earned(envelope) for envelope in self.settlements()]
        self._income = Income(earned_ucr=sum(earned), leases=len(earned))

    def close(self) -> None:
        """Let go of the folder."""
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

    @with_reserve
    def commit(self, save: Save) -> None:
        """Write one step's changes, all or nothing, and wait for the disk."""
        if save.empty:
            return
        run = self._db.execute
        run("BEGIN IMMEDIATE")
        try:
            for lease in save.drop_messages_of:
                run("DELETE FROM outbox WHERE lease=?", (lease,))
            for lease, record in save.runs.items():
                run("INSERT OR REPLACE INTO runs VALUES (?,?)", (lease, record.model_dump_json()))
            for lease in save.forget_runs:
                run("DELETE FROM runs WHERE lease=?", (lease,))
            for queued in save.queue:
                body = queued.message.model_dump_json()
                run(
                    "INSERT INTO outbox VALUES (?,?,?,?)",
                    (queued.mid, queued.lease_id, queued.message.TYPE, body),
                )
            for job, epoch in save.epochs.items():
                run("INSERT OR REPLACE INTO epochs VALUES (?,?)", (job, epoch))
            earned = [
                _earned(envelope) for envelope in save.settlements if self._add_settlement(envelope)
            ]
            if save.offers is not None:
                self._set("offers", json.dumps([o.model_dump(mode="json") for o in save.offers]))
            for name in ("broker", "offer_sequence", "next_mid"):
                value = getattr(save, name)
                if value is not None:
                    self._set(name, str(value))
            if save.reclaimed is not None:
                self._set("reclaimed", "yes" if save.reclaimed else "no")
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
        row = self._db.execute("SELECT record FROM runs WHERE lease=?", (lease_id,)).fetchone()
        return RunRecord.model_validate_json(row[0]) if row else None

    @with_reserve
    def forget(self, lease_id: str) -> None:
        """Drop what is saved of a run."""
        self._db.execute("DELETE FROM runs WHERE lease=?", (lease_id,))
        self._db.execute("DELETE FROM outbox WHERE lease=?", (lease_id,))

    def pending(self, after: int = 0, limit: int = 1000) -> list[Pending]:
        """Return unacknowledged messages in order, past number `after`."""
        rows = self._db.execute(
            "SELECT mid, type, body FROM outbox WHERE mid>? ORDER BY mid LIMIT ?", (after, limit)
        )
        return [
            Pending(number, f"{self.state_id}-{number}", _message(kind, body))
            for number, kind, body in rows
        ]

    @with_reserve
    def acknowledged(self, mids: tuple[str, ...]) -> None:
        """Forget messages that are on the broker's disk."""
        prefix = self.state_id + "-"
        numbers = [
            (int(mid[len(prefix) :]),)
            for mid in mids
            if mid.startswith(prefix) and mid[len(prefix) :].isdigit()
        ]
        self._db.executemany("DELETE FROM outbox WHERE mid=?", numbers)

    def settlements(self) -> list[Envelope]:
        """Return the settlements received, oldest first."""
        rows = self._db.execute("SELECT envelope FROM settlements ORDER BY rowid")
        return [Envelope.model_validate_json(text) for (text,) in rows]

    def income(self) -> Income:
        """Return what the settlements received add up to."""
        return self._income

    def _add_settlement(self, envelope: Envelope) -> bool:
        """Write a settlement; False: it is here already."""
        added = self._db.execute(
            "INSERT OR IGNORE INTO settlements VALUES (?,?)",
            (envelope.id, envelope.model_dump_json()),
        )
        return added.rowcount == 1

    def _meta(self, name: str, default: str = "") -> str:
        row = self._db.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        return str(row[0]) if row else default

    def _set(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?,?)", (name, value))


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
