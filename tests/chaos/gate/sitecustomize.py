"""Runs in each process under test: names its durable writes and lets each be met by a fault.

Before the process makes a write durable (`os.fsync`, `os.fdatasync`, a commit of SQLite) it tells
which process, file and place in our code that is, and waits until it may go on. Meanwhile strace
may have been attached to this very thread; the fault itself is strace's and the kernel's. Nothing
else of the process changes. Python imports this module by its name, from the PYTHONPATH that the
chaos run sets; where nobody listens any more, everything goes on at once.

Only the standard library, for the job's own Python imports it as well.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import sys
import threading
from typing import Any

VARIABLE = "SUBLET_GATE"
AUTOCHECKPOINT_VARIABLE = "SUBLET_GATE_WAL_PAGES"
"""SQLite moves its write-ahead log into the database after so many pages; 1000 by itself."""
LIMIT_S = 120.0
PLUMBING = (
    "sql/store.py",
    "sql/engine.py",
    "unit_of_work/context.py",
    "session/journal.py",
    "session/log_spool.py",
    "session/disk_reserve.py",
)
ENVELOPE = "MessageArrived"
"""The agent's event that says nothing of the message in it: that one is named instead."""
WRITING = ("INSERT", "UPDATE", "DELETE", "CREATE", "ALTER", "DROP")
DEEPEST = 3


def _kind() -> str:
    """Say which process this is, by its command line."""
    words = sys.orig_argv
    if "sublet.cli.main" in words:
        found = [name for name in ("broker", "provide") if name in words]
        return {"broker": "broker", "provide": "agent"}[found[0]] if found else ""
    line = " ".join(words)
    for mark, kind in (
        ("adapters.process.supervisor", "supervisor"),
        ("adapters.ray.host", "ray"),
        ("default_worker", "ray"),
    ):
        if mark in line:
            return kind
    return ""


def _place() -> str:
    """Name the place in our code: the use-case, or the innermost functions that are ours."""
    names: list[str] = []
    about = ""
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        ours = package.startswith("sublet") or file.endswith(
            ("process/supervisor.py", "training_job.py")
        )
        if ours and not file.endswith(PLUMBING):
            room, name = os.path.split(file[:-3])
            place = f"{os.path.basename(room)}/{name}.{frame.f_code.co_name.strip('<>')}"
            names.append(place)
            for local in ("message", "event"):
                told = frame.f_locals.get(local)
                name = type(told).__name__
                if told is not None and type(told).__module__.startswith("sublet_"):
                    about = f"({name})" if about in ("", f"({ENVELOPE})") else about
        frame = frame.f_back
    return " < ".join(names[:DEEPEST]) + about


def _file_class(path: str, kind: str) -> str:
    """Name the sort of file."""
    if path.endswith(".sqlite"):
        return "database"
    if path.endswith(".db"):
        return os.path.basename(path)
    folder = os.path.isdir(path)
    if "/blobs/" in path or path.endswith("/blobs"):
        return "blob folder" if folder else "blob"
    parts = path.split("/")
    if "checkpoint" in parts or any(part.startswith("step-") for part in parts):
        return "checkpoint folder" if folder else "checkpoint"
    return "folder" if folder else "file"


class Gate:
    """The process's side of the talk."""

    def __init__(self, address: str, kind: str) -> None:
        self._address = "\0" + address
        self.kind = kind

    def pass_through(self, path: str, how: str) -> None:
        """Tell about a durable write that is about to be made; return when it may be."""
        said = {
            "pid": os.getpid(),
            "tid": threading.get_native_id(),
            "process": self.kind,
            "file": _file_class(path, self.kind),
            "place": _place(),
            "path": path,
            "how": how,
        }
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
                line.settimeout(LIMIT_S)
                line.connect(self._address)
                line.sendall(json.dumps(said).encode() + b"\n")
                line.recv(1)
        except OSError:
            return  # the run is over, or its harness is gone: this process goes on as it is


def _install(gate: Gate) -> None:
    for name in ("fsync", "fdatasync"):
        _wrap_call(gate, name, getattr(os, name))
    if gate.kind in ("broker", "agent", "ray"):
        _wrap_sqlite(gate)


def _wrap_call(gate: Gate, name: str, real: Any) -> None:
    def gated(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        gate.pass_through(os.readlink(f"/proc/self/fd/{number}"), name)
        real(descriptor)

    setattr(os, name, gated)


def _wrap_sqlite(gate: Gate) -> None:
    real = sqlite3.connect
    pages = os.environ.get(AUTOCHECKPOINT_VARIABLE)

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = real(*arguments, **options)
        name = str(arguments[0] if arguments else options["database"])
        path = name.removeprefix("file:").partition("?")[0]

        changes = 0

        def told(statement: str) -> None:
            nonlocal changes
            words = statement[:12].upper().split()
            first = words[0] if words else ""
            alone = first in WRITING and not connection.in_transaction
            if first == "BEGIN":
                changes = connection.total_changes
            elif alone or (first == "COMMIT" and connection.total_changes != changes):
                gate.pass_through(path, "commit")

        if "mode=ro" not in name and path != ":memory:":
            connection.set_trace_callback(told)
            if pages:
                connection.execute(f"PRAGMA wal_autocheckpoint={int(pages)}")
        return connection

    sqlite3.connect = connect
    sqlite3.dbapi2.connect = connect


if VARIABLE in os.environ and _kind():
    _install(Gate(os.environ[VARIABLE], _kind()))
