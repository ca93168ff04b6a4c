"""Watches one run: its state, its output, its checkpoints, its progress, its disk."""

import asyncio
import functools
import shutil
import time
from typing import TYPE_CHECKING

from sublet_agent.adapters.folders import usage
from sublet_agent.adapters.workspace import Workspace, run_id
from sublet_agent.core import events
from sublet_agent.core.runners import RunnerError, RunStatus
from sublet_contracts.tree import TreeRefused

if TYPE_CHECKING:
    from sublet_agent.adapters.shell import Shell

LOOK_S = 0.2
DISK_EVERY_S = 2.0
LAYOUTS_EVERY_S = 1.0
LOG_BYTES = 1024 * 1024
LEAST_FREE_BYTES = 16 * 1024 * 1024


class Observer:
    """Looks at a run about five times a second and posts what has changed."""

    def __init__(self, shell: "Shell", lease_id: str, workspace: Workspace) -> None:
        self._shell = shell
        self._lease_id = lease_id
        self._run = run_id(lease_id)
        self._workspace = workspace
        self._soon = asyncio.Event()
        self._left = False
        self._seen: set[int] = set()
        self._progress: object = None
        self._disk_at = 0.0
        self._layouts_at = 0.0
        self._too_much = ""
        self._said_too_much = False
        self._started_at: tuple[int, float] | None = None
        self._logging = asyncio.Lock()

    def look_soon(self) -> None:
        """Something was done to the run: don't wait for the next turn."""
        self._soon.set()

    def leave(self) -> None:
        """Look no more."""
        self._left = True
        self._soon.set()

    async def run(self) -> None:
        """Look until the run is over."""
        while not self._left:
            self._soon.clear()
            try:
                over = await self._look()
            except RunnerError as error:
                # The engine may be restarting: the run is neither gone nor ended by that.
                self._shell.say(f"runner: {error}")
                over = False
                await asyncio.sleep(1.0)
            if over:
                break
            try:
                await asyncio.wait_for(self._soon.wait(), LOOK_S)
            except TimeoutError:
                continue
        self._shell.forget_observer(self._lease_id)

    async def final_look(self) -> set[int]:
        """After the exit: the rest of the output, and every checkpoint that is there."""
        await self._logs(to_the_end=True)
        self._tell_progress(await self._shell.blocking(self._workspace.progress))
        steps = await self._shell.blocking(self._workspace.steps)
        layouts = await self._shell.blocking(functools.partial(self._layouts, exited=True))
        self._say_too_much()
        return steps | layouts

    async def _look(self) -> bool:
        shell = self._shell
        status, steps, progress = await shell.blocking(self._read)
        if self._left:
            return True
        self._say_too_much()
        await self._logs(to_the_end=False)
        self._tell_progress(progress)
        for step in sorted(steps - self._seen):
            self._seen.add(step)
            shell.post(events.CheckpointSeen(self._lease_id, step))
        if status.state == "gone":
            shell.post(events.Vanished(self._lease_id))
            return True
        if status.state == "created":
            shell.post(events.Vanished(self._lease_id))
            return True
        await self._disk()
        observed = self._observed(status)
        shell.post(observed)
        return not observed.running

    def _read(self) -> tuple[RunStatus, set[int], tuple[int, int, dict[str, float]] | None]:
        # The state first: what lies there when it has exited is then all there is.
        status = self._shell.runner.status(self._run)
        steps = self._workspace.steps()
        now = time.monotonic()
        if now - self._layouts_at >= LAYOUTS_EVERY_S:
            self._layouts_at = now
            steps |= self._layouts()
        return status, steps, self._workspace.progress()

    def _layouts(self, *, exited: bool = False) -> set[int]:
        try:
            step = self._workspace.layout_step(exited=exited)
        except (TreeRefused, OSError) as error:
            self._too_much = str(error)
            return set()
        return set() if step is None else {step}

    def _say_too_much(self) -> None:
        """Tell the renter, once, why the checkpoints in the outputs folder are not seen."""
        if self._too_much and not self._said_too_much:
            self._said_too_much = True
            self._shell.log_line(self._lease_id, f"no checkpoint is found: {self._too_much}")

    def _observed(self, status: RunStatus) -> events.Observed:
        now_ms = self._shell.now_ms()
        started_ms = status.started_ms if status.started_ms is not None else now_ms
        if status.state == "exited":
            finished_ms = status.finished_ms if status.finished_ms is not None else now_ms
            ran_ms = max(0, finished_ms - started_ms)
        else:
            # By the steady clock once we have seen it: the wall clock may be set meanwhile.
            if self._started_at is None:
                self._started_at = (max(0, now_ms - started_ms), time.monotonic())
            before_ms, at = self._started_at
            ran_ms = before_ms + int((time.monotonic() - at) * 1000)
        return events.Observed(
            self._lease_id,
            running=status.state == "running",
            started_ms=started_ms,
            ran_ms=ran_ms,
            exit_code=status.exit_code,
            out_of_memory=status.oom_killed,
            detail=status.error or "",
        )

    async def _logs(self, *, to_the_end: bool) -> None:
        shell = self._shell
        async with self._logging:
            for _ in range(1000 if to_the_end else 4):
                cursor = shell.spool.cursor(self._lease_id)
                try:
                    batch = await shell.blocking(
                        shell.runner.read_logs, self._run, cursor, LOG_BYTES
                    )
                except RunnerError as error:
                    shell.say(f"output: {error}")
                    return
                if batch.lines or batch.cursor != cursor:
                    shell.spool.add(self._lease_id, batch.lines, batch.cursor)
                if not batch.more:
                    return

    def _tell_progress(self, progress: tuple[int, int, dict[str, float]] | None) -> None:
        if progress is None or progress == self._progress:
            return
        self._progress = progress
        step, total, metrics = progress
        self._shell.post(events.Progressed(self._lease_id, step, total, metrics))

    async def _disk(self) -> None:
        now = time.monotonic()
        if now - self._disk_at < DISK_EVERY_S:
            return
        self._disk_at = now
        workspace = self._workspace
        limit = workspace.record.job.resources.disk_bytes
        paths = [workspace.checkpoint / "out", workspace.outputs]
        used = await self._shell.blocking(usage, paths, limit)
        self._shell.post(events.DiskUsed(self._lease_id, used))
        free = shutil.disk_usage(workspace.root).free
        if free < LEAST_FREE_BYTES:
            says = f"{free} bytes are free on this machine"
            self._shell.post(events.DiskFull(self._lease_id, says))
