"""Runs jobs as plain processes: for a first look and for tests. IT ISOLATES NOTHING.

A job sees the owner's files, network and processes with the agent's own rights; so an agent
refuses strangers' jobs here. The image is recorded and otherwise ignored. Since nothing can be
mounted, each container path of the spec (a destination, `outputs_path`, /inputs, the working
folder, HOME) is replaced by its host path where an argument of the command or a variable is that
path, lies below it, or has the form `name=path`.

Memory and processes are limited by a supervisor that looks ten times a second, so a job can pass a
limit for that long; RLIMIT_FSIZE bounds each file. Each run has a folder `runs/<run id>` below the
agent's state folder: `spec.json`, `lock` (held while the supervisor lives), `running.json`,
`stop.json` (the agent asks the job to stop), `now.json` (what it uses and is writing),
`exit.json`, and the output. A job can reach all of them, so what is read there is believed only as
far as it makes sense; and what is killed is told by the kernel,
never by a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from sublet_agent.adapters.process import exit_events, records, short_names
from sublet_agent.adapters.process import logs as process_logs
from sublet_agent.adapters.process import tree as process_tree
from sublet_agent.adapters.process.files import open_plain, write_durably
from sublet_agent.adapters.process.supervisor import NOW, STARTING, STOP_ASKED
from sublet_agent.adapters.workspace import folders, seeding
from sublet_agent.adapters.workspace.start_test import start_and_end
from sublet_agent.core import layout, runner_port
from sublet_agent.core.layout import ImageFolders, Layout, RunFolders
from sublet_agent.core.runner_port import (
    Cancel,
    FoundRun,
    ImageNeeds,
    LogBatch,
    Measure,
    OutputLine,
    ResolvedImage,
    RunSpec,
    RunStatus,
)

WITNESS = "SUBLET_WITNESS"
"""The variable that, as `off`, does without the witness: see witness.py."""
_SUPERVISOR = "sublet_agent.adapters.process.supervisor"
_START_S = 30.0
_END_S = 30.0
_LEFTOVERS_S = 2.0
_SAID_BYTES = 500
_ODD = "a file of this run was changed or damaged, so nobody knows how it ended"
_DIED = "its supervisor was killed, so nobody saw how it ended"
_REBOOTED = "the machine was started anew while it ran"


class ProcessRunner:
    """The runner without isolation. `owner` is the agent's state id; runs lie below `state_dir`."""

    name = "process"

    def __init__(self, owner: str, state_dir: Path, *, log_bytes: int = 16 * 1024 * 1024) -> None:
        """`log_bytes` bounds each run's output on disk."""
        self._owner = owner
        self._runs = state_dir / "runs"
        self._log_bytes = log_bytes
        self._blind: str | None = None

    def check(self) -> None:
        """Raise RunnerUnavailable anywhere but on a Linux with /proc."""
        if sys.platform != "linux" or not Path("/proc/self/stat").exists():
            raise runner_port.RunnerUnavailable(
                "the process runner reads /proc, which this system has not", "use Linux, or Docker"
            )

    def why_no_witness(self) -> str:
        """Say in a few words why the kernel doesn't tell how a job's workers end; empty: it does.

        Asked once: where it keeps silent that takes two seconds.
        """
        if self._blind is None:
            self._blind = exit_events.why_not()
        return self._blind

    def look_up_image(self, image: str) -> str:
        """Return '': this runner uses none."""
        return ""

    def ensure_image(
        self,
        image: str,
        progress: Callable[[str], None],
        policy: Literal["digest", "any"],
        cancel: Cancel | None = None,
    ) -> ResolvedImage:
        """Record the image; this runner uses none."""
        runner_port.require_pinned(image, policy, None)
        return ResolvedImage(image, image)

    def tidy_images(self, needs: ImageNeeds) -> list[str]:
        """Nothing to do: this runner keeps none."""
        return []

    def images_hold_bytes(self, folder: Path) -> int:
        """Nothing."""
        return 0

    def furnish(self, spec: RunSpec, cancel: Cancel | None = None) -> Layout:
        """Make the folders; an input that is the working folder is copied there. See `Runner`."""
        runner_port.check_spec(spec)
        if spec.user:
            raise runner_port.RunRefused(
                f"user {spec.user!a}: the process runner has its owner's user only: no --user"
            )
        found = layout.planned(
            ImageFolders(layout.WORK_PATH, layout.HOME_PATH),
            asked_work=spec.workdir,
            asked_home=spec.env.get("HOME", ""),
        )
        own = RunFolders(
            spec.run_dir, found, spec.outputs_path, spec.destinations, spec.checkpoint_paths
        )
        try:
            _make_own(spec.run_dir)
            for path in layout.seeded_folders(found, spec.outputs_path):
                source = own.input_at(path)
                if source is not None:
                    seeding.seed(
                        seeding.packed_folder(source),
                        own.mounts()[path],
                        user=(os.geteuid(), os.getegid()),
                        max_bytes=min(layout.SEED_BYTES, spec.disk_bytes),
                        max_entries=layout.SEED_ENTRIES,
                        cancel=cancel,
                    )
        except seeding.SeedCancelled as error:
            raise runner_port.PullCancelled("nobody waits for the run any more") from error
        except (seeding.SeedTooLarge, seeding.SeedBroken) as error:
            raise runner_port.RunRefused(
                f"the input at {found.work_path} is the working folder, and too large to be copied"
            ) from error
        except OSError as error:
            raise runner_port.StartFailed(f"run {spec.run_id}: its folders: {error}") from error
        return found

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
            directory.mkdir(parents=True, exist_ok=True)
            _make_own(spec.run_dir)
            for name in ("in", "out", "ack"):
                (spec.checkpoint_dir / name).mkdir(exist_ok=True)
            if not (directory / "spec.json").exists():
                write_durably(directory / "spec.json", self._describe(spec))
            with (directory / "supervisor.log").open("ab") as log:
                started = subprocess.run(
                    [sys.executable, "-m", _SUPERVISOR, str(directory.absolute())],
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
                said = _last_words(directory / "supervisor.log")
                raise runner_port.StartFailed(f"run {run_id}: the supervisor did not start: {said}")
            time.sleep(0.005)

    def start_test(self, folder: Path, device_ids: tuple[str, ...]) -> None:
        """Start `true`. See `Runner`."""
        start_and_end(self, folder, device_ids, image="none", image_id=None, command=("true",))

    def find(self) -> list[FoundRun]:
        """List the runs below the state folder. See `Runner`.

        One whose own record is damaged is listed while anything of it goes on, so that it is ended.
        """
        found = []
        for directory in sorted(self._runs.glob("*")):
            run_id = directory.name
            if not runner_port.is_run_id(run_id):
                continue
            status = self.status(run_id)
            try:
                spec = records.read(directory / "spec.json", records.SpecRecord)
            except records.Damaged:
                spec = None
            if spec is None and status.state in ("running", "exited"):
                found.append(FoundRun(run_id, "", "", 0, status))
            elif spec is not None and spec.owner == self._owner:
                found.append(FoundRun(run_id, spec.job_id, spec.lease_id, spec.epoch, status))
        return found

    def status(self, run_id: str) -> RunStatus:
        """Say how the run is, from its folder. See `Runner`.

        One that is over has nobody left to hold it: what it has left behind all the same (its
        supervisor was killed, or its end was forged) is ended here.
        """
        directory = self._directory(run_id)
        # In this order: running.json is there only while or after the lock is held, and exit.json
        # is written before it is let go. Before STARTING the lock is the supervisor's to take.
        began = os.path.lexists(directory / "running.json") or (
            # The job may be quicker than its supervisor, and kill it before that has noted it.
            os.path.lexists(directory / STARTING) and not _is_held(directory / "lock")
        )
        running = records.read_sound(directory / "running.json", records.RunningRecord)
        since = None if running is None else running.started_ms
        if began and _is_held(directory / "lock"):
            return RunStatus("running", started_ms=since)
        if began:
            # What can't be ended now is up to `kill`, which is asked next, and says so.
            with contextlib.suppress(runner_port.RunnerError):
                self._end(run_id, with_supervisor=True, within_s=_LEFTOVERS_S)
        try:
            ended = records.read(directory / "exit.json", records.ExitRecord)
        except records.Damaged:
            return RunStatus("exited", started_ms=since, error=_ODD)
        if ended is not None:
            return RunStatus(
                "exited",
                ended.exit_code,
                returned=ended.returned,
                signal=ended.signal,
                worker_signal=ended.worker_signal,
                oom_killed=ended.oom_killed,
                limit_exceeded=ended.limit_exceeded,
                outside_signal=ended.outside_signal,
                unknown_signal=ended.unknown_signal,
                started_ms=ended.started_ms,
                finished_ms=ended.finished_ms,
                error=ended.error,
            )
        if began:
            if running is not None and running.boot != process_tree.boot_id():
                return RunStatus("exited", started_ms=since, engine_stopped=_REBOOTED)
            odd = running is None and os.path.lexists(directory / "running.json")
            return RunStatus("exited", started_ms=since, error=_ODD if odd else _DIED)
        try:
            spec = records.read(directory / "spec.json", records.SpecRecord)
        except records.Damaged:
            return RunStatus("exited", error=_ODD)
        return RunStatus("gone" if spec is None else "created")

    def stop(self, run_id: str) -> None:
        """Write STOP and send TERM to the job's own process. See `Runner`."""
        directory = self._directory(run_id)
        spec = records.read_sound(directory / "spec.json", records.SpecRecord)
        running = records.read_sound(directory / "running.json", records.RunningRecord)
        if spec is not None:
            # Where the job has broken its folder, the signal has to do.
            with contextlib.suppress(OSError):
                folders.ask(Path(spec.checkpoint_dir), "STOP")
        if running is None or not process_tree.is_alive(running.job_pid, running.job_started):
            return
        if not process_tree.is_marked(running.job_pid, self._mark(run_id)):
            return  # whatever that is, it is not this run's
        # First, so that whoever looks at the signal knows it for ours. Asked it is in any case.
        with contextlib.suppress(OSError):
            write_durably(directory / STOP_ASKED, {"pid": os.getpid()})
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.job_pid, signal.SIGTERM)

    def kill(self, run_id: str) -> None:
        """End everything that the job started; its supervisor then writes down the end.

        Needs neither the agent nor a supervisor, nor any file of the run's.
        """
        self._end(run_id, with_supervisor=False)

    def remove(self, run_id: str) -> None:
        """End what is left, the supervisor too, and delete the run's folder. See `Runner`."""
        self._end(run_id, with_supervisor=True)
        short_names.forget(self._owner, run_id)
        directory = self._directory(run_id)
        if directory.exists():
            folders.delete(directory)

    def unfinished_lines(self, run_id: str) -> tuple[OutputLine, ...]:
        """Return what the supervisor wrote down last. See `Runner`."""
        now = records.read_sound(self._directory(run_id) / NOW, records.NowRecord)
        if now is None:
            return ()
        return tuple(OutputLine(s, now.at_ms, t) for s, t in sorted(now.states.items()))

    def measure(self, run_id: str) -> Measure | None:
        """Return what the supervisor wrote down last. See `Runner`."""
        now = records.read_sound(self._directory(run_id) / NOW, records.NowRecord)
        if now is None:
            return None
        return Measure(now.at_ms, now.cpu_ns, now.memory_bytes, now.peak_memory_bytes)

    def read_logs(
        self, run_id: str, cursor: str | None, limit_bytes: int, *, ended: bool = False
    ) -> LogBatch:
        """Read the run's output files; its supervisor has ended the last line. See `Runner`."""
        directory = self._directory(run_id)
        if not directory.exists():
            return LogBatch((), cursor, False)
        return process_logs.read(directory, cursor, limit_bytes)

    def _end(self, run_id: str, *, with_supervisor: bool, within_s: float = _END_S) -> None:
        directory = self._directory(run_id).absolute()
        mark = self._mark(run_id)
        deadline = time.monotonic() + within_s
        while True:
            supervisors = process_tree.started_as(_SUPERVISOR, str(directory))
            alive = process_tree.marked(mark)
            for supervisor in supervisors:
                alive |= process_tree.descendants(supervisor)
                process_tree.wake(supervisor)
            if not alive and with_supervisor:
                alive = supervisors
            if not alive:
                return
            if time.monotonic() > deadline:
                raise runner_port.RunnerError(
                    f"run {run_id}: {len(alive)} processes do not end, look at {sorted(alive)[:5]}"
                )
            process_tree.end(alive)
            time.sleep(0.01)

    def _mark(self, run_id: str) -> process_tree.Mark:
        return process_tree.mark_of(self._owner, run_id)

    def _describe(self, spec: RunSpec) -> dict[str, Any]:
        paths = {path: str(host) for path, host in spec.destinations.items()}
        paths[runner_port.INPUTS_PATH] = str(spec.inputs_dir)
        own_folders = RunFolders(
            spec.run_dir, spec.layout, spec.outputs_path, spec.destinations, spec.checkpoint_paths
        )
        paths |= {
            path: str(host)
            for path, host in own_folders.mounts().items()
            # What is at hand on this machine under that name is meant, unless the job has named it.
            if path in (spec.workdir, spec.env.get("HOME"), *spec.checkpoint_paths)
            or not os.path.lexists(path)
        }
        if spec.outputs_path is not None:
            paths[spec.outputs_path] = str(spec.outputs_dir)
        home, work = own_folders.place_of(spec.layout.home_path), own_folders.work
        outputs = None if spec.outputs_dir is None else str(spec.outputs_dir)
        own = runner_port.job_environment(
            spec,
            checkpoint=str(spec.checkpoint_dir),
            inputs=str(spec.inputs_dir),
            helper=str(spec.helper_dir),
            outputs=outputs,
        )
        env = {"USER": _user_name(), "LOGNAME": _user_name()}
        env |= {k: os.environ[k] for k in ("LANG", "USER", "LOGNAME") if k in os.environ}
        temporary = short_names.short_name(self._owner, spec.run_id, spec.run_dir / layout.TMP)
        env["TMPDIR"] = str(temporary)
        if home is not None:
            env["HOME"] = str(home.root / home.inside)
        # There is no image: a job's `python3` is the one that runs this agent, with what is
        # installed beside it, whether its environment was activated or not.
        own_bin = os.path.dirname(sys.executable)
        env["PATH"] = os.pathsep.join([own_bin, os.environ.get("PATH", os.defpath)])
        if spec.cache_dir is not None:
            env |= runner_port.cache_variables(str(spec.cache_dir), has_caches=False)
        env.update((k, _on_host(v, paths)) for k, v in own.items())
        gpus = ",".join(runner_port.gpu_ids(spec))
        mark = self._mark(spec.run_id)
        env.update({"CUDA_VISIBLE_DEVICES": gpus, process_tree.MARK: mark.text})
        return {
            "owner": self._owner,
            "job_id": spec.job_id,
            "lease_id": spec.lease_id,
            "epoch": spec.epoch,
            "image": spec.image,
            "brand": mark.brand,
            "witness": os.environ.get(WITNESS) != "off",
            "witness_exits": not self.why_no_witness(),
            "command": [_on_host(part, paths) for part in spec.command],
            "env": env,
            "work_dir": str(work.root / work.inside),
            "checkpoint_dir": str(spec.checkpoint_dir),
            "memory_bytes": spec.memory_bytes,
            "disk_bytes": spec.disk_bytes,
            "pids": spec.pids,
            "stop_grace_ms": spec.stop_grace_ms,
            "log_bytes": self._log_bytes,
        }

    def _directory(self, run_id: str) -> Path:
        if "/" in run_id or run_id in ("", ".", ".."):
            raise runner_port.RunRefused(f"run_id {run_id!r}: not a name")
        return self._runs / run_id


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return "job"  # an agent in a container, say


def _make_own(run_dir: Path) -> None:
    for name in (layout.WORK, layout.HOME, layout.TMP):
        (run_dir / name).mkdir(parents=True, exist_ok=True)


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
        with open_plain(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _last_words(path: Path) -> str:
    try:
        with open_plain(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _SAID_BYTES))
            return file.read(_SAID_BYTES).decode("utf-8", "replace").strip()
    except OSError as error:
        return str(error)
