"""Watches one run: its state, its output, its checkpoints, its progress, its disk."""

import asyncio
import functools
import shutil
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from sublet_agent.adapters.session.log_spool import Spool
from sublet_agent.adapters.workspace.disk_space import LEAST_FREE_BYTES
from sublet_agent.adapters.workspace.folders import usage
from sublet_agent.adapters.workspace.workspace import Workspace, run_id
from sublet_agent.core import events
from sublet_agent.core.exit_reasons import ExitEvidence
from sublet_agent.core.runner_port import Runner, RunnerError, RunStatus
from sublet_contracts.tree import TreeRefused

LOOK_S = 0.2
DISK_EVERY_S = 2.0
SEARCH_EVERY_S = 1.0
LOG_BYTES = 1024 * 1024
T = TypeVar("T")


class Listener(Protocol):
    """Who has a run observed, and takes what is seen. All but `blocking` return at once."""

    @property
    def runner(self) -> Runner: ...

    @property
    def spool(self) -> Spool: ...

    @property
    def now_ms(self) -> Callable[[], int]: ...

    @property
    def say(self) -> Callable[[str], None]: ...

    def post(self, event: events.Event) -> None: ...

    def log_line(self, lease_id: str, text: str) -> None: ...

    def forget_observer(self, lease_id: str) -> None: ...

    async def blocking(self, call: Callable[..., T], *arguments: Any) -> T: ...


class Observer:
    """Looks at a run about five times a second and posts what has changed."""

    def __init__(self, listener: Listener, lease_id: str, workspace: Workspace) -> None:
        self._listener = listener
        self._lease_id = lease_id
        self._run = run_id(lease_id)
        self._workspace = workspace
        self._wake = asyncio.Event()
        self._stopped = False
        self._reported_steps: set[int] = set()
        self._reported_progress: object = None
        self._disk_measured_s = 0.0
        self._outputs_searched_s = 0.0
        self._search_trouble = ""
        self._trouble_told = False
        self._first_seen: tuple[int, float] | None = None
        """how long it had run by the wall clock, in ms, and when that was, by the monotonic one"""
        self._log_reader = asyncio.Lock()

    def look_soon(self) -> None:
        """Something was done to the run: don't wait for the next turn."""
        self._wake.set()

    def stop(self) -> None:
        """Look no more."""
        self._stopped = True
        self._wake.set()

    async def run(self) -> None:
        """Look until the run is over."""
        while not self._stopped:
            self._wake.clear()
            try:
                over = await self._look()
            except RunnerError as error:
                # The engine may be restarting: the run is neither gone nor ended by that.
                self._listener.say(f"runner: {error}")
                over = False
                await asyncio.sleep(1.0)
            if over:
                break
            try:
                await asyncio.wait_for(self._wake.wait(), LOOK_S)
            except TimeoutError:
                continue
        self._listener.forget_observer(self._lease_id)

    async def final_look(self) -> set[int]:
        """After the exit: the rest of the output, and every checkpoint that is there."""
        await self._read_logs(to_the_end=True)
        self._tell_progress(await self._listener.blocking(self._workspace.progress))
        steps = await self._listener.blocking(self._workspace.steps)
        in_outputs = await self._listener.blocking(
            functools.partial(self._search_outputs, exited=True)
        )
        self._tell_search_trouble()
        return steps | in_outputs

    async def _look(self) -> bool:
        listener = self._listener
        status, steps, progress = await listener.blocking(self._read)
        if self._stopped:
            return True
        # Before anything is written, and before an exit that may come of it is taken for the job's.
        self._check_free_disk(status)
        self._tell_search_trouble()
        await self._read_logs(to_the_end=False)
        self._tell_progress(progress)
        for step in sorted(steps - self._reported_steps):
            self._reported_steps.add(step)
            listener.post(events.CheckpointFound(self._lease_id, step))
        if status.state == "gone":
            listener.post(events.Vanished(self._lease_id))
            return True
        if status.state == "created":
            listener.post(events.Vanished(self._lease_id))
            return True
        await self._measure_disk()
        observed = self._observed(status)
        listener.post(observed)
        return not observed.running

    def _read(self) -> tuple[RunStatus, set[int], tuple[int, int, dict[str, float]] | None]:
        # The state first: what lies there when it has exited is then all there is.
        status = self._listener.runner.status(self._run)
        steps = self._workspace.steps()
        now = time.monotonic()
        if now - self._outputs_searched_s >= SEARCH_EVERY_S:
            self._outputs_searched_s = now
            steps |= self._search_outputs()
        return status, steps, self._workspace.progress()

    def _search_outputs(self, *, exited: bool = False) -> set[int]:
        try:
            step = self._workspace.found_in_outputs(exited=exited)
        except (TreeRefused, OSError) as error:
            self._search_trouble = str(error)
            return set()
        return set() if step is None else {step}

    def _tell_search_trouble(self) -> None:
        """Tell the renter, once, why the checkpoints in the outputs folder are not seen."""
        if self._search_trouble and not self._trouble_told:
            self._trouble_told = True
            self._listener.log_line(
                self._lease_id, f"no checkpoint is found: {self._search_trouble}"
            )

    def _observed(self, status: RunStatus) -> events.Observed:
        now_ms = self._listener.now_ms()
        started_ms = status.started_ms if status.started_ms is not None else now_ms
        if status.state == "exited":
            finished_ms = status.finished_ms if status.finished_ms is not None else now_ms
            ran_ms = max(0, finished_ms - started_ms)
        else:
            # By the steady clock once we have seen it: the wall clock may be set meanwhile.
            if self._first_seen is None:
                self._first_seen = (max(0, now_ms - started_ms), time.monotonic())
            before_ms, at = self._first_seen
            ran_ms = before_ms + int((time.monotonic() - at) * 1000)
        return events.Observed(
            self._lease_id,
            running=status.state == "running",
            started_ms=started_ms,
            ran_ms=max(0, ran_ms - status.paused_ms),
            end=None if status.state != "exited" else evidence_of(status),
            detail=status.error or "",
        )

    async def _read_logs(self, *, to_the_end: bool) -> None:
        listener = self._listener
        async with self._log_reader:
            for _ in range(1000 if to_the_end else 4):
                cursor = listener.spool.cursor(self._lease_id)
                try:
                    batch = await listener.blocking(
                        listener.runner.read_logs, self._run, cursor, LOG_BYTES
                    )
                except RunnerError as error:
                    listener.say(f"output: {error}")
                    return
                if batch.lines or batch.cursor != cursor:
                    listener.spool.add(self._lease_id, batch.lines, batch.cursor)
                if not batch.more:
                    return

    def _tell_progress(self, progress: tuple[int, int, dict[str, float]] | None) -> None:
        if progress is None or progress == self._reported_progress:
            return
        self._reported_progress = progress
        step, total, metrics = progress
        self._listener.post(events.Progressed(self._lease_id, step, total, metrics))

    async def _measure_disk(self) -> None:
        now = time.monotonic()
        if now - self._disk_measured_s < DISK_EVERY_S:
            return
        self._disk_measured_s = now
        workspace = self._workspace
        limit = workspace.record.job.resources.disk_bytes
        paths = [workspace.checkpoint / "out", workspace.outputs]
        used = await self._listener.blocking(usage, paths, limit)
        self._listener.post(events.DiskUsed(self._lease_id, used))

    def _check_free_disk(self, status: RunStatus) -> None:
        """Tell that the disk is full, unless the run has come to its good end with it."""
        free = shutil.disk_usage(self._workspace.root).free
        if free < LEAST_FREE_BYTES and not (status.state == "exited" and status.exit_code == 0):
            says = f"{free} bytes are free on this machine"
            self._listener.post(events.DiskFull(self._lease_id, says))


def evidence_of(status: RunStatus) -> ExitEvidence:
    """Return what the runner saw of an end, as it is judged."""
    return ExitEvidence(
        exit_code=status.exit_code,
        returned=status.returned,
        signal=status.signal,
        out_of_memory=status.oom_killed,
        limit_exceeded=status.limit_exceeded,
        engine_stopped=status.engine_stopped,
        outside_signal=status.outside_signal,
        unknown_signal=status.unknown_signal,
    )
