"""The simulated job: a chain of hashes, so that its result says whether every step was made once.

state(0) comes from the job; state(n + 1) = SHA-256 of state(n). A checkpoint holds step and state;
the outputs are the last state. A job that was resumed from a wrong or torn state ends elsewhere.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field

from sublet_contracts.documents import Job
from sublet_contracts.tree import Chunk, TreeFile, TreeIndex
from tests.simulation.engine import Engine, Quartz

PREEMPTED = 75


@dataclass(frozen=True)
class Program:
    """What a job's command does. Written into the command, as the real thing would be."""

    steps: int
    step_ms: int
    every: int
    save_ms: int
    ending: str = "done"
    """done, fail (exit 1 halfway), yield (exit 75 once), deaf (doesn't hear STOP or SAVE)"""

    def command(self) -> tuple[str, ...]:
        """Return it as the job's command."""
        return ("train", json.dumps(self.__dict__, sort_keys=True))

    @classmethod
    def of(cls, job: Job) -> Program:
        """Return the program that a job's command names."""
        return cls(**json.loads(job.command[1]))


def state_at(nonce: str, steps: int, begin: tuple[int, str] | None = None) -> str:
    """Return the state after `steps`, from the start or from a known (step, state)."""
    step, state = begin or (0, hashlib.sha256(nonce.encode()).hexdigest())
    for _ in range(steps - step):
        state = hashlib.sha256(state.encode()).hexdigest()
    return state


def tree(files: dict[str, bytes]) -> tuple[bytes, dict[str, bytes], int]:
    """Return the index (as bytes), the chunks by hash, and the total size of a folder."""
    listed = tuple(_listed(path, files[path]) for path in sorted(files))
    chunks = {file.sha256: files[file.path] for file in listed}
    return _index(listed), chunks, sum(map(len, files.values()))


@functools.lru_cache(1_024)
def _listed(path: str, data: bytes) -> TreeFile:
    sha256 = hashlib.sha256(data).hexdigest()
    chunk = Chunk(sha256=sha256, size_bytes=len(data))
    return TreeFile(path=path, size_bytes=len(data), sha256=sha256, chunks=(chunk,))


@functools.lru_cache(1_024)
def _index(files: tuple[TreeFile, ...]) -> bytes:
    return TreeIndex(files=files).to_bytes()


def checkpoint_files(nonce: str, step: int, state: str) -> dict[str, bytes]:
    """Return the files of a checkpoint: one that changes, one that never does."""
    return {
        "base.bin": f"base of {nonce}".encode(),
        "state.json": json.dumps({"state": state, "step": step}).encode(),
    }


@dataclass
class Container:
    """A run on a provider's machine. Outlives the agent's process, not the machine."""

    engine: Engine
    clock: Quartz
    lease_id: str
    nonce: str
    program: Program
    begin: tuple[int, str]
    wants_outputs: bool
    looked: Callable[[], None]
    """Called when there is something new to see."""
    began_ahead_ms: int = 0
    ended_ahead_ms: int = 0
    started_ms: int = 0
    finished_ms: int | None = None
    exit_code: int | None = None
    steps: dict[int, bytes | None] = field(default_factory=dict)
    """Whole checkpoints in out/: state; None: torn."""
    stopping: bool = False
    state: tuple[int, str] = (0, "")

    def start(self) -> None:
        """Begin to compute."""
        self.started_ms = self.engine.now_ms
        self.began_ahead_ms = self.clock.ahead_ms()
        self.state = self.begin
        self._plan_next()

    @property
    def running(self) -> bool:
        return self.finished_ms is None

    def ran_ms(self) -> int:
        """True wall time from start to exit."""
        end = self.engine.now_ms if self.finished_ms is None else self.finished_ms
        return end - self.started_ms

    def clocked_ms(self) -> int:
        """The same by the machine's own clock, which may run fast or slow."""
        end = self.clock.ahead_ms() if self.finished_ms is None else self.ended_ahead_ms
        return max(0, self.ran_ms() + end - self.began_ahead_ms)

    def step_now(self) -> int:
        """Return the step that it has reached."""
        done = self.ran_ms() // self.program.step_ms
        return min(self.program.steps, self.begin[0] + done)

    def _plan_next(self) -> None:
        program = self.program
        step = self.step_now()
        target = min(program.steps, (step // program.every + 1) * program.every)
        if program.ending in ("fail", "yield") and self.begin[0] == 0:
            target = min(target, max(1, program.steps // 2))
        at_ms = self.started_ms + (target - self.begin[0]) * program.step_ms
        self.engine.after(at_ms - self.engine.now_ms, lambda: self._reached(target))

    def _reached(self, step: int) -> None:
        if not self.running or self.stopping:
            return
        program = self.program
        ends_early = program.ending in ("fail", "yield") and self.begin[0] == 0
        if ends_early and step >= max(1, program.steps // 2):
            if program.ending == "yield":
                self._write(step)
            self._exit(1 if program.ending == "fail" else PREEMPTED)
            return
        self._write(step)
        if step >= program.steps:
            self._exit(0)
        else:
            self._plan_next()

    def _write(self, step: int) -> None:
        self.state = (step, state_at(self.nonce, step, self.state))
        self.steps[step] = self.state[1].encode()
        self.looked()

    def save(self) -> None:
        """SAVE was asked for."""
        if self.running and not self.stopping and self.program.ending != "deaf":
            step = self.step_now()
            if step not in self.steps and step > self.begin[0]:
                self._write(step)

    def stop(self) -> None:
        """STOP and TERM: it saves and leaves."""
        if not self.running or self.stopping or self.program.ending == "deaf":
            return
        self.stopping = True

        def leave() -> None:
            if self.running:
                step = self.step_now()
                if step > self.begin[0] and step not in self.steps:
                    self._write(step)
                self._exit(0 if step >= self.program.steps else PREEMPTED)

        self.engine.after(self.program.save_ms, leave)

    def kill(self) -> None:
        """End it at once."""
        if self.running:
            self._exit(137)

    def _exit(self, code: int) -> None:
        self.finished_ms = self.engine.now_ms
        self.ended_ahead_ms = self.clock.ahead_ms()
        self.exit_code = code
        self.looked()

    @property
    def outputs(self) -> dict[str, bytes]:
        """What it hands over."""
        return {"result.txt": self.state[1].encode()}
