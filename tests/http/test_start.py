"""`sublet broker` as a process: it starts, stops, survives kill -9, and says why it can't start."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

LIMIT_S = 240


class Process:
    """A broker process."""

    def __init__(self, data: Path, *options: str) -> None:
        command = [sys.executable, "-m", "sublet_broker.main", "--data", str(data), *options]
        self.data = data
        self.child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._errors: list[str] = []
        # Its log is read as it comes, else a full pipe would stop the broker.
        self._reader = threading.Thread(target=self._read_errors)
        self._reader.start()

    def _read_errors(self) -> None:
        assert self.child.stderr is not None
        self._errors.extend(self.child.stderr)

    def ready(self) -> dict[str, str]:
        """Wait for its one line; return listen.json."""
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        assert "is ready at" in line, self.end()
        listen: dict[str, str] = json.loads((self.data / "listen.json").read_text())
        assert listen["url"] in line
        assert listen["broker"] in line
        return listen

    def end(self, how: signal.Signals | None = None) -> tuple[int, str]:
        """Send a signal, if any; wait; return status and log."""
        if how is not None:
            self.child.send_signal(how)
        status = self.child.wait(LIMIT_S)
        self._reader.join(LIMIT_S)
        assert self.child.stdout is not None
        self.child.stdout.close()
        return status, "".join(self._errors)

    def kill(self) -> None:
        """End it, however it is."""
        if self.child.poll() is None:
            self.end(signal.SIGKILL)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    """Brokers that are gone after the test."""
    made: list[Process] = []
    yield made
    for process in made:
        process.kill()


def broker_at(url: str) -> str:
    """Return the id of the broker that answers there."""
    with urllib.request.urlopen(url + "/v1/broker", timeout=LIMIT_S) as answer:
        return str(json.load(answer)["broker"])


def test_start_stop_and_kill(tmp_path: Path, processes: list[Process]) -> None:
    data = tmp_path / "data"
    first = Process(data, "--listen", "127.0.0.1:0", "--log-format", "json")
    processes.append(first)
    listen = first.ready()
    assert broker_at(listen["url"]) == listen["broker"]
    assert (data / "broker.key").stat().st_mode & 0o777 == 0o600

    second = Process(data, "--listen", "127.0.0.1:0")
    processes.append(second)
    status, says = second.end()
    assert status == 1
    assert "in use by another broker" in says
    assert broker_at(listen["url"]) == listen["broker"]

    first.end(signal.SIGKILL)
    third = Process(data, "--listen", listen["url"].removeprefix("http://"))
    processes.append(third)
    again = third.ready()
    assert again == listen
    status, log = third.end(signal.SIGTERM)
    assert status == 0, log
    assert not (data / "listen.json").exists()
    with pytest.raises(urllib.error.URLError):
        broker_at(listen["url"])


def test_without_ray(tmp_path: Path, processes: list[Process]) -> None:
    process = Process(tmp_path, "--listen", "127.0.0.1:0", "--ray", "off")
    processes.append(process)
    url = process.ready()["url"]
    with urllib.request.urlopen(url + "/readyz", timeout=LIMIT_S) as answer:
        assert answer.status == 200
    children = Path(f"/proc/{process.child.pid}/task/{process.child.pid}/children").read_text()
    assert children == ""
    status, log = process.end(signal.SIGTERM)
    assert status == 0, log
    assert "ray is off" in log


def test_json_log_lines(tmp_path: Path, processes: list[Process]) -> None:
    process = Process(tmp_path, "--listen", "127.0.0.1:0", "--ray", "off", "--log-format", "json")
    processes.append(process)
    process.ready()
    status, log = process.end(signal.SIGINT)
    assert status == 0, log
    records = [json.loads(line) for line in log.splitlines()]
    assert {"time", "level", "logger", "message"} <= records[0].keys()
    key = (tmp_path / "broker.key").read_text().strip()
    assert key not in log


def test_a_taken_port(tmp_path: Path, processes: list[Process]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        process = Process(tmp_path / "data", "--listen", f"127.0.0.1:{port}")
        processes.append(process)
        status, says = process.end()
    assert status == 1
    assert f"port {port}" in says
    assert "--listen" in says
    assert "ss -ltnp" in says
    # Nothing was begun before the port was known to be free.
    assert not (tmp_path / "data" / "sublet.sqlite").exists()


def test_a_newer_data_folder(tmp_path: Path, processes: list[Process]) -> None:
    process = Process(tmp_path, "--listen", "127.0.0.1:0")
    processes.append(process)
    process.ready()
    process.end(signal.SIGTERM)
    with sqlite3.connect(tmp_path / "sublet.sqlite") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.execute("UPDATE about SET value = '99.0' WHERE id = 'written_by'")
    database.close()
    before = (tmp_path / "sublet.sqlite").read_bytes()
    newer = Process(tmp_path, "--listen", "127.0.0.1:0")
    processes.append(newer)
    status, says = newer.end()
    assert status == 1
    assert "99.0" in says
    assert "Traceback" not in says
    assert (tmp_path / "sublet.sqlite").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--listen", "nonsense"], "HOST:PORT"),
        (["--listen", "192.0.2.1:0"], "not an address of this machine"),
        (["--database", "mysql://u:hunter2@h/db", "--listen", "127.0.0.1:0"], "--database"),
        (["--fee-bps", "20000"], "10000"),
        (["--heartbeat-ms", "3000", "--unknown-after-ms", "3000"], "twice"),
    ],
)
def test_wrong_options(
    tmp_path: Path, processes: list[Process], options: list[str], says: str
) -> None:
    process = Process(tmp_path, *options)
    processes.append(process)
    status, log = process.end()
    assert status in (1, 2)
    assert says in log
    assert "Traceback" not in log
    assert "hunter2" not in log


def test_an_unusable_data_folder(tmp_path: Path, processes: list[Process]) -> None:
    (tmp_path / "file").write_text("")
    process = Process(tmp_path / "file" / "data", "--listen", "127.0.0.1:0")
    processes.append(process)
    status, says = process.end()
    assert status == 1
    assert "--data" in says
    assert "Traceback" not in says


def test_a_key_that_others_can_read(tmp_path: Path, processes: list[Process]) -> None:
    key = tmp_path / "broker.key"
    key.write_text("00" * 32)
    os.chmod(key, 0o644)
    process = Process(tmp_path, "--listen", "127.0.0.1:0")
    processes.append(process)
    status, says = process.end()
    assert status == 1
    assert "chmod 600" in says
