"""A Docker Engine of a test's own, beside the machine's: to be stopped, killed and set up oddly."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import docker
import pytest
import requests
from docker.errors import DockerException

from tests.images import base_image
from tests.services import REQUIRE_VARIABLE, require

_LIMIT_S = 60.0
_MAPPED = "nobody:200000:65536\nnogroup:200000:65536\n"
_WITH_MAPPING = 'mount --bind "$0" /etc/subuid && mount --bind "$0" /etc/subgid && exec "$@"'


def require_own_engine() -> None:
    """Go on only where a test may start an engine."""
    require("docker")
    if os.geteuid() == 0 and shutil.which("dockerd") and shutil.which("unshare"):
        return
    reason = "an engine of one's own needs root and dockerd"
    if os.environ.get(REQUIRE_VARIABLE) == "1":
        pytest.fail(f"{REQUIRE_VARIABLE}=1, and {reason}", pytrace=False)
    pytest.skip(reason)


class OwnEngine:
    """It has its own socket, data and containers, and no network."""

    def __init__(self, *, mapped: bool = False, options: tuple[str, ...] = ()) -> None:
        """`mapped`: users of containers are others outside (--userns-remap)."""
        self.root = Path(tempfile.mkdtemp(prefix="sublet-engine-", dir="/tmp"))
        self.root.chmod(0o711)  # mapped users go through it
        self.url = f"unix://{self.root}/engine.sock"
        self._command = [
            *("dockerd", "-H", self.url, "--pidfile", f"{self.root}/pid"),
            *("--data-root", f"{self.root}/data", "--exec-root", f"{self.root}/exec"),
            *("--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false"),
            *options,
        ]
        # An engine without a bridge deletes docker0, whose ever it is: it must not see it.
        if mapped:
            ids = self.root / "ids"
            ids.write_text(_MAPPED)
            shell = ["unshare", "-m", "-n", "sh", "-c", _WITH_MAPPING, str(ids)]
            self._command = [*shell, *self._command, "--userns-remap=nobody:nogroup"]
        else:
            self._command = ["unshare", "-n", *self._command]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        # Of an engine that was killed: a number that somebody else may have by now.
        for left in ("pid", "exec/containerd/containerd.pid"):
            (self.root / left).unlink(missing_ok=True)
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + _LIMIT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = (self.root / "log").read_text(errors="replace")[-500:]
                pytest.fail(f"the engine does not start: {tail}")
            time.sleep(0.1)

    def load_base_image(self) -> str:
        """Give it the tests' image; return its id."""
        image = docker.from_env().api.get_image(base_image())
        self.client().images.load(b"".join(image))
        return base_image()

    def client(self) -> docker.DockerClient:
        """Return a new client."""
        return docker.DockerClient(self.url, timeout=60)

    def end(self, number: signal.Signals) -> None:
        """End the engine by a signal, and wait for its end."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(_LIMIT_S)

    def close(self) -> None:
        """End it and all that it runs, and delete everything."""
        if self._process is not None:
            if self._process.poll() is not None:
                self.start()  # what a killed engine left is its own to clear away
            for container in self.client().containers.list(all=True):
                container.remove(force=True)
            self.end(signal.SIGTERM)
        with (Path("/proc/self/mountinfo")).open() as mounts:
            below = [line.split()[4] for line in mounts if f" {self.root}/" in line]
        for path in reversed(below):
            subprocess.run(["umount", "-l", path], check=False)
        shutil.rmtree(self.root, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            return bool(self.client().ping())
        except (DockerException, requests.RequestException, OSError):
            return False
