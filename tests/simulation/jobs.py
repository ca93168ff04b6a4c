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

from sublet_agent.core.checkpoints import Stall
from sublet_agent.core.exit_reasons import ExitEvidence
from sublet_contracts.digests import digest_of
from sublet_contracts.documents import Job
from sublet_contracts.tree import Chunk, TreeFile, TreeIndex
from tests.simulation.engine import Engine, Quartz
from tests.simulation.saved_folders import SavedFolder

PREEMPTED = 75
_WHATEVER_ELSE = ("finished", "killed by its agent", "forgotten", "silence", "budget")
"""Ends that are what they are, whatever its device and its engine did before."""
BASE_MODELS = 3
ENGINE_GRACE_MS = 10_000
"""What a container engine stops gets TERM, and after so long KILL."""


@dataclass(frozen=True)
class Program:
    """What a job's command does. Written into the command, as the real thing would be."""

    steps: int
    step_ms: int
    every: int
    save_ms: int
    saves: str = ""
    """'': by the protocol; else into a folder that it names (saved_folders.py)"""
    ending: str = "done"
    """done, fail (exit 1 halfway), returns (exit 137 halfway, by itself), yield (exit 75 once),
    deaf (doesn't hear STOP or SAVE), polite (exits with 0 whenever it is asked to stop), suicide
    (KILLs itself halfway, each time: where no such end is paid it computes for nothing), hangs
    (saves halfway, and then stands still for good, until it goes on from there)"""

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
    chunks = {file.chunks[0].digest: files[file.path] for file in listed}
    return _index(listed), chunks, sum(map(len, files.values()))


@functools.lru_cache(1_024)
def _listed(path: str, data: bytes) -> TreeFile:
    chunk = Chunk(digest=digest_of(data), size_bytes=len(data))
    return TreeFile(path=path, size_bytes=len(data), chunks=(chunk,))


@functools.lru_cache(1_024)
def _index(files: tuple[TreeFile, ...]) -> bytes:
    return TreeIndex(files=files).to_bytes()


def checkpoint_files(nonce: str, step: int, state: str) -> dict[str, bytes]:
    """Return the files of a checkpoint: one that changes, and one that never does, which other
    jobs begin with, too."""
    return {
        "base.bin": f"base model {int(nonce[0], 16) % BASE_MODELS}".encode(),
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
    devices: tuple[str, ...] = ()
    end: ExitEvidence | None = None
    """What the machine saw of its end."""
    truth: str = ""
    """How it ended in truth (truth.py)."""
    engine_says: str = ""
    device_says: str = ""
    """What the engine did to it, or what became of a device of its, where that was so."""
    forgotten: bool = False
    """The engine knows it no longer; its folder is there."""
    stalls: bool = False
    """Whether its renter wants it paused when it stands still."""
    hangs_ms: int | None = None
    """It hangs, since it had run for so long."""
    lost_power: bool = False
    """Its machine was started anew: what it had saved by the protocol may be torn."""
    lost_outputs: bool = False
    """They hold something else since then."""
    folder: SavedFolder | None = None
    """Where it saves, if it doesn't by the protocol."""

    def start(self) -> None:
        """Begin to compute."""
        self.started_ms = self.engine.now_ms
        self.began_ahead_ms = self.clock.ahead_ms()
        self.state = self.begin
        if self.program.saves:
            self.folder = SavedFolder(self.engine, self.program.saves)
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
        ran_ms = self.ran_ms() if self.hangs_ms is None else self.hangs_ms
        done = ran_ms // self.program.step_ms
        return min(self.program.steps, self.begin[0] + done)

    def _plan_next(self) -> None:
        program = self.program
        step = self.step_now()
        target = min(program.steps, (step // program.every + 1) * program.every)
        if self._ends_at is not None:
            target = min(target, self._ends_at)
        at_ms = self.started_ms + (target - self.begin[0]) * program.step_ms
        self.engine.after(at_ms - self.engine.now_ms, lambda: self._reached(target))

    @property
    def _ends_at(self) -> int | None:
        """The step at which it ends before its time, of its own accord."""
        begin, steps = self.begin[0], self.program.steps
        if self.program.ending == "suicide":
            half = begin + max(1, (steps - begin) // 2)
            return half if half < steps else None
        odd = self.program.ending in ("fail", "returns", "yield", "hangs") and begin == 0
        return max(1, steps // 2) if odd else None

    def _reached(self, step: int) -> None:
        if not self.running or self.stopping or self.hangs_ms is not None:
            return
        if self._ends_at is not None and step >= self._ends_at:
            self._end_early(step)
            return
        self._write(step)
        if step < self.program.steps:
            self._plan_next()
        elif self.folder is None:
            self._exit(0, "finished")
        else:
            # It leaves once it has written its file, however long that takes.
            self.engine.after(self.program.save_ms + 1, self._written_out)

    def _written_out(self) -> None:
        if self.running and not self.stopping and self.hangs_ms is None:
            self._close_folder()
            self._exit(0, "finished")

    def _close_folder(self) -> None:
        """Who leaves by itself has written out what it had open."""
        if self.folder is not None and self.folder.open:
            self._saved()

    def _end_early(self, step: int) -> None:
        match self.program.ending:
            case "fail":
                self._exit(1, "failed")
            case "returns":
                self._exit(137, "failed", returned=True)
            case "yield":
                self._write(step)
                self._saved()
                self._exit(PREEMPTED, "yielded")
            case "hangs":
                self._write(step)
                self.hang()
            case _:
                if self.begin[0]:  # so that it comes to an end
                    self._write(step)
                self._exit(137, "killed unseen", signal=9)

    def _write(self, step: int) -> None:
        self.state = (step, state_at(self.nonce, step, self.state))
        if self.folder is not None:
            self.folder.begin(self.state, self.program.save_ms, self._saved)
        else:
            self.steps[step] = self.state[1].encode()
        self.looked()

    def _saved(self) -> None:
        if self.running and self.hangs_ms is None and self.folder is not None:
            self.folder.written(self.clocked_ms())
            self.looked()

    def save(self) -> None:
        """SAVE was asked for."""
        hears = self.running and not self.stopping and self.hangs_ms is None
        if hears and self.program.ending != "deaf" and self.folder is None:
            step = self.step_now()
            if step not in self.steps and step > self.begin[0]:
                self._write(step)

    def stop(self) -> None:
        """STOP and TERM: it saves and leaves."""
        hears = self.running and not self.stopping and self.hangs_ms is None
        if not hears or self.program.ending == "deaf":
            return
        self.stopping = True
        if self.folder is not None:
            # TERM ends a script that knows nothing of it, in the midst of whatever it does.
            polite = self.program.ending == "polite"
            if polite:
                self._close_folder()
            self._exit(0 if polite else 143, "left", signal=None if polite else 15)
            return

        def leave() -> None:
            if self.running and self.hangs_ms is None:
                step = self.step_now()
                if step > self.begin[0] and step not in self.steps:
                    self._write(step)
                if step >= self.program.steps:
                    self._exit(0, "finished")
                else:
                    self._exit(0 if self.program.ending == "polite" else PREEMPTED, "left")

        self.engine.after(self.program.save_ms, leave)

    def finishes_in_ms(self) -> int:
        """Return in how long all its work will be done, if nothing befalls it."""
        steps = self.program.steps - self.begin[0]
        return self.started_ms + steps * self.program.step_ms - self.engine.now_ms

    def stall(self) -> Stall:
        """What it says of how long saving has held it: more than can be, now and then."""
        saves, held_ms = len(self.steps), self.program.save_ms
        return Stall(saves, saves * held_ms, held_ms, 2 * held_ms)

    @property
    def had_finished(self) -> bool:
        """What its folder says of its work: all of it was done."""
        return self.state[0] >= self.program.steps

    def kill(self) -> None:
        """Its agent ends it at once."""
        self.ends(137, "killed by its agent", signal=9)

    def ends(self, code: int | None, truth: str, **evidence: object) -> None:
        """It ends at once, for what befell it."""
        if self.running:
            self._exit(code, truth, **evidence)

    def hang(self) -> None:
        """It computes no further, and hears nothing."""
        if self.running and self.hangs_ms is None:
            self.hangs_ms = self.ran_ms()

    def loses_power(self) -> None:
        """What it saved by the protocol, and its outputs, are as long as they were, and may hold
        something else."""
        self.lost_power = True
        self.lost_outputs = self.lost_outputs or self.engine.happens(0.5)
        for step, state in self.steps.items() if self.folder is None else ():
            if state is not None and self.engine.happens(0.5):
                kept = self.engine.draw_ms(0, len(state) - 1)
                self.steps[step] = state[:kept] + b"0" * (len(state) - kept)

    def engine_stops(self, says: str, *, patient: bool) -> None:
        """The machine's engine stops it: TERM, and KILL after a while, or where it isn't patient at
        once."""
        if not self.running:
            return
        self.engine_says = says
        if not patient:
            self.ends(137, "engine")
            return
        self.stop()
        self.engine.after(ENGINE_GRACE_MS, lambda: self.ends(137, "engine"))

    def _exit(self, code: int | None, truth: str, **evidence: object) -> None:
        self.finished_ms = self.engine.now_ms
        self.ended_ahead_ms = self.clock.ahead_ms()
        self.exit_code = code
        by_itself = truth not in _WHATEVER_ELSE
        if self.device_says and by_itself:
            truth = "device"
        elif self.engine_says and by_itself and truth != "memory":
            truth = "engine"
        self.truth = truth
        if self.folder is not None:
            self.folder.closed()
        evidence |= {"engine_stopped": self.engine_says, "device_failed": self.device_says}
        self.end = ExitEvidence(code, **evidence)  # type: ignore[arg-type]
        self.looked()

    @property
    def outputs(self) -> dict[str, bytes]:
        """What it hands over."""
        result = self.state[1].encode()
        return {"result.txt": b"0" * len(result) if self.lost_outputs else result}
