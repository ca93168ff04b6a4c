"""Watches one run: its state, its output, its checkpoints, its progress, its disk.

What the job wrote is read by the processes of folder_reader.py. Where they can't answer this time,
the look goes on without them and asks again later, less often each time; a folder that holds more
than anybody is to read ends the run, as the job's own doing.
"""

import asyncio
import functools
import shutil
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from sublet_agent.adapters.session.log_spool import Spool
from sublet_agent.adapters.workspace.disk_space import LEAST_FREE_BYTES
from sublet_agent.adapters.workspace.folder_reader import FolderBusy, FolderReader, FolderRefused
from sublet_agent.adapters.workspace.reader import Look, Progress
from sublet_agent.adapters.workspace.workspace import Workspace, run_id
from sublet_agent.core import cadence, events
from sublet_agent.core.exit_reasons import ExitEvidence
from sublet_agent.core.folders_at_rest import Ended
from sublet_agent.core.runner_port import OutputLine, Runner, RunnerError, RunStatus
from sublet_contracts.keys import short
from sublet_contracts.reasons import Reason
from sublet_contracts.run_conventions import EXIT_PREEMPTED

LOOK_S = 0.2
OPENED_EVERY_S = 5.0
SAVED_EVERY_S = 30.0
DISK_EVERY_S = 2.0
SEARCH_EVERY_S = 1.0
LOG_BYTES = 256 * 1024
"""of output at once, lines counted: they are kept on the event loop's thread. Not less: the engine
looks for the place to read on from the log's beginning, each time"""
USAGE_EVERY_S = 2.0
LOG_SHARE = 4
"""Reading output goes on so many times as long after it as it took: an engine may have to go
through all that a job has written, each time."""
LOG_BATCHES = 16
"""at one look"""
AGAIN_S = 1.0
ODD_ANSWERS = 3
"""so often in a row a look may raise what nobody had thought of, before the run ends by it"""
BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 30.0
FINAL_TRIES = 6
WALK_SHARE = 10
"""Who took so long to be walked through is left in peace for so many times as long."""
UNREST_TOLD_S = 10.0
"""so long the job's folders may be busy before the renter is told"""
TOLD_OF_FOLDERS = 20
TOLD_AT_ONCE = 8
"""of the checkpoints first seen at one look: the newest; the older ones are let go of"""
T = TypeVar("T")


class Listener(Protocol):
    """Who has a run observed, and takes what is seen. All but `blocking` return at once."""

    @property
    def runner(self) -> Runner: ...

    @property
    def spool(self) -> Spool: ...

    @property
    def reader(self) -> FolderReader: ...

    @property
    def now_ms(self) -> Callable[[], int]: ...

    @property
    def say(self) -> Callable[[str], None]: ...

    def post(self, event: events.Event) -> None: ...

    def log_line(self, lease_id: str, text: str) -> None: ...

    def unfinished_lines(self, lease_id: str, lines: tuple[OutputLine, ...]) -> None: ...

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
        self._opened: bool | None = None
        """whether the job has opened what it was restored from, as it was told last"""
        self._opened_after_s = 0.0
        self._saved_file = ""
        self._saved_after_s = 0.0
        self._look: Look = Look()
        """the newest look at the checkpoint folder"""
        self._look_after_s = 0.0
        self._busy_s = 0.0
        """for how long the folder is left in peace next, should it be busy again"""
        self._walk: asyncio.Task[None] | None = None
        self._measure_after_s = self._search_after_s = 0.0
        self._rules_broken = False
        self._search_trouble = ""
        self._trouble_told = False
        self._save_asked_s: float | None = None
        """since when a snapshot of the folders is due that the job named; None: none is"""
        self._told_of_folders: set[str] = set()
        self._paused = False
        self._first_seen: tuple[int, float] | None = None
        """how long it had run by the wall clock, in ms, and when that was, by the monotonic one"""
        self._log_reader = asyncio.Lock()
        self._logs_after_s = self._usage_after_s = 0.0

    def look_soon(self) -> None:
        """Something was done to the run: don't wait for the next turn."""
        self._wake.set()

    def save_asked(self) -> None:
        """The job was asked to save: a snapshot of the folders is due that it named."""
        if self._save_asked_s is None:
            self._save_asked_s = time.monotonic()

    def stop(self) -> None:
        """Look no more."""
        self._stopped = True
        self._wake.set()

    async def run(self) -> None:
        """Look until the run is over."""
        odd = 0
        try:
            while not self._stopped:
                self._wake.clear()
                try:
                    over = await self._look_once()
                    odd = 0
                except RunnerError as error:
                    # The engine may be restarting: the run is neither gone nor ended by that.
                    self._listener.say(f"runner: {error}")
                    over = False
                    await asyncio.sleep(AGAIN_S)
                except Exception as error:
                    odd += 1
                    if odd >= ODD_ANSWERS:
                        raise
                    self._listener.say(f"looking at a run: {type(error).__name__}: {error}")
                    over = False
                    await asyncio.sleep(AGAIN_S)
                if over:
                    break
                try:
                    await asyncio.wait_for(self._wake.wait(), LOOK_S)
                except TimeoutError:
                    continue
        finally:
            if self._walk is not None:
                self._walk.cancel()
            self._listener.forget_observer(self._lease_id)

    async def final_look(self) -> events.FolderScanned:
        """After the exit: the rest of the output, and every checkpoint that is there.

        Raises FolderBusy, OSError: its folder can't be read.
        """
        listener, workspace = self._listener, self._workspace
        await self._read_logs(to_the_end=True)
        steps: set[int] = set()
        delay_s = BACKOFF_FIRST_S
        for tries_left in reversed(range(FINAL_TRIES)):
            try:
                self._look = await workspace.look(listener.reader)
                steps = set(self._look.steps)
                found = await workspace.search_outputs(
                    listener.reader, self._look, listener.blocking, exited=True
                )
                steps |= set() if found is None else {found}
                await self._search_folders(self._how_it_ended())
                break
            except FolderRefused as error:
                self._search_trouble = str(error)
                break
            except (FolderBusy, OSError):
                if not tries_left:
                    raise
                await asyncio.sleep(delay_s)
                delay_s *= 2
        self._tell_search_trouble()
        self._tell_progress(await listener.blocking(workspace.progress, self._look))
        told = sorted(steps)[-TOLD_AT_ONCE:]
        return events.FolderScanned(
            self._lease_id,
            tuple(told),
            unsynced=tuple(step for step in told if step in self._look.steps),
            finished=workspace.finished(self._look),
        )

    async def _look_once(self) -> bool:
        listener = self._listener
        # The state first: what lies there when it has exited is then all there is.
        status = await listener.blocking(listener.runner.status, self._run)
        await self._look_at_folder()
        if self._stopped:
            return True
        # Before anything is written, and before an exit that may come of it is taken for the job's.
        self._check_free_disk(status)
        self._tell_search_trouble()
        await self._read_logs(to_the_end=False)
        await self._measure_usage(status)
        self._tell_progress(await listener.blocking(self._workspace.progress, self._look))
        await self._tell_opened()
        self._tell_steps(self._look.steps, unsynced=True)
        if status.state in ("gone", "created"):
            listener.post(events.Vanished(self._lease_id))
            return True
        self._walk_on()
        self._tell_pause(status.paused)
        observed = self._observed(status)
        listener.post(observed)
        return not observed.running

    # -- what the job wrote ------------------------------------------------------------------------

    async def _look_at_folder(self) -> None:
        if time.monotonic() < self._look_after_s:
            return
        try:
            self._look = await self._workspace.look(self._listener.reader)
        except FolderBusy:
            self._leave_in_peace()
        except FolderRefused as error:
            self._leave_in_peace()
            self._break_rules(Reason.CHECKPOINT_INVALID, error)
        else:
            self._busy_s = 0.0

    def _leave_in_peace(self) -> None:
        self._busy_s = min(2 * self._busy_s or BACKOFF_FIRST_S, BACKOFF_MOST_S)
        self._look_after_s = time.monotonic() + self._busy_s

    def _break_rules(self, reason: Reason, error: FolderRefused) -> None:
        if not self._rules_broken:
            self._rules_broken = True
            says = str(error)
            self._listener.log_line(self._lease_id, f"{reason}: {says}")
            self._listener.post(events.RulesBroken(self._lease_id, reason, says))

    def _tell_steps(self, steps: Iterable[int], *, unsynced: bool) -> None:
        fresh = sorted(set(steps) - self._reported_steps)
        self._reported_steps.update(fresh)
        overtaken, told = tuple(fresh[:-TOLD_AT_ONCE]), fresh[-TOLD_AT_ONCE:]
        for step in told:
            self._listener.post(
                events.CheckpointFound(self._lease_id, step, overtaken, unsynced=unsynced)
            )
            overtaken = ()

    def _walk_on(self) -> None:
        """Measure the disk and search the outputs, beside the looks: that may take its time."""
        if self._walk is not None:
            if not self._walk.done():
                return
            self._walk.result()
        now = time.monotonic()
        self._walk = (
            asyncio.create_task(self._walk_through())
            if now >= min(self._measure_after_s, self._search_after_s)
            else None
        )

    async def _walk_through(self) -> None:
        began = time.monotonic()
        if began >= self._measure_after_s:
            await self._measure_disk()
            took_s = time.monotonic() - began
            self._measure_after_s = time.monotonic() + max(DISK_EVERY_S, WALK_SHARE * took_s)
        began = time.monotonic()
        if began >= self._search_after_s:
            await self._search_outputs()
            took_s = time.monotonic() - began
            self._search_after_s = time.monotonic() + max(SEARCH_EVERY_S, WALK_SHARE * took_s)
            await self._tell_saved_file()

    async def _measure_disk(self) -> None:
        try:
            used = await self._workspace.usage(self._listener.reader)
        except FolderBusy:
            return
        except FolderRefused as error:
            self._break_rules(Reason.DISK_LIMIT, error)
            return
        self._listener.post(events.DiskUsed(self._lease_id, used))

    def _how_it_ended(self) -> Ended:
        """Whether all that it had open was closed as its script meant it."""
        return "by itself" if self._workspace.record.exit_code in (0, EXIT_PREEMPTED) else "killed"

    async def _search_folders(self, ended: Ended = "") -> None:
        """Take a snapshot of the folders that the job named as its checkpoint, if one can be taken.

        Raises FolderRefused, FolderBusy, OSError.
        """
        workspace, listener = self._workspace, self._listener
        stop = workspace.record.stop
        if not workspace.record.job.checkpoints or (ended and stop and stop.desired == "stop"):
            return  # no work of a run counts that is stopped
        asked_s = self._save_asked_s
        waited_s = None if asked_s is None else time.monotonic() - asked_s
        seen = await workspace.search_folders(
            listener.reader,
            self._look,
            listener.blocking,
            waited_ms=None if waited_s is None else int(waited_s * 1000),
            ended=ended,
        )
        if not seen.due:
            self._save_asked_s = None
        if seen.says and (ended or not seen.due or (waited_s or 0) >= UNREST_TOLD_S):
            self._tell_of_folders(f"the --checkpoint folders are not saved: {seen.says}")
        if seen.left_out:
            names = ", ".join(seen.left_out)
            self._tell_of_folders(
                f"left out of the checkpoint, as sockets and odd names are: {names}"
            )
        if seen.step is not None and seen.step not in self._reported_steps:
            self._reported_steps.add(seen.step)
            age_ms = max(0, seen.age_ms - (await self._ended_ago_ms() if ended else 0))
            listener.post(events.CheckpointFound(self._lease_id, seen.step, age_ms=age_ms))

    async def _ended_ago_ms(self) -> int:
        """How long ago the run ended: that time is none of its own."""
        try:
            status = await self._listener.blocking(self._listener.runner.status, self._run)
        except RunnerError:
            return 0
        now_ms = self._listener.now_ms()
        return max(0, now_ms - (now_ms if status.finished_ms is None else status.finished_ms))

    def _tell_of_folders(self, says: str) -> None:
        """Tell the renter, once."""
        if says not in self._told_of_folders and len(self._told_of_folders) < TOLD_OF_FOLDERS:
            self._told_of_folders.add(says)
            self._listener.log_line(self._lease_id, says)

    async def _search_outputs(self) -> None:
        listener = self._listener
        try:
            await self._search_folders()
            step = await self._workspace.search_outputs(
                listener.reader, self._look, listener.blocking
            )
        except FolderBusy:
            return
        except (FolderRefused, OSError) as error:
            self._search_trouble = str(error)
            return
        if step is not None:
            self._tell_steps([step], unsynced=False)

    def _tell_search_trouble(self) -> None:
        """Tell the renter, once, why the checkpoints in the outputs folder are not seen."""
        if self._search_trouble and not self._trouble_told:
            self._trouble_told = True
            self._listener.log_line(
                self._lease_id, f"no checkpoint is found: {self._search_trouble}"
            )

    def _tell_pause(self, paused: bool) -> None:
        """Tell both sides when the engine holds the run still, and when it goes on."""
        if paused == self._paused:
            return
        self._paused = paused
        says = (
            "the machine's engine holds this run still (it was paused): that time is not charged"
            if paused
            else "the run goes on: it is no longer paused"
        )
        self._listener.log_line(self._lease_id, says)
        self._listener.say(f"lease {short(self._lease_id)}: {says}")

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
            began = time.monotonic()
            if not to_the_end and began < self._logs_after_s:
                return
            for _ in range(256 * LOG_BATCHES if to_the_end else LOG_BATCHES):
                cursor = listener.spool.cursor(self._lease_id)
                try:
                    read = functools.partial(
                        listener.runner.read_logs, self._run, cursor, LOG_BYTES, ended=to_the_end
                    )
                    batch = await listener.blocking(read)
                except RunnerError as error:
                    listener.say(f"output: {error}")
                    return
                if batch.lines or batch.cursor != cursor:
                    listener.spool.add(self._lease_id, batch.lines, batch.cursor)
                if not batch.more:
                    break
            self._logs_after_s = time.monotonic() + LOG_SHARE * (time.monotonic() - began)
            states: tuple[OutputLine, ...] = ()
            if not to_the_end:
                states = await listener.blocking(listener.runner.unfinished_lines, self._run)
            listener.unfinished_lines(self._lease_id, states)

    async def _measure_usage(self, status: RunStatus) -> None:
        """Have it measured what the run uses, now and then, and once more at its end."""
        if time.monotonic() < self._usage_after_s and status.state == "running":
            return
        began = time.monotonic()
        try:
            measure = await self._listener.blocking(self._listener.runner.measure, self._run)
        except RunnerError as error:
            self._listener.say(f"usage: {error}")
            measure = None
        took_s = time.monotonic() - began
        self._usage_after_s = time.monotonic() + max(USAGE_EVERY_S, WALK_SHARE * took_s)
        if measure is not None:
            self._listener.post(events.Measured(self._lease_id, measure))

    async def _tell_saved_file(self) -> None:
        """Tell which file the job seems to save its state to, while no checkpoint of it is found:
        its renter is warned then."""
        record = self._workspace.record
        quiet = record.job.checkpoints or self._look.by_protocol or self._reported_steps
        interval_s = cadence.interval(record).ms / 1000
        ran_s = record.cum_device_ms / 1000 / max(1, record.devices)
        now = time.monotonic()
        if quiet or ran_s < interval_s or now < self._saved_after_s:
            return
        try:
            path = await self._workspace.saved_file(self._listener.reader)
        except (FolderBusy, FolderRefused):
            return  # a guess that can be done without; what is wrong is told by other looks
        finally:
            took_s = time.monotonic() - now
            self._saved_after_s = time.monotonic() + max(SAVED_EVERY_S, WALK_SHARE * took_s)
        if path and path != self._saved_file:
            self._saved_file = path
            self._listener.post(events.FileSaved(self._lease_id, path))

    async def _tell_opened(self) -> None:
        """Tell, now and then, whether what was restored has been opened; once it was, no more."""
        if self._opened or time.monotonic() < self._opened_after_s:
            return
        self._opened_after_s = time.monotonic() + OPENED_EVERY_S
        opened = await self._listener.blocking(self._workspace.opened, self._look)
        if opened is not None and opened is not self._opened:
            self._opened = opened
            self._listener.post(events.CheckpointOpened(self._lease_id, opened))

    def _tell_progress(self, progress: Progress | None) -> None:
        if progress is None or progress == self._reported_progress:
            return
        self._reported_progress = progress
        step, total, metrics = progress
        self._listener.post(events.Progressed(self._lease_id, step, total, metrics))

    def _check_free_disk(self, status: RunStatus) -> None:
        """Tell that the disk is full, unless the run has come to its good end with it."""
        free = shutil.disk_usage(self._workspace.state).free
        if free < LEAST_FREE_BYTES and not (status.state == "exited" and status.exit_code == 0):
            says = f"{free} bytes are free on this machine"
            self._listener.post(events.DiskFull(self._lease_id, says))


def evidence_of(status: RunStatus) -> ExitEvidence:
    """Return what the runner saw of an end, as it is judged."""
    return ExitEvidence(
        exit_code=status.exit_code,
        returned=status.returned,
        signal=status.signal,
        worker_signal=status.worker_signal,
        out_of_memory=status.oom_killed,
        limit_exceeded=status.limit_exceeded,
        engine_stopped=status.engine_stopped,
        outside_signal=status.outside_signal,
        unknown_signal=status.unknown_signal,
    )
