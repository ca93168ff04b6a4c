"""Ends runs whose deadline has passed, whatever became of the agent: a process of its own.

    python -m sublet_agent.adapters.watchdog.watchdog STATE RUNNER OWNER FD

The agent starts it and sees to it that it is there; it leaves the agent's session, so that what
ends the agent does not end it. One works for a state folder at a time: a newer one (of an agent
that was started anew, perhaps of a newer release) takes over from the one before. FD is the end of
a pipe that the agent holds open as long as it lives. When the agent is gone and no deadline is left
there is nothing more to watch, and it ends.

It reads the deadlines and asks the runner, nothing else, so that it needs neither journal nor
network nor a working agent. It can't help where it is killed itself: by the machine's owner, or,
with the process runner, by a job, which has the agent's own user.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sublet_agent.adapters.watchdog.deadline_files import DeadlineFiles, RunDeadline, boot_clock_ms
from sublet_agent.core.deadlines import deadline_text
from sublet_agent.core.runner_port import Runner, RunnerError

LOOK_S = 0.5
_START_S = 60.0
_MODULE = "sublet_agent.adapters.watchdog.watchdog"


class WatchdogKeeper:
    """The agent's side: starts the watchdog, and again should it be gone."""

    def __init__(self, state: Path, runner: str, owner: str) -> None:
        self._state = state
        self._arguments = (str(state.absolute()), runner, owner)
        self._theirs, self._ours = os.pipe()
        self._lock = threading.Lock()
        self._started = False

    def ensure(self) -> bool:
        """Have one: of this agent's, at first, and another should it be gone. Says whether one was
        started. Raises OSError. Any thread may ask."""
        with self._lock:
            if self._started and _is_held(self._state / "watchdog.lock"):
                return False
            self._start()
            self._started = True
            return True

    def close(self) -> None:
        """The agent leaves: the watchdog stays as long as it has something to watch."""
        os.close(self._ours)
        os.close(self._theirs)

    def _start(self) -> None:
        """Start one, which takes over from any before."""
        command = [sys.executable, "-m", _MODULE, *self._arguments, str(self._theirs)]
        try:
            with (self._state / "watchdog.log").open("wb") as log:
                subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    check=True,
                    timeout=_START_S,
                    pass_fds=(self._theirs,),
                    start_new_session=True,
                )
        except subprocess.SubprocessError as error:
            raise OSError(f"the watchdog does not start: {error}") from error


class Watchdog:
    """The watchdog itself. `say` tells what it does."""

    def __init__(
        self,
        files: DeadlineFiles,
        runner: Callable[[], Runner],
        say: Callable[[str], None],
        now_ms: Callable[[], int] = boot_clock_ms,
    ) -> None:
        self._files = files
        self._make_runner = runner
        self._runner: Runner | None = None
        self._say = say
        self._now_ms = now_ms

    def turn(self) -> int:
        """End what is due; what can't be ended yet is tried again at the next turn. Returns the
        number of deadlines."""
        found = self._files.all()
        for deadline in found:
            if deadline.at_ms <= self._now_ms():
                try:
                    self._end(deadline)
                except RunnerError as error:
                    self._say(f"run {deadline.run_id}: {error} ({error.raw})")
                except Exception as error:  # noqa: BLE001 - the others are to be ended all the same
                    self._say(f"run {deadline.run_id}: {type(error).__name__}: {error}")
        return len(found)

    def _end(self, deadline: RunDeadline) -> None:
        if self._runner is None:
            self._runner = self._make_runner()
        if self._runner.status(deadline.run_id).state != "running":
            if self._files.read(deadline.run_id) == deadline:
                self._files.remove(deadline.run_id)
            return
        if self._files.read(deadline.run_id) != deadline:
            return  # renewed while the runner was asked: somebody looks after it
        self._say(f"run {deadline.run_id}: {deadline_text(deadline.over)}")
        # Before the kill: whoever then finds the run ended finds the reason. A full disk must not
        # keep it alive.
        with contextlib.suppress(OSError):
            self._files.note(deadline)
        self._runner.kill(deadline.run_id)


def _make_runner(name: str, owner: str, state: Path) -> Runner:
    if name == "docker":
        from sublet_agent.adapters.docker.runner import DockerRunner

        return DockerRunner(owner, state)
    from sublet_agent.adapters.process.runner import ProcessRunner

    return ProcessRunner(owner, state / "engine")


def _is_held(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _watch(state: Path, name: str, owner: str, agent: int) -> None:
    me = f"{os.getpid()} {time.time_ns()}"
    turn = state / "watchdog.turn"
    said = [""]

    def say(text: str) -> None:
        if text != said[0]:
            said[0] = text
            with contextlib.suppress(OSError):  # a full disk
                print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)

    with contextlib.suppress(OSError):  # root's alone
        Path("/proc/self/oom_score_adj").write_text("-900")
    # Made now: while the agent is being upgraded its files may be away.
    runner = _make_runner(name, owner, state)
    # Whoever works now reads this and leaves; only then is the lock free.
    turn.write_text(me)
    with (state / "watchdog.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        watchdog = Watchdog(DeadlineFiles(state), lambda: runner, say)
        while _has_turn(turn, me):
            # In this order: the agent may have written a deadline just before it went.
            gone = _is_gone(agent, LOOK_S)
            if watchdog.turn() == 0 and gone:
                return


def _has_turn(turn: Path, me: str) -> bool:
    try:
        return turn.read_text() in (me, "")
    except OSError:
        return True


def _is_gone(agent: int, wait_s: float) -> bool:
    """Wait a moment, and say whether the agent is gone: then the pipe has no other end."""
    poll = select.poll()
    poll.register(agent, 0)
    gone = bool(poll.poll(wait_s * 1000))
    if gone:
        time.sleep(wait_s)
    return gone


def main(arguments: list[str]) -> int:
    """Leave the caller's session, so that it waits for this process only; then watch."""
    state, name, owner, agent = arguments
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    _watch(Path(state), name, owner, int(agent))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
