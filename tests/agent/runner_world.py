"""A runner under test, with folders, a spec to vary, and a cleanup that leaves nothing."""

from __future__ import annotations

import dataclasses
import os
import secrets
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from sublet_agent.adapters.docker.images import ImageRules
from sublet_agent.adapters.docker.runner import DockerRunner
from sublet_agent.adapters.process.runner import ProcessRunner
from sublet_agent.core.runner_port import OutputLine, Runner, RunSpec, RunStatus
from sublet_contracts.ckpt_helper_install import write_helper
from sublet_contracts.reasons import Reason
from tests.images import base_image

Kind = Literal["process", "docker"]
LOG_BYTES = 512 * 1024
_PATIENCE_S = 240.0
HAS_WORKER = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("up")
print(worker.pid, flush=True)
ended = worker.wait()
sys.exit({code})
"""
"""A job that tells the pid of its worker, and ends after it with a code."""
PASSED_ON = pytest.mark.parametrize(
    ("code", "reason"),
    [("128 - ended", Reason.KILLED_UNATTRIBUTED), ("3", Reason.JOB_FAILED)],
    ids=["passed on", "a code of its own"],
)
"""That code, and how its end is judged once somebody has killed the worker."""


@dataclass
class World:
    """One agent's state folder and the runner on it."""

    kind: Kind
    root: Path
    owner: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        # pytest's own folders are closed to the job's user; what others may use is left as it is.
        for folder in (self.root, *self.root.parents[:3]):
            mode = folder.stat().st_mode
            if mode & 0o055 != 0o055:
                folder.chmod(stat.S_IMODE(mode) | 0o055)
        write_helper(self.root / "helper")
        self.runner = self.restarted()

    def restarted(self, **options: Any) -> Runner:
        """A runner as a restarted agent makes it: with the same state and nothing in memory."""
        if self.kind == "docker":
            images = ImageRules(allowed=(base_image(),))
            options = {"images": images, "log_bytes": LOG_BYTES, **options}
            return DockerRunner(self.owner, self.root / "state", **options)
        return ProcessRunner(self.owner, self.root / "state", log_bytes=LOG_BYTES)

    def spec(self, code: str, **changes: Any) -> RunSpec:
        """A run of `python3 -c code` with its own folders."""
        run_id = changes.pop("run_id", None) or f"r{secrets.token_hex(4)}-1"
        home = self.root / run_id
        for name in ("checkpoint/in", "checkpoint/out", "checkpoint/ack", "inputs", "outputs"):
            (home / name).mkdir(parents=True, exist_ok=True)
        image = base_image() if self.kind == "docker" else "sha256:" + "0" * 64
        spec = RunSpec(
            run_id=run_id,
            job_id="job-1",
            lease_id="lease-1",
            epoch=7,
            image=image,
            image_id=None,
            command=("python3", "-c", code),
            env={"COLOUR": "green"},
            device_ids=("cpu",),
            cpu_millis=2000,
            memory_bytes=256 * 2**20,
            disk_bytes=64 * 2**20,
            pids=64,
            network="none",
            run_dir=home,
            checkpoint_dir=home / "checkpoint",
            inputs_dir=home / "inputs",
            helper_dir=self.root / "helper",
            stop_grace_ms=5000,
            outputs_dir=home / "outputs",
            outputs_path="/out",
        )
        return dataclasses.replace(spec, **changes)

    def run(self, code: str, **changes: Any) -> tuple[RunSpec, RunStatus]:
        """Start it and wait for its end."""
        spec = self.spec(code, **changes)
        self.runner.start(spec)
        return spec, self.ended(spec.run_id)

    def ended(self, run_id: str) -> RunStatus:
        """Wait until the run has ended."""
        wait_for(lambda: self.runner.status(run_id).state == "exited", f"the end of {run_id}")
        return self.runner.status(run_id)

    def lines(self, run_id: str) -> list[OutputLine]:
        """Read the whole output."""
        found: list[OutputLine] = []
        cursor, more = None, True
        ended = self.runner.status(run_id).state == "exited"
        while more:
            batch = self.runner.read_logs(run_id, cursor, 64 * 1024, ended=ended)
            found += batch.lines
            cursor, more = batch.cursor, batch.more
        return found

    def output(self, run_id: str) -> list[str]:
        """Read the texts of the whole output, both streams by time."""
        return [line.text for line in self.lines(run_id)]

    def shown(self, run_id: str, text: str) -> None:
        """Wait until the job has printed `text`."""
        wait_for(lambda: text in self.output(run_id), f"{text!r} in the output of {run_id}")

    def shown_anything(self, run_id: str) -> None:
        """Wait until the job has printed a line."""
        wait_for(lambda: bool(self.output(run_id)), f"any output of {run_id}")

    def close(self) -> None:
        """Remove every run of this world."""
        for found in self.runner.find():
            self.runner.remove(found.run_id)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until it holds; fails after a minute."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def processes_with(text: str) -> list[int]:
    """Return the pids, zombies too, whose command line or environment holds `text`."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        for file in ("cmdline", "environ"):
            try:
                if text.encode() in Path(f"/proc/{name}/{file}").read_bytes():
                    found.append(int(name))
                    break
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found
