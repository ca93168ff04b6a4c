"""Runs jobs as plain processes: for a first look and for tests. IT ISOLATES NOTHING.

A job sees the owner's files, network and processes with the agent's own rights; so an agent
refuses strangers' jobs here. The image is recorded and otherwise ignored. Since nothing can be
mounted, each container path of the spec (a destination, `outputs_path`, /inputs) is replaced by
its host path where an argument of the command or a variable is that path, lies below it, or has
the form `name=path`.

Memory and processes are limited by a supervisor that looks ten times a second, so a job can pass a
limit for that long; RLIMIT_FSIZE bounds each file. Each run has a folder `runs/<run id>` below the
agent's state folder: `spec.json`, `lock` (held while the supervisor lives), `running.json`,
`exit.json`, the output, and `work/`, the job's working folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from sublet_agent.adapters.process import logs as process_logs
from sublet_agent.adapters.process import tree as process_tree
from sublet_agent.adapters.process.supervisor import write_durably
from sublet_agent.adapters.workspace import folders
from sublet_agent.core import runner_port
from sublet_agent.core.runner_port import FoundRun, LogBatch, ResolvedImage, RunSpec, RunStatus

_SUPERVISOR = "sublet_agent.adapters.process.supervisor"
_START_S = 30.0
_END_S = 30.0


class ProcessRunner:
    """The runner without isolation. `owner` is the agent's state id; runs lie below `state_dir`."""

    name = "process"

    def __init__(self, owner: str, state_dir: Path, *, log_bytes: int = 16 * 1024 * 1024) -> None:
        """`log_bytes` bounds each run's output on disk."""
        self._owner = owner
        self._runs = state_dir / "runs"
        self._log_bytes = log_bytes

    def check(self) -> None:
        """Raise RunnerUnavailable anywhere but on a Linux with /proc."""
        if sys.platform != "linux" or not Path("/proc/self/stat").exists():
            raise runner_port.RunnerUnavailable(
                "the process runner reads /proc, which this system has not", "use Linux, or Docker"
            )

    def ensure_image(
        self, image: str, progress: Callable[[str], None], policy: Literal["digest", "any"]
    ) -> ResolvedImage:
        """Record the image; this runner uses none."""
        runner_port.require_pinned(image, policy, None)
        progress(f"the process runner ignores the image {image}")
        return ResolvedImage(image, image)

    def start(self, spec: RunSpec) -> None:
        """Start the supervisor and wait until the job has its process. See `Runner`."""
        runner_port.check_spec(spec)
        if not spec.command:
            raise runner_port.RunRefused(
                "command is empty: the process runner has no image to take it from"
            )
        directory = self._directory(spec.run_id)
        if self.status(spec.run_id).state in ("running", "exited"):
            return
        try:
            (directory / "work").mkdir(parents=True, exist_ok=True)
            for name in ("in", "out", "ack"):
                (spec.checkpoint_dir / name).mkdir(exist_ok=True)
            if not (directory / "spec.json").exists():
                write_durably(directory / "spec.json", self._describe(spec))
            with (directory / "supervisor.log").open("ab") as log:
                started = subprocess.run(
                    [sys.executable, "-m", _SUPERVISOR, str(directory)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    check=False,
                    timeout=_START_S,
                    start_new_session=True,
                )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise runner_port.StartFailed(f"run {spec.run_id}: {error}") from error
        self._await_start(spec.run_id, directory, started.returncode)

    def _await_start(self, run_id: str, directory: Path, code: int) -> None:
        deadline = time.monotonic() + _START_S
        while self.status(run_id).state == "created":
            if code != 0 or time.monotonic() > deadline:
                said = (directory / "supervisor.log").read_text(errors="replace")[-500:].strip()
                raise runner_port.StartFailed(f"run {run_id}: the supervisor did not start: {said}")
            time.sleep(0.005)

    def find(self) -> list[FoundRun]:
        """List the runs below the state folder. See `Runner`."""
        found = []
        for directory in sorted(self._runs.glob("*")):
            spec = _read(directory / "spec.json")
            if spec is not None and spec["owner"] == self._owner:
                found.append(
                    FoundRun(
                        directory.name,
                        spec["job_id"],
                        spec["lease_id"],
                        spec["epoch"],
                        self.status(directory.name),
                    )
                )
        return found

    def status(self, run_id: str) -> RunStatus:
        """Say how the run is, from its folder. See `Runner`."""
        directory = self._directory(run_id)
        if _read(directory / "spec.json") is None:
            return RunStatus("gone")
        # In this order: running.json is there only while or after the lock is held, and exit.json
        # is written before it is let go. Before running.json the lock is the supervisor's to take.
        running = _read(directory / "running.json")
        held = running is not None and _is_held(directory / "lock")
        ended = _read(directory / "exit.json")
        if ended is not None:
            return RunStatus(
                "exited",
                ended["exit_code"],
                returned=ended["returned"],
                signal=ended["signal"],
                oom_killed=ended["oom_killed"],
                started_ms=ended["started_ms"],
                finished_ms=ended["finished_ms"],
                error=ended["error"],
            )
        if running is None:
            return RunStatus("created")
        if held:
            return RunStatus("running", started_ms=running["started_ms"])
        died = "the supervisor was killed, or the machine went down"
        return RunStatus("exited", started_ms=running["started_ms"], error=died)

    def stop(self, run_id: str) -> None:
        """Write STOP and send TERM to the job's own process. See `Runner`."""
        directory = self._directory(run_id)
        spec, running = _read(directory / "spec.json"), _read(directory / "running.json")
        if spec is None:
            return
        folders.ask(Path(spec["checkpoint_dir"]), "STOP")
        if running and process_tree.is_alive(running["job_pid"], running["job_started"]):
            try:
                os.kill(running["job_pid"], signal.SIGTERM)
            except ProcessLookupError:
                return

    def kill(self, run_id: str) -> None:
        """End everything that the job started; its supervisor then writes down the end."""
        spec = _read(self._directory(run_id) / "spec.json")
        if spec is not None:
            self._end(run_id, spec["mark"], with_supervisor=False)

    def remove(self, run_id: str) -> None:
        """End what is left, the supervisor too, and delete the run's folder. See `Runner`."""
        directory = self._directory(run_id)
        spec = _read(directory / "spec.json")
        if spec is not None:
            self._end(run_id, spec["mark"], with_supervisor=True)
        if directory.exists():
            folders.delete(directory)

    def read_logs(self, run_id: str, cursor: str | None, limit_bytes: int) -> LogBatch:
        """Read the run's output files. See `Runner`."""
        directory = self._directory(run_id)
        if not directory.exists():
            return LogBatch((), cursor, False)
        return process_logs.read(directory, cursor, limit_bytes)

    def _end(self, run_id: str, mark: str, *, with_supervisor: bool) -> None:
        directory = self._directory(run_id)
        deadline = time.monotonic() + _END_S
        while True:
            running = _read(directory / "running.json")
            alive = process_tree.marked(mark)
            supervisor = None
            if running and process_tree.is_alive(running["pid"], running["started"]):
                supervisor = running["pid"]
                alive |= process_tree.descendants(supervisor)
            if not alive and with_supervisor and supervisor is not None:
                alive = {supervisor}
            if not alive:
                return
            if time.monotonic() > deadline:
                raise runner_port.RunnerError(
                    f"run {run_id}: {len(alive)} processes do not end, look at {sorted(alive)[:5]}"
                )
            process_tree.end(alive)
            time.sleep(0.01)

    def _describe(self, spec: RunSpec) -> dict[str, Any]:
        paths = {path: str(host) for path, host in spec.destinations.items()}
        paths[runner_port.INPUTS_PATH] = str(spec.inputs_dir)
        if spec.outputs_path is not None:
            paths[spec.outputs_path] = str(spec.outputs_dir)
        outputs = None if spec.outputs_dir is None else str(spec.outputs_dir)
        own = runner_port.job_environment(
            spec,
            checkpoint=str(spec.checkpoint_dir),
            inputs=str(spec.inputs_dir),
            helper=str(spec.helper_dir),
            outputs=outputs,
        )
        env = {k: os.environ[k] for k in ("HOME", "LANG", "TMPDIR") if k in os.environ}
        # There is no image: a job's `python3` is the one that runs this agent, with what is
        # installed beside it, whether its environment was activated or not.
        own_bin = os.path.dirname(sys.executable)
        env["PATH"] = os.pathsep.join([own_bin, os.environ.get("PATH", os.defpath)])
        env.update((k, _on_host(v, paths)) for k, v in own.items())
        gpus = ",".join(runner_port.gpu_ids(spec))
        mark = secrets.token_hex(8)
        env.update({"CUDA_VISIBLE_DEVICES": gpus, process_tree.MARK: mark})
        return {
            "owner": self._owner,
            "job_id": spec.job_id,
            "lease_id": spec.lease_id,
            "epoch": spec.epoch,
            "image": spec.image,
            "mark": mark,
            "command": [_on_host(part, paths) for part in spec.command],
            "env": env,
            "checkpoint_dir": str(spec.checkpoint_dir),
            "memory_bytes": spec.memory_bytes,
            "disk_bytes": spec.disk_bytes,
            "pids": spec.pids,
            "log_bytes": self._log_bytes,
        }

    def _directory(self, run_id: str) -> Path:
        if "/" in run_id or run_id in ("", ".", ".."):
            raise runner_port.RunRefused(f"run_id {run_id!r}: not a name")
        return self._runs / run_id


def _on_host(text: str, paths: dict[str, str]) -> str:
    name, equals, value = text.partition("=")
    if equals and name.replace("-", "").replace("_", "").isalnum():
        return name + equals + _on_host(value, paths) if value.startswith("/") else text
    for path in sorted(paths, key=len, reverse=True):
        if text == path or text.startswith(path.rstrip("/") + "/"):
            return paths[path] + text[len(path.rstrip("/")) :]
    return text


def _is_held(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found
