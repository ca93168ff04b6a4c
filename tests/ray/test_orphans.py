"""A broker that is killed leaves nothing of Ray behind."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from sublet_broker.adapters.data_folder import DataFolder
from sublet_broker.adapters.sql.migrations import migrate
from tests.ray.conftest import LIMIT_S, eventually

BROKER = """
import sys
from pathlib import Path
from sublet_broker.adapters.data_folder import DataFolder
from sublet_broker.adapters.blobs.file_blobs import FileBlobs
from sublet_broker.adapters.sql.migrations import migrate
from sublet_broker.adapters.ray.engine import EngineConfig
from sublet_broker.adapters.ray.ports import RayPorts
from sublet_broker.adapters.sql.store import SqlStore

folder = DataFolder.open(Path(sys.argv[1]))
migrate(folder.database_url)
ports = RayPorts.over(
    EngineConfig(database_url=folder.database_url, blobs_root=folder.blobs_root, cpus=1),
    SqlStore(folder.database_url),
    FileBlobs(folder.blobs_root),
)
ports.start()
print("up" if ports.engine.wait_up(300) else "down", flush=True)
sys.stdin.read()
"""

# Ray is up, and yet the start does not return: so it was where a raylet never answered.
STUCK_HOST = """
import threading
from sublet_broker.adapters.ray import host as ray_host

start = ray_host.Host.start

def stuck(host):
    start(host)
    print("stuck", flush=True)
    threading.Event().wait()

ray_host.Host.start = stuck
ray_host.main()
"""


def those_that_name(text: str) -> list[int]:
    """The processes whose environment or command line holds `text`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            said = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue  # it has just ended, or is another user's
        if text.encode() in said:
            found.append(int(process.name))
    return found


def test_ray_ends_with_a_killed_broker(tmp_path: Path) -> None:
    broker = subprocess.Popen(
        [sys.executable, "-c", BROKER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert broker.stdout is not None
    assert broker.stdin is not None
    assert broker.stdout.readline() == "up\n"
    _host, temp = eventually(lambda: host_of(broker.pid))
    assert len(those_that_name(temp)) > 3
    broker.send_signal(signal.SIGKILL)
    broker.wait()
    broker.stdin.close()
    broker.stdout.close()
    eventually(lambda: None if those_that_name(temp) or Path(temp).exists() else True)


@pytest.mark.slow
def test_a_host_that_never_gets_done_starting_ends_with_its_broker(tmp_path: Path) -> None:
    folder = DataFolder.open(tmp_path / "data")
    migrate(folder.database_url)
    with tempfile.TemporaryDirectory(prefix="orphan-", ignore_cleanup_errors=True) as temp:
        token = Path(temp, "token")
        token.write_text(secrets.token_hex(32))
        ours, theirs = socket.socketpair()
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        host = subprocess.Popen(
            [sys.executable, "-c", STUCK_HOST, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
            env=os.environ | environment,
        )
        theirs.close()
        assert host.stdout is not None
        with host.stdout, Connection(ours.detach()) as broker:
            broker.send(
                {
                    "address": "local",
                    "database_url": folder.database_url,
                    "blobs": str(folder.blobs_root),
                    "shards": 1,
                    "cpus": 1,
                    "temp_dir": f"{temp}/r",
                }
            )
            assert host.stdout.readline() == b"stuck\n"
        try:
            assert host.wait(LIMIT_S) == 1
            eventually(lambda: None if those_that_name(temp) else True)
        finally:
            host.kill()
            host.wait()
            for pid in those_that_name(temp):
                os.kill(pid, signal.SIGKILL)
    folder.close()


def host_of(broker: int) -> tuple[int, str] | None:
    """The broker's child that drives Ray, and the folder that it gave Ray; None: not yet."""
    for pid in those_that_name("RAY_AUTH_TOKEN_PATH="):
        if parent(pid) != broker:
            continue
        for entry in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            if entry.startswith("RAY_AUTH_TOKEN_PATH="):
                return pid, entry.partition("=")[2].removesuffix("/token")
    return None


def parent(pid: int) -> int:
    """The id of the process's parent; -1 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1
