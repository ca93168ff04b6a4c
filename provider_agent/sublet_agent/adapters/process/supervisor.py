"""The parent of one job of the process runner: outlives the agent, writes down the job's end.

    python -m sublet_agent.adapters.process.supervisor RUN_DIRECTORY

It holds a lock on `RUN_DIRECTORY/lock` as long as it lives. It is the subreaper of all that the
job starts, so nothing escapes by being orphaned; keeps the memory and the number of processes
within the run's limits; takes the output into bounded files; sees who sends the job a signal
(witness.py), and which signals end its workers (exit_events.py, where the kernel tells us); and
when the job's own process ends it ends the rest, as a container would, and then writes
`exit.json`, durably.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Literal

from sublet_agent.adapters.process import tree as process_tree
from sublet_agent.adapters.process.exit_events import ExitEvents
from sublet_agent.adapters.process.files import read_bounded, replace, write_durably
from sublet_agent.adapters.process.logs import LogWriter
from sublet_agent.adapters.process.witness import Statement, Witness, statement
from sublet_agent.core.engine_evidence import EngineEnd, EngineFact, own_end
from sublet_agent.core.log_lines import Begun, LineBuffer, shown
from sublet_contracts.run_conventions import MAX_LOG_STATE_CHARACTERS

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_WATCH_S = 0.1
_READ_BYTES = 64 * 1024
_STOP_ASKED_BYTES = 1024
_ERROR_LETTERS = 1000
_DRAIN_S = 5.0
_TELL_STATE_S = 0.4
_TELL_S = 1.0
_LIBC = ctypes.CDLL(None, use_errno=True)
_JOB = "job"
STOP_ASKED = "stop.json"
"""Written before the agent asks the job to stop: by which process, so that it's known as ours."""
STARTING = "starting"
"""There before the job is, which may kill its supervisor before that has noted anything of it."""
NOW = "now.json"
"""How the job stands: its unfinished lines, and what it uses. Not durable, and of no weight."""


class Supervisor:
    """One job, from its start to `exit.json`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._spec: dict[str, Any] = json.loads((directory / "spec.json").read_text())
        self._log = LogWriter(directory, self._spec["log_bytes"])
        self._lines: dict[str, LineBuffer] = {}
        self._begun: dict[str, Begun] = {}
        self._told: object = None
        self._told_s = 0.0
        self._memory_bytes = self._peak_memory_bytes = 0
        self._wait_status: int | None = None
        self._ended_s = 0.0
        self._ended_ms = 0
        self._serving = self._serve_again = False
        self._witness: Witness | None = None
        self._exits = ExitEvents(self._saw)
        self._seen: list[EngineFact] = []
        self._out_of_memory = False
        self._limit_exceeded = ""
        self._error: str | None = None
        self._started_ms = 0
        self._pid = 0

    def run(self) -> None:
        """Start the job and stay with it until its end is on the disk."""
        self._started_ms = _now_ms()
        mine = process_tree.read_process(os.getpid())
        about: dict[str, Any] = {"pid": os.getpid(), "started": mine.started if mine else 0}
        before = process_tree.survey(os.getpid())
        if self._spec["witness_exits"]:
            # Before the job is there: so nothing of it is missed.
            with contextlib.suppress(OSError):
                self._exits.listen()
                self._exits.watch(_JOB, os.getpid())
        (self._directory / STARTING).touch()
        try:
            job = self._start_job()
        except OSError as error:
            code = 127 if isinstance(error, FileNotFoundError) else 126
            self._error = f"the command can't be started: {error}"
            self._finish(code, None, about)
            return
        self._pid = job.pid
        child = process_tree.read_process(job.pid)
        about |= {"job_pid": job.pid, "job_started": child.started if child else 0}
        about |= {"started_ms": self._started_ms, "boot": process_tree.boot_id()}
        # At once, whatever else is being done: each stop of the job waits for this.
        signal.signal(signal.SIGCHLD, lambda *_: self._serve())
        if self._spec["witness"]:
            self._witness = Witness(job.pid, self._is_ours)
            self._witness.remember(before)
            self._witness.attend()
        write_durably(self._directory / "running.json", about)
        self._watch(job)
        status = self._wait_status
        if status is None:
            self._finish(None, None, about)
        elif os.WIFSIGNALED(status):
            self._finish(128 + os.WTERMSIG(status), os.WTERMSIG(status), about)
        else:
            self._finish(os.WEXITSTATUS(status), None, about)

    def _start_job(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._spec["command"],
            cwd=self._spec["work_dir"],
            env=self._spec["env"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=self._limit,
        )

    def _limit(self) -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        brand = self._spec["brand"]
        # Refused where the limit is lower already, in a job of a job's: the mark is there as well.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(process_tree.RLIMIT_LOCKS, (brand, brand))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        size = self._spec["disk_bytes"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        # What the supervisor ignores, the job would inherit through exec, and never hear TERM.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Ignored, so that a file grown too large fails a write instead of killing the job.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def _watch(self, job: subprocess.Popen[bytes]) -> None:
        selector = selectors.DefaultSelector()
        for name, pipe in (("stdout", job.stdout), ("stderr", job.stderr)):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, name)
        next_watch = 0.0
        drained_by: float | None = None
        while True:
            for key, _ in selector.select(_WATCH_S):
                if not self._take(key.data, key.fileobj):
                    selector.unregister(key.fileobj)
            now = time.monotonic()
            if now >= next_watch:
                self._log.flush()
                self._reap()
                self._exits.take_in()
                survey = process_tree.survey(os.getpid())
                alive = set(survey.alive)
                if self._wait_status is None:
                    if self._witness is not None:
                        self._witness.remember(survey)
                        self._witness.attend()
                    self._hold_limits(alive)
                    self._tell_now(alive)
                elif alive:
                    process_tree.end(alive)
                else:
                    drained_by = drained_by or now + _DRAIN_S
                    if not selector.get_map() or now > drained_by:
                        return
                next_watch = time.monotonic() + (_WATCH_S if self._wait_status is None else 0.01)
            if not selector.get_map():
                time.sleep(0.01)  # select() with nothing to select would spin

    def _hold_limits(self, alive: set[int]) -> None:
        if len(alive) > self._spec["pids"]:
            self._limit_exceeded = f"more than {self._spec['pids']} processes"
            self._error = self._limit_exceeded
        elif self._memory_of(alive) > self._spec["memory_bytes"]:
            self._out_of_memory = True
            self._error = f"more than {self._spec['memory_bytes']} bytes of memory"
        else:
            return
        while alive:
            process_tree.end(alive)
            self._reap()
            alive = process_tree.descendants(os.getpid())

    def _memory_of(self, alive: set[int]) -> int:
        self._memory_bytes = sum(map(process_tree.private_bytes, alive))
        self._peak_memory_bytes = max(self._peak_memory_bytes, self._memory_bytes)
        return self._memory_bytes

    def _tell_now(self, alive: set[int]) -> None:
        """Write down how the job stands; more often where its unfinished lines change."""
        states = {
            stream: shown(state)[:MAX_LOG_STATE_CHARACTERS]
            for stream, lines in self._lines.items()
            if (state := lines.state) and self._begun[stream].stands(_steady_ms())
        }
        since_s = time.monotonic() - self._told_s
        if since_s < (_TELL_STATE_S if states != self._told else _TELL_S):
            return
        self._told, self._told_s = states, time.monotonic()
        reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = reaped.ru_utime + reaped.ru_stime + sum(map(process_tree.cpu_s, alive))
        now = {
            "at_ms": _now_ms(),
            "cpu_ns": int(cpu_s * 1e9),
            "memory_bytes": self._memory_bytes,
            "peak_memory_bytes": self._peak_memory_bytes,
            "states": states,
        }
        # A full disk, or a job that made a folder of it: the next look tries again.
        with contextlib.suppress(OSError):
            replace(self._directory / NOW, now)

    def _take(self, stream: Literal["stdout", "stderr"], pipe: Any) -> bool:
        try:
            chunk = os.read(pipe.fileno(), _READ_BYTES)
        except BlockingIOError:
            return True
        lines = self._lines.setdefault(stream, LineBuffer())
        now_ms = _now_ms()
        found = lines.feed(chunk) if chunk else lines.end()
        for line in found:
            self._log.write(stream, now_ms, line)
        begun = self._begun.setdefault(stream, Begun())
        begun.wrote(lines.held, _steady_ms(), ended_one=bool(found))
        return bool(chunk)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                self._took(status)

    def _serve(self) -> None:
        """Take what the job's own process has come to, as often as there is something.

        Runs as the handler of SIGCHLD, so it may begin within itself: then it leaves the work to
        the one that is at it.
        """
        self._serve_again = True
        while self._serve_again and not self._serving:
            self._serving = True
            self._serve_again = False
            while self._wait_status is None:
                try:
                    pid, status = os.waitpid(self._pid, os.WNOHANG)
                except ChildProcessError:
                    break
                if pid == 0:
                    break
                self._took(status)
            self._serving = False

    def _took(self, status: int) -> None:
        if not os.WIFSTOPPED(status):
            self._ended_s = time.monotonic()
            self._ended_ms = _now_ms()
            self._wait_status = status
        elif self._witness is not None:
            self._witness.pass_on(status)

    def _is_ours(self, pid: int) -> bool:
        """Whether the agent's process with this pid has asked the job to stop."""
        try:
            asked = json.loads(read_bounded(self._directory / STOP_ASKED, _STOP_ASKED_BYTES))
        except (OSError, ValueError):
            return False
        return isinstance(asked, dict) and asked.get("pid") == pid

    def _statement(self, killed_by: int | None) -> Statement:
        if self._witness is None:
            return Statement()
        grace_s = self._spec["stop_grace_ms"] / 1000
        return statement(self._witness.sightings, killed_by, self._ended_s, grace_s)

    def _saw(self, _run: str, fact: EngineFact) -> None:
        if fact.kind == "blind":  # the last one counts, and there may be many
            self._seen = [other for other in self._seen if other.kind != "blind"]
        self._seen.append(fact)

    def _own_end(self, code: int | None, killed_by: int | None) -> EngineEnd:
        """Say whether the job returned the code by itself, or may pass on its worker's end.

        A number that can't stand for a signal is its own by the wait status alone.
        """
        if code is None or killed_by is not None:
            return EngineEnd()
        if code <= 128:
            return EngineEnd(returned=True)
        self._exits.take_in()
        return own_end(self._seen, code, self._ended_ms)

    def _finish(self, code: int | None, killed_by: int | None, about: dict[str, Any]) -> None:
        for stream, lines in self._lines.items():
            for line in lines.end():
                self._log.write("stdout" if stream == "stdout" else "stderr", _now_ms(), line)
        self._log.flush(durable=True)
        self._told_s = 0.0
        self._tell_now(set())
        seen, own = self._statement(killed_by), self._own_end(code, killed_by)
        ended = {
            "exit_code": code,
            "signal": killed_by,
            "returned": own.returned,
            "worker_signal": own.worker_signal,
            "oom_killed": self._out_of_memory,
            "limit_exceeded": self._limit_exceeded,
            "outside_signal": seen.outside_signal,
            "unknown_signal": seen.unknown_signal,
            "error": self._error and self._error[:_ERROR_LETTERS],
            "started_ms": self._started_ms,
            "finished_ms": _now_ms(),
        }
        write_durably(self._directory / "exit.json", about | ended)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _steady_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def _lock(directory: Path) -> IO[bytes] | None:
    held = (directory / "lock").open("ab")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        return None
    return held


def main(directory: Path) -> int:
    """Leave the caller's session, take the lock and supervise; 0 also where somebody has it."""
    if os.fork():
        os._exit(0)  # the caller waits for this one only; the supervisor is nobody's child
    os.setsid()
    held = _lock(directory)
    if held is None or (directory / "exit.json").exists():
        return 0
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only the job is asked to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Supervisor(directory).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
