"""A PostgreSQL server of our own that is killed with -9 and started again; fsync is on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psycopg

USER = "sublet"
DATABASE = "sublet"
START_LIMIT_S = 90.0


def missing() -> str | None:
    """Say why no server can be started here, or None."""
    if _binaries() is None:
        return "no PostgreSQL server is installed: apt-get install postgresql"
    if os.geteuid() == 0 and shutil.which("runuser") is None:
        return "no runuser: PostgreSQL doesn't run as root"
    return None


def _binaries() -> Path | None:
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(found, key=lambda path: float(path.parent.name), default=None)


class PostgresServer:
    """One server with an empty database, in `root`."""

    def __init__(self, root: Path) -> None:
        binaries = _binaries()
        assert binaries is not None, missing()
        self._binaries = binaries
        self.root = root
        root.mkdir(parents=True)
        if os.geteuid() == 0:
            shutil.chown(root, "postgres")
            _reachable(root)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._run(
            "initdb",
            "-D",
            str(root / "data"),
            "-U",
            USER,
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-locale",
        )
        self.start()
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, DATABASE)

    @property
    def url(self) -> str:
        """Of the database."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{DATABASE}"

    def start(self) -> None:
        """Start it, and wait until it answers. What a killed one left may be in the way for a
        while: its sessions end by themselves."""
        deadline = time.monotonic() + START_LIMIT_S
        options = f"-p {self.port} -k {self.root} -c listen_addresses=127.0.0.1 -c fsync=on"
        while True:
            try:
                self._run(
                    "pg_ctl",
                    "-D",
                    str(self.root / "data"),
                    "-l",
                    str(self.root / "log"),
                    "-w",
                    "-t",
                    "60",
                    "-s",
                    "-o",
                    options,
                    "start",
                )
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            else:
                return

    def kill(self) -> None:
        """kill -9 the postmaster; its sessions end when they notice."""
        pid = self._postmaster()
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.05)

    def kill_sessions(self) -> int:
        """kill -9 every session of the database but this one; say how many. The server then ends
        all others, recovers and goes on."""
        # This one ends with them.
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.url) as connection:
            found = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
                (DATABASE,),
            ).fetchall()
            for (pid,) in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return len(found)

    def stop(self) -> None:
        """End it, if it runs."""
        with contextlib.suppress(RuntimeError):
            self._run("pg_ctl", "-D", str(self.root / "data"), "-m", "immediate", "-w", "stop")

    def _postmaster(self) -> int:
        return int((self.root / "data" / "postmaster.pid").read_text().splitlines()[0])

    def _run(self, name: str, *arguments: str) -> None:
        as_postgres = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [*as_postgres, str(self._binaries / name), *arguments],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            log = self.root / "log"
            tail = log.read_text()[-500:] if log.is_file() else ""
            raise RuntimeError(f"{name} failed: {done.stderr[-500:]} {tail}")


def _reachable(folder: Path) -> None:
    """Let another user pass to `folder`: pytest's own folders are closed to others."""
    for parent in folder.parents:
        mode = parent.stat().st_mode
        if not mode & 0o001:
            parent.chmod(mode | 0o001)
