"""A broker that is killed leaves nothing of Ray behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.ray.conftest import eventually

BROKER = """
import sys
from pathlib import Path
from sublet_broker.adapters.files import DataFolder, FileBlobs
from sublet_broker.adapters.migrations import migrate
from sublet_broker.adapters.ray_engine import EngineConfig
from sublet_broker.adapters.ray_ports import RayPorts
from sublet_broker.adapters.sql_store import SqlStore

folder = DataFolder.open(Path(sys.argv[1]))
migrate(folder.database_url)
ports = RayPorts.over(
    EngineConfig(database_url=folder.database_url, blobs_root=folder.blobs_root, cpus=1),
    SqlStore(folder.database_url),
    FileBlobs(folder.blobs_root),
)
ports.start()
print("up" if ports.engine.wait_up(120) else "down", flush=True)
sys.stdin.read()
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


def test_ray_that_only_starts_ends_with_a_killed_broker(tmp_path: Path) -> None:
    broker = subprocess.Popen(
        [sys.executable, "-c", BROKER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert broker.stdin is not None
    host, temp = eventually(lambda: host_of(broker.pid))

    def raylets() -> list[int] | None:
        return those_that_name(f"--raylet_socket_name={temp}/") or None

    # The host waits for its raylet's answer, which does not come.
    for pid in eventually(raylets):
        os.kill(pid, signal.SIGSTOP)
    assert parent(host) == broker.pid
    broker.send_signal(signal.SIGKILL)
    broker.wait()
    broker.stdin.close()
    try:
        eventually(lambda: None if those_that_name(temp) else True)
    finally:
        for pid in those_that_name(temp):
            os.kill(pid, signal.SIGKILL)


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
