"""The undisturbed run that the demo compares with: same command and image, no fault."""

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sublet_contracts.ckpt_helper_install import write_helper

OUTPUTS = "/out"


class ReferenceFailed(RuntimeError):
    """The undisturbed run failed; the message ends with what it printed."""


@dataclass
class Reference:
    """One undisturbed run below `root`: as a container where the job's run is one."""

    root: Path
    command: Sequence[str]
    inputs: Mapping[str, str]
    """Local file -> path in the container."""
    image: str | None
    """The image to run; None: a child process."""
    _process: subprocess.Popen[bytes] | None = None
    _container: Any = None

    @property
    def outputs(self) -> Path:
        """Where its results lie."""
        return self.root / "out"

    def start(self) -> None:
        """Start it."""
        for name in ("out", "helper", "checkpoint"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        write_helper(self.root / "helper")
        if self.image is None:
            self._start_process()
        else:
            self._start_container()

    def _start_process(self) -> None:
        hosts = {destination: source for source, destination in self.inputs.items()}
        hosts[OUTPUTS] = str(self.outputs)
        command = [_on_host(part, hosts) for part in self.command]
        if command[0] in ("python", "python3"):
            command[0] = sys.executable
        # The checkpoint protocol runs here as in a job, but nobody asks anything of it.
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.root / "helper"),
            "SUBLET_CHECKPOINT_DIR": str(self.root / "checkpoint"),
            "OMP_NUM_THREADS": "1",
        }
        with (self.root / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.root,
                start_new_session=True,
            )

    def _start_container(self) -> None:
        docker = importlib.import_module("docker")
        for name in ("out", "checkpoint"):
            (self.root / name).chmod(0o777)
        mounts = {
            str(Path(source).resolve()): {"bind": destination, "mode": "ro"}
            for source, destination in self.inputs.items()
        }
        mounts[str(self.outputs.resolve())] = {"bind": OUTPUTS, "mode": "rw"}
        mounts[str((self.root / "helper").resolve())] = {"bind": "/sublet-helper", "mode": "ro"}
        mounts[str((self.root / "checkpoint").resolve())] = {"bind": "/checkpoint", "mode": "rw"}
        self._container = docker.from_env().containers.run(
            self.image,
            list(self.command),
            volumes=mounts,
            detach=True,
            init=True,
            network_mode="none",
            nano_cpus=10**9,
            labels={"sublet.demo": "reference"},
            environment={
                "PYTHONPATH": "/sublet-helper",
                "SUBLET_CHECKPOINT_DIR": "/checkpoint",
                "OMP_NUM_THREADS": "1",
            },
        )

    def wait(self) -> None:
        """Wait for its end. Raises ReferenceFailed."""
        if self._container is not None:
            code = self._container.wait()["StatusCode"]
            said = self._container.logs(tail=30).decode(errors="replace")
        elif self._process is not None:
            code = self._process.wait()
            said = (self.root / "log").read_text(errors="replace")[-3000:]
        else:
            raise ReferenceFailed("the undisturbed run was never started")
        if code != 0:
            raise ReferenceFailed(f"the undisturbed run exited with {code}:\n{said}")

    def stop(self) -> None:
        """End it, if it still runs, and remove its container."""
        if self._container is not None:
            self._container.remove(force=True)
            self._container = None
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _on_host(part: str, hosts: Mapping[str, str]) -> str:
    for destination, source in hosts.items():
        if part == destination or part.startswith(destination + "/"):
            return source + part.removeprefix(destination)
    return part


def same_content(ours: Path, theirs: Path, names: Sequence[str]) -> dict[str, bool]:
    """Say for each of the files `names` whether it's byte for byte the same in both folders."""
    return {
        name: (ours / PurePosixPath(name)).read_bytes()
        == (theirs / PurePosixPath(name)).read_bytes()
        for name in names
    }
