"""The same for a broker on PostgreSQL: the faults meet the durable writes of the database's own
processes, the ones that serve the broker as well as walwriter, checkpointer and crash recovery.

The broker stays as it is, and has to get over it: its connections break, and what it was told
neither yes nor no about may have been committed or not.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg

from sublet.demo.local import LocalMarketError
from tests.chaos.churn import TIMES, Say
from tests.chaos.gated_market import GatedMarket
from tests.chaos.strace import Strace
from tests.chaos.writes import FAULTS, Writes

MEET_LIMIT_S = 20.0
UP_LIMIT_S = 120.0
TRIES = 6
ROUNDS = 4
"""How often each sort of process meets each fault."""
SORTS = ("backend", "walwriter", "checkpointer", "startup")
_FILES = {"pg_wal": "write-ahead log", "base": "table", "global": "control and shared tables",
          "pg_xact": "commit log"}  # fmt: skip


def missing() -> str | None:
    """Say why there can't be a server of our own here, or None where there can."""
    if _programs() is None:
        return "no PostgreSQL server: apt-get install postgresql"
    if os.geteuid() != 0:
        return "a PostgreSQL server of our own needs root, to run it as another user"
    return None


def _programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


class Postgres:
    """A PostgreSQL server in a folder of its own, with fsync on."""

    def __init__(self) -> None:
        programs = _programs()
        assert programs is not None
        self._programs = programs
        self.root = Path(tempfile.mkdtemp(prefix="sublet-chaos-pg-"))
        owner = pwd.getpwnam("postgres")
        os.chown(self.root, owner.pw_uid, owner.pw_gid)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._as_postgres(
            "initdb",
            "-D",
            f"{self.root}/data",
            "-U",
            "sublet",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-locale",
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        with self.connect("postgres") as connection:
            connection.execute("CREATE DATABASE sublet")

    @property
    def url(self) -> str:
        """For --database."""
        return f"postgresql://sublet@127.0.0.1:{self.port}/sublet"

    def connect(self, name: str = "sublet") -> psycopg.Connection[Any]:
        """Connect as the broker's user. Raises psycopg.OperationalError."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="sublet",
            dbname=name,
            autocommit=True,
            connect_timeout=10,
        )

    def start(self) -> None:
        """Start the server where it isn't running, and wait until it answers."""
        if self._process is None or self._process.poll() is not None:
            with (self.root / "log").open("ab") as log:
                self._process = subprocess.Popen(
                    [
                        "setpriv",
                        "--reuid",
                        "postgres",
                        "--regid",
                        "postgres",
                        "--init-groups",
                        str(self._programs / "postgres"),
                        "-D",
                        f"{self.root}/data",
                        "-p",
                        str(self.port),
                        "-k",
                        str(self.root),
                        "-c",
                        "listen_addresses=127.0.0.1",
                        "-c",
                        "wal_writer_delay=20ms",
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    start_new_session=True,
                )
        deadline = time.monotonic() + UP_LIMIT_S
        while True:
            try:
                self.connect("postgres").close()
            except psycopg.OperationalError as error:
                if self._process.poll() is not None:
                    # It gave up, as after a death of its crash recovery: its operator starts it.
                    self._process = None
                    return self.start()
                if time.monotonic() > deadline:
                    raise LocalMarketError(f"PostgreSQL did not come up: {error}") from error
                time.sleep(0.1)
            else:
                return None

    @property
    def pid(self) -> int:
        """Of the server's first process."""
        assert self._process is not None
        return self._process.pid

    def processes(self) -> dict[int, str]:
        """Return the processes that it has now, and their sort."""
        found = {}
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        with contextlib.suppress(OSError):
            for pid in map(int, children.read_text().split()):
                with contextlib.suppress(OSError):
                    title = Path(f"/proc/{pid}/cmdline").read_bytes().decode().strip("\0 ")
                    found[pid] = sort_of(title)
        return found

    def stop(self) -> None:
        """End it and delete its data."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def _as_postgres(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [
                "setpriv",
                "--reuid",
                "postgres",
                "--regid",
                "postgres",
                "--init-groups",
                str(self._programs / program),
                *arguments,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd="/",
        )


def sort_of(title: str) -> str:
    """Name the sort of process by its title, as in "postgres: walwriter"."""
    words = re.sub(r"^postgres: +", "", title)
    return "backend" if words.startswith("sublet ") else words.split()[0] if words else "starting"


def file_of(path: str, root: Path) -> str:
    """Name the sort of file."""
    with contextlib.suppress(ValueError):
        first = Path(path).relative_to(root / "data").parts[:1]
        return _FILES.get(first[0], first[0]) if first else "data folder"
    return "other"


class DatabaseWrites(Writes):
    """One run."""

    def __init__(self, root: Path, seed: int, say: Say, *, rounds: int = ROUNDS) -> None:
        super().__init__(root, (), seed, say)
        self.database = Postgres()
        self.market = GatedMarket(root / "market", ("--database", self.database.url, *TIMES))
        self.market.gate = self.gates.address
        self.rounds = rounds
        self.met: Counter[tuple[str, str, str]] = Counter()
        """(sort of process, sort of file, fault): how often."""

    def _kill_away(self) -> None:
        tries: Counter[tuple[str, str]] = Counter()
        number = 0
        while due := [
            (sort, fault)
            for sort in SORTS
            for fault in FAULTS
            if self._times(sort, fault) < self.rounds and tries[sort, fault] < self.rounds + TRIES
        ]:
            sort, fault = self.random.choice(due)
            tries[sort, fault] += 1
            number += 1
            out = self.root / "traces" / f"postgres-{number}"
            with contextlib.suppress(ProcessLookupError):
                self._one(sort, fault, out)
            self.database.start()
            self._go_on()
            self.say(f"  {self.met.total()} faults, {len(due)} sorts due, last {fault} at {sort}")

    def _line(self) -> str:
        return f"  {self.met.total()} faults; {len(self.jobs) - len(self.live)} jobs ended"

    def _times(self, sort: str, fault: str) -> int:
        return sum(n for (s, _, f), n in self.met.items() if (s, f) == (sort, fault))

    def _one(self, sort: str, fault: str, out: Path) -> None:
        mine = [pid for pid, title in self.database.processes().items() if title == sort]
        if sort == "startup":
            # Once one of them has died, the first process writes its own file anew and forks the
            # crash recovery. A fault counts in each of the two for itself.
            first = self.random.choice((1, 2, 3))
            strace = Strace(self.database.pid, fault, out, first=first, whole=True)
            for pid, title in self.database.processes().items():
                if title == "checkpointer":
                    os.kill(pid, signal.SIGKILL)
        elif not mine:
            return
        else:
            # All that serve the broker: who commits first meets it.
            strace = Strace(mine[0], fault, out, also=mine[1:])
        deadline = time.monotonic() + MEET_LIMIT_S
        while not strace.met() and strace.running and time.monotonic() < deadline:
            self._tend()
            if sort == "checkpointer":
                self._checkpoint()
            time.sleep(0.05)
        strace.let_go()
        for call in strace.met():
            file = file_of(call.path, self.database.root)
            self.met["postmaster" if file == "postmaster.pid" else sort, file, fault] += 1

    def _checkpoint(self) -> None:
        with contextlib.suppress(psycopg.Error), self.database.connect() as connection:
            connection.execute("CHECKPOINT")

    def _go_on(self) -> None:
        """Let the market do something between two faults: the broker finds its database again."""
        self._asked(self.client.balance)
        self._tend()
        self._act()

    def _calm(self) -> None:
        self.database.start()
        super()._calm()

    def record(self) -> dict[str, Any]:
        """Return it for the reliability page."""
        record = super().record()
        dropped = ("processes", "points", "not_met", "every_write_fails",
                   "attempts_meanwhile", "acknowledged_meanwhile")  # fmt: skip
        points = sorted({(sort, file) for sort, file, _ in self.met})
        totals: Counter[str] = Counter()
        for (_, _, fault), times in self.met.items():
            totals[fault] += times
        return {
            **{key: value for key, value in record.items() if key not in dropped},
            "what": ["database"],
            "faults": dict(totals),
            "files": [
                {"process": sort, "file": file, "fault": fault, "times": times}
                for (sort, file, fault), times in sorted(self.met.items())
            ],
            "points": [f"{sort}: {file}" for sort, file in points],
        }

    def play(self) -> Any:
        """See Churn."""
        try:
            return super().play()
        finally:
            self.database.stop()
