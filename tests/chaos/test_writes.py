"""A few durable writes meet a fault each; for all of them: `python -m tests.chaos writes`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.strace import Strace
from tests.chaos.writes import Writes
from tests.services import require

FAULTS = 6
SEED = 2

WRITER = """
import os, sys, threading
def write():
    with open(sys.argv[1] + threading.current_thread().name, "wb") as file:
        for line in sys.stdin.buffer:
            file.write(line)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                print(error.errno, flush=True)
            else:
                print(0, flush=True)
write()
"""


@pytest.mark.slow
def test_every_promise_holds_where_writes_fail(tmp_path: Path) -> None:
    require("strace")
    writes = Writes(
        tmp_path, ("broker", "agent"), SEED, print, limit=FAULTS, first_starts=False, still=("EIO",)
    )
    result = writes.play()
    assert writes.gates.met().total() > 0
    assert result.jobs >= result.finished == result.identical
    assert result.jobs > 0


def test_a_fault_meets_one_call_and_no_other(tmp_path: Path) -> None:
    require("strace")
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "written-")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None

    def write() -> int:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(b"line\n")
        writer.stdin.flush()
        return int(writer.stdout.readline())

    with writer:
        assert write() == 0
        strace = Strace(writer.pid, "EIO", tmp_path / "eio")
        assert [os.strerror(write()), os.strerror(write())] == ["Input/output error", "Success"]
        strace.let_go()
        assert [call.name for call in strace.met()] == ["fsync"]
        assert strace.met()[0].path == str(tmp_path / "written-MainThread")
        strace = Strace(writer.pid, "ENOSPC", tmp_path / "full", whole=True, onwards=True)
        assert [write(), write()] == [28, 28]
        strace.let_go()
        assert write() == 0
        strace = Strace(writer.pid, "kill", tmp_path / "kill")
        writer.stdin.write(b"line\n")
        writer.stdin.flush()
        assert writer.wait() == -9
        strace.let_go()
        assert len(strace.met()) == 1
