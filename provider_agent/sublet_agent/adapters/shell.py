"""Brings the core to life: commits each step, then performs its effects; watches the runs.

All of the core runs on the event loop's thread; what blocks (runner, transfer, hashing) runs in
threads and comes back as an event. So does the journal (journal_writer.py): a step's effects wait
for it to be on disk, in the steps' order, and the loop waits for nothing.

An error that nobody had thought of, in whatever is done for one run, quarantines that run: it ends,
its folder is kept, and the owner is asked to report the line. What can end the agent is its own
state: a journal or a spool that can't be written.
"""

import asyncio
import functools
import gc
import math
import shutil
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx

from sublet_agent.adapters.run_observer import Observer
from sublet_agent.adapters.session.journal import Journal, Rows, rows_of, unwritable
from sublet_agent.adapters.session.journal_writer import JournalWriter
from sublet_agent.adapters.session.link import Link
from sublet_agent.adapters.session.log_sender import LogSender
from sublet_agent.adapters.session.log_spool import Spool
from sublet_agent.adapters.watchdog.deadline_files import DeadlineFiles
from sublet_agent.adapters.watchdog.watchdog import WatchdogKeeper
from sublet_agent.adapters.workspace import quarantine
from sublet_agent.adapters.workspace.disk_space import fault_of, make_room
from sublet_agent.adapters.workspace.folder_reader import FolderReader
from sublet_agent.adapters.workspace.folders import ask, delete
from sublet_agent.adapters.workspace.input_cache import InputCache
from sublet_agent.adapters.workspace.renter_caches import RenterCaches
from sublet_agent.adapters.workspace.transfer import (
    Cancelled,
    StaleEpoch,
    Transfer,
    TransferRefused,
)
from sublet_agent.adapters.workspace.upload_meter import UploadMeter
from sublet_agent.adapters.workspace.workspace import (
    CheckpointLost,
    InputLost,
    Prepared,
    Workspace,
    run_id,
)
from sublet_agent.core import effects, events
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.deadlines import Over
from sublet_agent.core.kept_images import RESERVED_BYTES
from sublet_agent.core.layout import Layout
from sublet_agent.core.records import RunRecord, UploadKind
from sublet_agent.core.run_phases import LIVE, RunPhase
from sublet_agent.core.runner_port import (
    ImageNeeds,
    ImageTrouble,
    OutputLine,
    PullCancelled,
    ResolvedImage,
    Runner,
    RunnerError,
    RunRefused,
)
from sublet_contracts.amounts import format_bytes
from sublet_contracts.documents import Checkpoint, DocumentRefused, Job, open_document
from sublet_contracts.envelope import Envelope
from sublet_contracts.image_references import can_mean, is_image_id
from sublet_contracts.keys import short
from sublet_contracts.outputs_tree import left_out_lines
from sublet_contracts.reasons import Reason
from sublet_contracts.tree import TreeIndex, TreeRefused
from sublet_contracts.versions import Reads
from sublet_contracts.wire import Message

TICK_S = 0.2
SWITCH_S = 0.0005
"""for how long a thread that computes may keep the interpreter from the event loop, which loses it
with each call of the system: Python's own is 5 ms each time"""
MOVE_LOG_S = 2.0
MOVED_EVERY_S = 1.0
"""how often it is looked how far an upload is: heartbeats tell it, which come less often"""
TIDY_S = 60.0
"""how often it is seen to that renters' images leave room"""
THREAD_NAME = "sublet-agent"
"""how the names begin of the threads in which it waits for others"""
UNEXPECTED = effects.UNEXPECTED
WATCHDOG_EVERY_S = 5.0
LOG_AFTER_REMOVAL_S = 300.0
REMOVE_AGAIN_S = 2.0
REMOVE_AGAIN_MOST_S = 60.0
MAX_TRACE_CHARACTERS = 20_000
SAY_AGAIN_S = 60.0
T = TypeVar("T")


def put_the_loop_first() -> None:
    """Have nothing of this process hold up the event loop for long. Once all is loaded.

    What is loaded by then stays: the collector would go through 80,000 objects of it again and
    again, which holds every thread, on a busy machine for a third of a second (measured).
    """
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()


class Shell:
    """One running agent."""

    def __init__(
        self,
        *,
        state: Path,
        core: AgentCore,
        journal: Journal,
        spool: Spool,
        runner: Runner,
        transfer: Transfer,
        helper: Path,
        now_ms: Callable[[], int],
        say: Callable[[str], None],
        watchdog: WatchdogKeeper | None = None,
        caches: RenterCaches | None = None,
        inputs: InputCache | None = None,
    ) -> None:
        self.state = state
        self.core = core
        self.journal = journal
        self.writer = JournalWriter(journal, self._can_not_write)
        self.spool = spool
        self.runner = runner
        self.transfer = transfer
        self.helper = helper
        self.deadlines = DeadlineFiles(state)
        self.watchdog = watchdog
        self.caches = caches or RenterCaches(state, 0)
        self.inputs = inputs or InputCache(state, 0, links=False)
        self.now_ms = now_ms
        self.say = say
        self.link: Link | None = None
        self.look_now: Callable[[], None] = lambda: None
        """has the machine looked at"""
        self.done = asyncio.Event()
        self.knows_broker = asyncio.Event()
        self.failed: BaseException | None = None
        self.images: dict[str, ResolvedImage] = {}
        """by lease, and by job where it is prepared ahead"""
        self._wanted_images: dict[str, str] = {}
        self._tidied_s = self._moved_log_s = time.monotonic()
        self.reader = FolderReader()
        self._threads = ThreadPoolExecutor(16, thread_name_prefix=THREAD_NAME)
        self._movers = ThreadPoolExecutor(32, thread_name_prefix=f"{THREAD_NAME}-moving")
        self._cancels: dict[str, threading.Event] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._observers: dict[str, Observer] = {}
        self._traces: dict[str, str] = {}
        """lease id -> the traceback of what it is quarantined for"""
        self._said_s: dict[str, float] = {}
        self._logs = LogSender(spool, core, lambda: self.link)
        core.last_saved = self.writer.last_record

    # -- the loop ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what was running before: adopt it, and remove what nobody knows."""
        try:
            found = await self.blocking(self.runner.find)
        except Exception as error:  # noqa: BLE001 - each run is looked at by itself as well
            self._unexpected("what runs here", error)
            found = []
        by_run = {run_id(lease_id): lease_id for lease_id in self.core.runs}
        self.deadlines.forget_notes(set(by_run))
        adopted = [by_run.get(item.run_id, item.lease_id) for item in found]
        step, _ = self.core.started(adopted, self.now_ms())
        for item in found:
            if item.run_id not in by_run:
                self.say(f"removing a run that belongs to no lease: {item.run_id}")
                await self._tried("a run of no lease", self.runner.remove, item.run_id)
        for lease_id, record_text in self.journal.unreadable.items():
            says = "its saved record can't be read: it is put aside, and the broker will miss it"
            self.say(f"{UNEXPECTED}: lease {short(lease_id)}: {says}")
            keep = functools.partial(quarantine.keep, record=record_text, error=says)
            await self._tried("a record that can't be read", keep, self.state, lease_id)
            self.journal.forget(lease_id)
        # What was fetched ahead is cheap to fetch again, and nobody would tell us to drop it.
        ahead = self.state / "prepared"
        await self.blocking(functools.partial(shutil.rmtree, ahead, ignore_errors=True))
        kept = {lease_id[:16] for lease_id in self.core.runs}
        for folder in self._folders():
            if folder.name not in kept:
                await self._tried(f"the folder {folder}", delete, folder)
        for lease_id, run in self.core.runs.items():
            if run.record.phase in LIVE:
                self.watch(lease_id)
        self._perform(step)

    def _folders(self) -> list[Path]:
        runs = self.state / "runs"
        return list(runs.iterdir()) if runs.is_dir() else []

    async def _tried(self, what: str, call: Callable[..., object], *arguments: Any) -> None:
        """Do what the agent can start without."""
        try:
            await self.blocking(call, *arguments)
        except (RunnerError, OSError) as error:
            self.say(f"{what}: {error}")
        except Exception as error:  # noqa: BLE001 - no run of before keeps the agent from starting
            self._unexpected(what, error)

    async def ticking(self) -> None:
        """Time passes, until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self.journal.reserve.hold()
                if self.now_ms() >= self.core.quiet_until_ms():
                    self.post(events.Tick())
                self._logs.pump()
                if time.monotonic() - self._moved_log_s >= MOVE_LOG_S:
                    self._moved_log_s = time.monotonic()
                    self._spawn("log", "", self._act(self.spool.move_log))
                if time.monotonic() - self._tidied_s >= TIDY_S:
                    self._tidied_s = time.monotonic()
                    self._spawn("images", "", self._tidy_images())
                    self._spawn("tidy caches", "", self._tidy_caches())
            except Exception as error:
                if self.failed is not None or _own_state_is_broken(error):
                    raise
                self._unexpected("the time", error)

    def post(self, event: events.Event) -> None:
        """Let the core take an event. What it leads to is committed, and then performed: perhaps
        after this returns."""
        if self.failed is not None:
            return
        if isinstance(event, events.Observed) and not event.running:
            over = self.deadlines.passed(run_id(event.lease_id))
            if over is not None:
                self._perform(
                    self.core.handle(events.DeadlinePassed(event.lease_id, over), self.now_ms())
                )
        step = self.core.handle(event, self.now_ms())
        self._perform(step, event.message if isinstance(event, events.MessageArrived) else event)

    def _perform(self, step: effects.Step, event: object = None) -> None:
        try:
            step, rows = self._as_rows(step)
        except Exception as error:
            self._can_not_write(error)
            raise
        self.writer.write(rows, functools.partial(self._do_all, step), event)

    def _can_not_write(self, error: BaseException) -> None:
        """What can't be written must not be done: stop here, and a restart takes it up."""
        self.failed = error
        self.done.set()

    def _do_all(self, step: effects.Step) -> None:
        """Do what a step asks for, which is on disk."""
        if step.save.queue and self.link is not None:
            self.link.outbox_grew()
        for effect in step.effects:
            try:
                self._do(effect)
            except Exception as error:  # noqa: BLE001 - the other effects are other runs'
                self._trouble(type(effect).__name__, getattr(effect, "lease_id", ""), error)

    def _as_rows(self, step: effects.Step) -> tuple[effects.Step, Rows]:
        """Return what is to be written; where one run has what can't be written down by anybody,
        without that run."""
        try:
            return step, rows_of(step.save)
        except Exception as error:
            found = {id: says for id, says in unwritable(step.save).items() if id in self.core.runs}
            if not found:
                raise
            for lease_id, says in found.items():
                self._traces[lease_id] = _trace(error)
                step = self.core.put_aside(step, lease_id, says, self.now_ms())
            return step, rows_of(step.save)

    # -- Listener of the link ----------------------------------------------------------------------

    def joined(self, broker: str, broker_ahead_ms: int, broker_reads: Reads) -> None:
        """The session is live."""
        self.say("connected")
        self._logs.begin_session()
        self.post(events.Joined(broker, broker_ahead_ms, broker_reads))
        self.knows_broker.set()

    def arrived(self, message: Message) -> None:
        """A message is to be taken; once `written` has returned it is on disk. Raises what the
        journal raised last: while this agent comes to its end, nothing may be acknowledged that it
        didn't take."""
        if self.failed is not None:
            raise self.failed
        self.post(events.MessageArrived(message))

    async def written(self) -> None:
        """Return once all is on disk that was taken so far. Raises what the journal raised."""
        await self.writer.written()

    def disconnected(self) -> None:
        """The session is over. When this agent ends that is no news."""
        if self.core.live and not self.done.is_set():
            self.post(events.Disconnected())

    # -- effects -----------------------------------------------------------------------------------

    def _do(self, effect: effects.Effect) -> None:
        match effect:
            case effects.Send(message):
                if self.link is not None:
                    self.link.send(message)
            case effects.Say(text):
                self.say(text)
            case effects.Unexpected(lease_id, text):
                about = f"lease {short(lease_id)}: " if lease_id else ""
                self._say_once(f"{UNEXPECTED}: {about}{text}")
            case effects.Done():
                self.done.set()
            case effects.ReadFacts():
                self.look_now()
            case effects.StartTest(device_ids):
                self._spawn("test", "", self._start_test(device_ids))
            case effects.LookUpImage(lease_id, image):
                self._spawn("look up", lease_id, self._look_up_image(lease_id, image))
            case effects.Pull(lease_id):
                self._spawn("prepare", lease_id, self._pull(lease_id))
            case effects.Restore(lease_id):
                self._spawn("prepare", lease_id, self._restore(lease_id))
            case effects.Start(lease_id):
                self._spawn("prepare", lease_id, self._start(lease_id))
            case effects.AskStop(lease_id):
                self._snapshot_due(lease_id)
                self._spawn("stop", lease_id, self._runner_call(self.runner.stop, lease_id))
            case effects.AskSave(lease_id):
                self._spawn("save", lease_id, self._ask_save(lease_id))
            case effects.Kill(lease_id):
                self._cancel_preparation(lease_id)
                self._spawn("kill", lease_id, self._runner_call(self.runner.kill, lease_id))
            case effects.ScanFolder(lease_id):
                self._spawn("final", lease_id, self._scan_folder(lease_id))
            case effects.Upload(lease_id, kind, step):
                name = f"upload {kind} {step}"
                self._spawn(name, lease_id, self._upload(effect))
            case effects.AckStep(lease_id, step):
                self._spawn(
                    f"ack {step}",
                    lease_id,
                    self._act(functools.partial(self._workspace(lease_id).acknowledge, step)),
                )
            case effects.DeleteSteps(lease_id, steps):
                self._spawn(
                    f"tidy {steps[-1:]}",
                    lease_id,
                    self._act(functools.partial(self._workspace(lease_id).delete_steps, steps)),
                )
            case effects.RenewDeadline(lease_id, in_ms, over):
                self._spawn("deadline", lease_id, self._renew_deadline(lease_id, in_ms, over))
            case effects.Remove(lease_id):
                self._spawn("remove", lease_id, self._remove(lease_id))
            case effects.PutAside(lease_id):
                self._spawn("put aside", lease_id, self._put_aside(lease_id))
            case effects.PrepareJob(job, checkpoint, image):
                self._spawn("ahead", job.id, self._prepare(job, checkpoint, image))
            case effects.UnprepareJob(job_id):
                self._cancel(job_id).set()
                self._spawn("unprepare", job_id, self._unprepare(job_id))
            case effects.SendLogs(lease_id, next_number):
                self._logs.wanted(lease_id, next_number)
            case effects.AddLogLine(lease_id, text):
                self.log_line(lease_id, text)
                # Now, so that it is there before the run's end is told.
                self._logs.pump()

    def _spawn(self, name: str, owner: str, work: Coroutine[Any, Any, None]) -> None:
        key = (name, owner)
        before = self._tasks.get(key)
        if before is not None and not before.done() and name not in ("prepare", "stop"):
            work.close()
            return
        task = asyncio.create_task(work, name=f"{name} {owner[:10]}")
        self._tasks[key] = task
        task.add_done_callback(functools.partial(self._ended, key))

    def _ended(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._trouble(*key, error)

    # -- what nobody had thought of ----------------------------------------------------------------

    def _trouble(self, what: str, owner: str, error: BaseException) -> None:
        """Something that is done for `owner`, a lease or a job, has raised."""
        if self.failed is not None:
            return
        if not isinstance(error, Exception) or _own_state_is_broken(error):
            self.failed = error
            self.done.set()
            return
        self._cancels.pop(owner, threading.Event()).set()
        if owner in self.core.runs and what not in ("put aside", "remove"):
            self._traces[owner] = _trace(error)
            says = f"{what}: {type(error).__name__}: {error}"
            try:
                self.post(events.Quarantined(owner, says))
            except Exception as again:  # noqa: BLE001 - `post` has said that the agent ends
                self._unexpected(what, again)
            return
        self._unexpected(f"{what} of {owner[:10]}", error)
        if what == "ahead":
            self.post(events.PrepareDone(owner, False, "an unexpected error"))
        elif what == "remove":
            # Its lease is over. What is left of it is removed by the next start.
            self.post(events.Removed(owner))

    def _unexpected(self, what: str, error: Exception) -> None:
        self._say_once(f"{UNEXPECTED}: {what}: {type(error).__name__}: {error}", _trace(error))

    def _say_once(self, line: str, more: str = "") -> None:
        """Say what may come round five times a second, once in a while."""
        now = time.monotonic()
        if now - self._said_s.get(line, -SAY_AGAIN_S) < SAY_AGAIN_S:
            return
        if len(self._said_s) > 1000:
            self._said_s.clear()
        self._said_s[line] = now
        self.say(line)
        if more:
            self.say(more)

    async def _put_aside(self, lease_id: str) -> None:
        """End a quarantined run's container; keep its folder, and tell the owner where."""
        record = self._record(lease_id)
        if record is None:
            return
        self._cancel(lease_id).set()
        observer = self._observers.pop(lease_id, None)
        if observer:
            observer.stop()
        self.log_line(lease_id, record.detail)
        await self._runner_call(self.runner.kill, lease_id)
        await self._remove_container(lease_id)
        error = "\n".join((record.quarantined, self._traces.pop(lease_id, "")))
        keep = functools.partial(
            quarantine.keep, record=record.model_dump_json(indent=1), error=error
        )
        try:
            place = await self.blocking(keep, self.state, lease_id)
        except OSError as problem:
            self.say(f"lease {short(lease_id)} can't be put aside: {problem}")
        else:
            self.say(
                f"lease {short(lease_id)} was put aside; what is known of it lies in {place}: "
                f"please send it along with the line above that begins with {UNEXPECTED!r}"
            )

    async def _renew_deadline(self, lease_id: str, in_ms: int, over: Over) -> None:
        try:
            await self.blocking(self.deadlines.renew, run_id(lease_id), in_ms, over)
        except OSError as error:
            self.say(f"lease {short(lease_id)}: its deadline can't be written: {error.strerror}")

    async def _deadline_stands(self, lease_id: str) -> None:
        """Wait until no deadline of a run is being written."""
        renewing = self._tasks.get(("deadline", lease_id))
        if renewing is not None:
            await asyncio.wait([renewing])

    async def keep_watchdog(self) -> None:
        """See that the watchdog is there while anything runs, until cancelled."""
        while True:
            if any(run.record.phase in LIVE for run in self.core.runs.values()):
                await self._ensure_watchdog()
            await asyncio.sleep(WATCHDOG_EVERY_S)

    async def _ensure_watchdog(self) -> None:
        if self.watchdog is None:
            return
        try:
            await self.blocking(self.watchdog.ensure)
        except OSError as error:
            self.say(f"runs have no watchdog until it can be started: {error}")

    async def _remove_container(self, lease_id: str) -> None:
        """Kill and remove it, however often it takes: no container outlives its lease."""
        delay_s = REMOVE_AGAIN_S
        await self._deadline_stands(lease_id)
        while True:
            try:
                await self.blocking(self.runner.remove, run_id(lease_id))
                self.deadlines.forget(run_id(lease_id))
                return
            except RunnerError as error:
                self.say(f"can't remove a run yet: {error}")
            except Exception as error:  # noqa: BLE001 - it is tried again
                self._unexpected(f"removing the run of lease {short(lease_id)}", error)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, REMOVE_AGAIN_MOST_S)

    # -- threads -----------------------------------------------------------------------------------

    async def blocking(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run something that blocks in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, call, *arguments)

    async def moving(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run what moves bytes to or from the broker, which may be away for hours: in threads of
        its own, or runs could neither be looked at nor stopped meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._movers, call, *arguments)

    async def _act(self, act: Callable[[], object]) -> None:
        try:
            await self.blocking(act)
        except OSError as error:
            self.say(f"a run's folder: {error}")

    async def _runner_call(self, call: Callable[[str], None], lease_id: str) -> None:
        try:
            await self.blocking(call, run_id(lease_id))
        except RunnerError as error:
            self.say(f"runner: {error}" + (f" ({error.raw})" if error.raw else ""))
        observer = self._observers.get(lease_id)
        if observer:
            observer.look_soon()

    def _record(self, lease_id: str) -> RunRecord | None:
        run = self.core.runs.get(lease_id)
        return run.record if run else None

    def _workspace(self, lease_id: str) -> Workspace:
        return Workspace(self.state, self.core.runs[lease_id].record)

    def _cancel(self, owner: str) -> threading.Event:
        return self._cancels.setdefault(owner, threading.Event())

    def _cancel_preparation(self, lease_id: str) -> None:
        record = self._record(lease_id)
        if record is not None and record.is_over and record.started_ms is None:
            self._cancel(lease_id).set()

    # -- preparing and starting --------------------------------------------------------------------

    async def _pull(self, lease_id: str) -> None:
        record = self._record(lease_id)
        if record is None:
            return
        try:
            found = await self._ensure_image(lease_id, record.image or record.job.image)
        except PullCancelled:
            return
        except ImageTrouble as error:
            self._image_failed(lease_id, error)
        except RunnerError as error:
            self._failed(lease_id, Reason.START_FAILED, error)
        else:
            is_id = is_image_id(record.image)
            image = found.image_id if is_id else found.digest or ""
            self.post(events.ImageReady(lease_id, image))

    async def _look_up_image(self, lease_id: str, image: str) -> None:
        """Find out what a tag means, for a lease that is not signed yet."""
        reason: Reason | None = None
        try:
            found = await self.moving(self.runner.look_up_image, image)
        except RunnerError as error:
            if isinstance(error, ImageTrouble):
                reason = fault_of(error, error.reason)
            self.say(f"{error}" + (f" (the engine said: {error.raw})" if error.raw else ""))
            self.post(events.LookUpFailed(lease_id, reason, str(error)[:256]))
        else:
            self.post(events.ImageLookedUp(lease_id, found))

    async def _ensure_image(self, owner: str, image: str) -> ResolvedImage:
        """Have the image of a lease, or of a job that is prepared. Raises RunnerError."""
        pinned = self.core.terms.image_policy == "digest"
        policy: Literal["digest", "any"] = "digest" if pinned else "any"
        loop = asyncio.get_running_loop()
        self._wanted_images[owner] = image

        def tell(text: str) -> None:
            self.say(text)
            if owner in self.core.runs:
                self.log_line(owner, text)
                self._logs.pump()

        def progress(text: str) -> None:
            loop.call_soon_threadsafe(tell, text)

        await self._tidy_images()
        cancel = self._cancel(owner)
        call = functools.partial(self.runner.ensure_image, image, progress, policy, cancel)
        found = self.images[owner] = await self.blocking(call)
        await self._tidy_images()
        return found

    def _renters_here(self) -> list[str]:
        # From another thread: of a copy, which is made in one go.
        runs = list(self.core.runs.values())
        return [run.record.job.renter for run in runs if not run.record.is_over]

    def forget_caches(self) -> None:
        """Delete what is kept for renters' next runs, and their caches that no run uses."""
        self._spawn("caches", "", self._forget_caches())

    async def _forget_caches(self) -> None:
        count, held = await self.blocking(self.caches.forget, self._renters_here)
        what = "renter's cache" if count == 1 else "renters' caches"
        self.say(f"deleted {count} {what} ({format_bytes(held)}); those of runs here stay")
        count, held = await self.blocking(self.inputs.forget)
        what = "input" if count == 1 else "inputs"
        self.say(f"deleted {count} {what} that were kept ({format_bytes(held)})")

    async def _tidy_caches(self) -> None:
        for line in await self.blocking(self.caches.tidy, self._renters_here):
            self.say(line)
        short = self._unwritten_bytes() + RESERVED_BYTES - shutil.disk_usage(self.state).free
        for line in await self.blocking(self.inputs.tidy, max(0, short)):
            self.say(line)

    def _reserved_bytes(self) -> int:
        runs = self.core.runs.values()
        return sum(r.record.job.resources.disk_bytes for r in runs if not r.record.is_over)

    def _unwritten_bytes(self) -> int:
        """What runs may still write of what they asked for."""
        return max(0, self._reserved_bytes() - sum(self.core.disk_used.values()))

    async def _tidy_images(self) -> None:
        """Let go of renters' images that nothing needs, where room is short."""
        records = [run.record for run in self.core.runs.values() if not run.record.is_over]
        needs = ImageNeeds(
            in_use=frozenset(
                [
                    *(record.image or record.job.image for record in records),
                    *self._wanted_images.values(),
                    *(image.image_id for image in self.images.values()),
                ]
            ),
            offered_bytes=self.core.terms.asked_disk_bytes,
            reserved_bytes=self._reserved_bytes(),
            unwritten_bytes=self._unwritten_bytes(),
        )
        try:
            for line in await self.blocking(self.runner.tidy_images, needs):
                self.say(line)
        except RunnerError as error:
            self.say(f"images: {error}")

    def _forget_image(self, owner: str) -> None:
        self.images.pop(owner, None)
        self._wanted_images.pop(owner, None)

    def _image_failed(self, lease_id: str, error: ImageTrouble) -> None:
        self._failed(lease_id, fault_of(error, error.reason), error)

    async def _restore(self, lease_id: str) -> None:
        if lease_id not in self.core.runs:
            return
        workspace, cancel = self._workspace(lease_id), self._cancel(lease_id)
        record = workspace.record
        try:
            if not Prepared(self.state, record.job_id).root.is_dir():
                await self._make_room(record.job, record.checkpoint)
            image = await self._image_of(lease_id)
            spec = workspace.spec(image, self.helper)
            cache = await self.blocking(self.caches.folder_of, record.job.renter)
            spec = replace(spec, cache_dir=cache)

            def furnish() -> Layout:
                return self.caches.noted(self.runner.furnish(spec, cancel), cache)

            restore = functools.partial(workspace.restore, reads_show=self.runner.name == "process")
            await self.moving(restore, self.transfer, self.inputs, cancel, furnish)
        except (Cancelled, PullCancelled):
            return
        except ImageTrouble as error:
            self._image_failed(lease_id, error)
        except RunRefused as error:
            self._failed(lease_id, Reason.JOB_FAILED, error)
        except RunnerError as error:
            self._failed(lease_id, fault_of(error), error)
        except StaleEpoch as error:
            self.post(events.UploadFailed(lease_id, "checkpoint", 0, str(error), stale=True))
        except InputLost as error:
            self._failed(lease_id, Reason.INPUT_UNAVAILABLE, error)
        except (CheckpointLost, TransferRefused) as error:
            self._failed(lease_id, Reason.RESTORE_FAILED, error)
        except OSError as error:
            # First of all, or the journal finds no room to tell it.
            await self.blocking(workspace.delete)
            self._failed(lease_id, fault_of(error), error)
        else:
            for note in workspace.layout.notes:
                self.log_line(lease_id, note)
            self.post(events.Restored(lease_id))

    async def _make_room(self, job: Job, checkpoint: Checkpoint | None) -> None:
        await self.blocking(make_room, self.state, job, checkpoint, self.inputs.tidy)

    async def _image_of(self, lease_id: str) -> ResolvedImage:
        """Return the image of a lease, which is here already; unless the agent was started anew."""
        image = self.images.get(lease_id)
        if image is None:
            record = self.core.runs[lease_id].record
            image = await self._ensure_image(lease_id, record.image or record.job.image)
        return image

    async def _start(self, lease_id: str) -> None:
        record = self._record(lease_id)
        if record is None or record.is_over:
            return
        try:
            if not await self._is_placed(record):
                return
            image = await self._image_of(lease_id)
            spec = self._workspace(lease_id).spec(image, self.helper)
            await self._deadline_stands(lease_id)
            await self._ensure_watchdog()
            if record.stop is not None and await self._is_not_started(lease_id):
                self.post(events.PreparationFailed(lease_id, record.stop.reason, ""))
                return
            await self.blocking(self.runner.start, spec)
        except PullCancelled:
            return
        except ImageTrouble as error:
            self._image_failed(lease_id, error)
        except RunRefused as error:
            # The job's own fault: no machine may start it like this.
            self._failed(lease_id, Reason.JOB_FAILED, error)
        except (RunnerError, OSError) as error:
            self._failed(lease_id, fault_of(error), error)
        else:
            if lease_id in self.core.runs:
                self.watch(lease_id)
            else:
                # Its lease ended and was cleared away while it started.
                await self._runner_call(self.runner.remove, lease_id)

    async def _is_placed(self, record: RunRecord) -> bool:
        """See to it that its folders are what was placed. Where the machine was started anew since,
        nobody knows; so unless it has run there already, they are placed once more."""
        here = self.core.boot
        again = record.phase is RunPhase.STARTING and record.boot != here
        if again and await self._is_not_started(record.lease_id):
            await self._restore(record.lease_id)
            return record.boot == here and not record.is_over
        return True

    async def _is_not_started(self, lease_id: str) -> bool:
        """Whether there is nothing yet that could be asked to stop: then it need not start."""
        status = await self.blocking(self.runner.status, run_id(lease_id))
        return status.state in ("gone", "created")

    def _failed(self, lease_id: str, reason: Reason, error: Exception) -> None:
        raw = getattr(error, "raw", "")
        self.say(f"{reason}: {error}" + (f" (the engine said: {raw})" if raw else ""))
        self.log_line(lease_id, f"{reason}: {error}")
        self._logs.pump()
        self.post(events.PreparationFailed(lease_id, reason, str(error)[:2048]))

    def watch(self, lease_id: str) -> None:
        """Observe a run until it is over."""
        if lease_id not in self._observers:
            self._observers[lease_id] = Observer(self, lease_id, self._workspace(lease_id))
            self._spawn("watch", lease_id, self._observers[lease_id].run())

    def forget_observer(self, lease_id: str) -> None:
        """The run is over."""
        self._observers.pop(lease_id, None)

    async def _ask_save(self, lease_id: str) -> None:
        self._snapshot_due(lease_id)
        folder = self._workspace(lease_id).checkpoint
        await self._act(functools.partial(ask, folder, "SAVE"))

    def _snapshot_due(self, lease_id: str) -> None:
        observer = self._observers.get(lease_id)
        if observer:
            observer.save_asked()

    async def _start_test(self, device_ids: tuple[str, ...]) -> None:
        folder = self.state / "start-test"
        try:
            await self.blocking(self.runner.start_test, folder, device_ids)
        except (RunnerError, OSError) as error:
            self.post(events.StartTested(str(error)[:2048] or type(error).__name__))
        else:
            self.post(events.StartTested(""))
        await self._act(functools.partial(delete, folder))

    # -- out ---------------------------------------------------------------------------------------

    async def _scan_folder(self, lease_id: str) -> None:
        """Bring the log's end to the broker first: afterwards the lease may be gone any moment."""
        if lease_id not in self.core.runs:
            return
        workspace = self._workspace(lease_id)
        observer = self._observers.get(lease_id) or Observer(self, lease_id, workspace)
        scanned = await observer.final_look()
        self.spool.add_dropped_line(lease_id, self.now_ms())
        record = self._record(lease_id)
        # A successor waits for a run that was stopped: its log gets less time than another.
        limit_s = 2.0 if record is not None and record.stop else 30.0
        await self._logs.drain(lease_id, limit_s)
        self.post(scanned)

    async def _upload(self, effect: effects.Upload) -> None:
        lease_id, kind, step = effect.lease_id, effect.kind, effect.step
        record = self._record(lease_id)
        if record is None:
            return
        workspace, cancel = self._workspace(lease_id), self._cancel(lease_id)
        meter = UploadMeter()

        def on_bytes(_size: int) -> None:
            if cancel.is_set():
                raise Cancelled("reading a folder")

        def left_s() -> float:
            return (effect.until_ms - self.now_ms()) / 1000 if effect.until_ms else math.inf

        def work() -> tuple[str, TreeIndex]:
            if kind == "checkpoint":
                meter.begins(workspace.checkpoint_bytes(step))
                read = functools.partial(workspace.scan_checkpoint, step)
                return self.transfer.upload(record.job_id, record.lease.epoch, read, cancel, meter)
            tree = workspace.scan_outputs(on_bytes, left_s)
            if effect.until_ms and not tree.index.files:
                return "", tree.index
            return self.transfer.upload_outputs(
                record.job_id, record.lease.epoch, tree, cancel, left_s, meter
            )

        telling = asyncio.create_task(self._tell_moved(lease_id, kind, step, meter))
        try:
            index_digest, index = await self.moving(work)
        except Cancelled:
            return
        except StaleEpoch as error:
            self.say(f"{error}: stopping the run")
            self.post(events.UploadFailed(lease_id, kind, step, str(error), stale=True))
        except (TreeRefused, TransferRefused, OSError) as error:
            self.post(events.UploadFailed(lease_id, kind, step, str(error)))
        else:
            for line in left_out_lines(index):
                self.log_line(lease_id, f"left out of the outputs: {line}")
            self._logs.pump()
            if workspace.stall is not None:
                self.post(events.StallTold(lease_id, workspace.stall))
            if index_digest:
                total, sent = index.total_bytes, meter.sent_bytes
                stall_ms = workspace.stall.stall_ms if workspace.stall is not None else None
                self.post(
                    events.Uploaded(lease_id, kind, step, index_digest, total, sent, stall_ms)
                )
            else:
                self.post(events.UploadFailed(lease_id, kind, step, "", nothing=True))
        finally:
            telling.cancel()

    async def _tell_moved(
        self, lease_id: str, kind: UploadKind, step: int, meter: UploadMeter
    ) -> None:
        """Tell how far an upload is, until cancelled."""
        while True:
            moved = meter.moved
            if moved is not None:
                self.post(events.UploadMoved(lease_id, kind, step, moved))
            await asyncio.sleep(MOVED_EVERY_S)

    async def _remove(self, lease_id: str) -> None:
        self._cancel(lease_id).set()
        observer = self._observers.pop(lease_id, None)
        if observer:
            observer.stop()
        workspace = self._workspace(lease_id)
        aside = self._tasks.get(("put aside", lease_id))
        if aside is not None:
            await asyncio.wait([aside])
        await self._remove_container(lease_id)
        if not await self.blocking(workspace.delete):
            self.say(f"not all of {workspace.root} could be deleted: the next start tries again")
        # What was said last, such as why a checkpoint is left out, may still be under way. The
        # device is free by now, so this may take its time; the broker refuses what it doesn't want.
        await self._logs.drain(lease_id, LOG_AFTER_REMOVAL_S)
        self.spool.forget(lease_id)
        self._cancels.pop(lease_id, None)
        self._traces.pop(lease_id, None)
        self._forget_image(lease_id)
        self.post(events.Removed(lease_id))

    # -- preparing ahead ---------------------------------------------------------------------------

    async def _prepare(self, envelope: Envelope, checkpoint: Envelope | None, image: str) -> None:
        job_id = envelope.id
        self._cancels.pop(job_id, None)
        cancel = self._cancel(job_id)
        try:
            job = open_document(envelope, Job).document
            found = open_document(checkpoint, Checkpoint).document if checkpoint else None
            if found is not None and found.job != job_id:
                raise DocumentRefused("the checkpoint is another job's", "checkpoint.job")
            if image and not can_mean(job.image, image):
                raise DocumentRefused(f"{image} is not what the job can have meant", "image")
            await self._make_room(job, found)
            await self._ensure_image(job_id, image or job.image)
            prepared = Prepared(self.state, job_id)
            fetch = functools.partial(prepared.fetch, self.transfer, self.inputs)
            await self.moving(fetch, job_id, job, found, cancel)
        except (Cancelled, PullCancelled):
            return
        except (
            DocumentRefused,
            RunnerError,
            TransferRefused,
            InputLost,
            CheckpointLost,
            OSError,
            httpx.HTTPError,
        ) as error:
            self.post(events.PrepareDone(job_id, False, str(error)))
        else:
            self.post(events.PrepareDone(job_id, True))

    async def _unprepare(self, job_id: str) -> None:
        self._forget_image(job_id)
        await self._act(Prepared(self.state, job_id).delete)

    def log_line(self, lease_id: str, text: str) -> None:
        """Put a line of ours into a run's log."""
        shown = text.encode(errors="backslashreplace").decode()
        self.spool.add(lease_id, [OutputLine("sublet", self.now_ms(), shown)], None)

    def unfinished_lines(self, lease_id: str, lines: tuple[OutputLine, ...]) -> None:
        """Tell how the lines stand that a run has not ended."""
        self._logs.unfinished(lease_id, lines)

    def close(self) -> None:
        """Stop threads; runs go on."""
        for cancel in self._cancels.values():
            cancel.set()
        self.reader.close()
        self.writer.close()
        for threads in (self._threads, self._movers):
            threads.shutdown(wait=False, cancel_futures=True)


def _own_state_is_broken(error: BaseException) -> bool:
    """Whether it tells of the agent's own files: nothing can be promised that can't be kept."""
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-MAX_TRACE_CHARACTERS:]
