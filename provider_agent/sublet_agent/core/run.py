"""One run: how a lease goes from signed to settled. Which phase follows is in run_phases.py, and
every change of phase goes through that table; here is what is done on the way. Rules:

1. The record changes first, is saved, and only then effects happen; every effect can be repeated,
   so `resume` after a kill -9 is: look at the phase, do its effect again.
2. Metering never goes back: the runner's clock counts from the container's start to its exit. What
   came before the start counts from a stated minute on (metering.py).
3. Whatever ends a run, its end is told once: `exited` with a reason and the final receipt are
   saved together, after checkpoint and outputs are at the broker. What a run has written that did
   not finish comes as partial outputs, for a while (partial_outputs.py).
4. An unexpected error ends the run: its last saved record is ended as quarantined, and what it was
   asked for before stands all the same.
5. A stop only hardens. After a drain the last checkpoint is uploaded and its verdict awaited (a
   while), because durable work is paid work and the successor starts from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from sublet_agent.core import cadence, checkpoints, metering, partial_outputs, receipts
from sublet_agent.core import effects as do
from sublet_agent.core.deadlines import RENEW_EVERY_MS, deadline_of, deadline_text
from sublet_agent.core.events import (
    CheckpointFound,
    CheckpointOpened,
    DeadlinePassed,
    DiskFull,
    DiskUsed,
    Event,
    FileSaved,
    FolderScanned,
    ImageReady,
    Measured,
    Observed,
    PreparationFailed,
    Progressed,
    Quarantined,
    Restored,
    RulesBroken,
    StallTold,
    Uploaded,
    UploadFailed,
    UploadMoved,
    Vanished,
)
from sublet_agent.core.exit_reasons import ExitEvidence, exit_text, reason_of_exit
from sublet_agent.core.records import AwaitingVerdict, RunRecord, Stop, Uploading
from sublet_agent.core.run_phases import (
    LATE,
    LIVE,
    RunPhase,
    Trigger,
    UnexpectedTrigger,
    next_phase,
)
from sublet_agent.core.uploads import UploadOfRun
from sublet_agent.core.usage import (
    DeviceMeasure,
    UsageOfRun,
    disk_limit_text,
    memory_limit_text,
)
from sublet_contracts.amounts import format_duration
from sublet_contracts.documents import Checkpoint, sign_document
from sublet_contracts.keys import SigningKey
from sublet_contracts.reasons import MEANINGS, Fault, Next, Reason
from sublet_contracts.rules import PULL_FREE_MS
from sublet_contracts.versions import Reads
from sublet_contracts.wire import (
    CheckpointUploaded,
    CheckpointVerdict,
    Message,
    ReceiptIssued,
    RunChanged,
    RunReport,
)

VERDICT_WAIT_MS = 20_000
KILL_AGAIN_MS = 2_000
MAX_DETAIL_CHARACTERS = 2048
QUARANTINED_TEXT = (
    "the agent met an unexpected error while it handled this run; what it left is kept there, and "
    "the machine's owner was told"
)
MAX_REFUSALS = 3
MAX_SAVED_FILE_CHARACTERS = 256
PREPARED_SAVE_MS = 30_000
UNLISTED_MS = 60_000
DEVICE_GRACE_MS = 10_000
"""for a run whose device has failed: to end by itself, and then to save what it still can"""
_PREPARING = frozenset({RunPhase.PULLING, RunPhase.RESTORING, RunPhase.STARTING})
WIRE_STATES = {
    RunPhase.PULLING: "pulling",
    RunPhase.RESTORING: "restoring",
    RunPhase.STARTING: "restoring",
    RunPhase.RUNNING: "running",
    RunPhase.DRAINING: "draining",
    RunPhase.FINISHING: "draining",
    RunPhase.ENDED: "exited",
}
_TOLD_ON_ENTRY = frozenset({RunPhase.RESTORING, RunPhase.RUNNING, RunPhase.DRAINING})
"""Of finishing the broker isn't told: to it the run goes on until all is at its place, and then its
end is told with its reason."""
_ASKED_ON_ENTRY: Mapping[RunPhase, Callable[[str], do.Effect]] = {
    RunPhase.PULLING: do.Pull,
    RunPhase.RESTORING: do.Restore,
    RunPhase.STARTING: do.Start,
    RunPhase.FINISHING: do.ScanFolder,
    RunPhase.DISCARDED: do.Remove,
}
"""What a phase waits for: asked for when it begins, and again after a restart of the agent."""
_NO_DEVICES: Mapping[str, DeviceMeasure] = MappingProxyType({})
_TRIGGERS: Mapping[type[Event], Trigger] = {
    ImageReady: Trigger.IMAGE_READY,
    Restored: Trigger.RESTORED,
    PreparationFailed: Trigger.PREPARATION_FAILED,
    Observed: Trigger.OBSERVED,
    Vanished: Trigger.VANISHED,
    CheckpointFound: Trigger.CHECKPOINT_FOUND,
    FolderScanned: Trigger.FOLDER_SCANNED,
    Uploaded: Trigger.UPLOADED,
    UploadMoved: Trigger.UPLOAD_MOVED,
    UploadFailed: Trigger.UPLOAD_FAILED,
    Progressed: Trigger.PROGRESSED,
    CheckpointOpened: Trigger.PROGRESSED,
    FileSaved: Trigger.PROGRESSED,
    StallTold: Trigger.PROGRESSED,
    DiskUsed: Trigger.DISK_USED,
    Measured: Trigger.MEASURED,
    DiskFull: Trigger.DISK_FULL,
    RulesBroken: Trigger.RULES_BROKEN,
    Quarantined: Trigger.QUARANTINED,
}


@dataclass
class Run:
    """A record with the rules that change it. `changed` and the two lists are taken by the agent
    after each call."""

    record: RunRecord
    key: SigningKey
    changed: bool = False
    messages: list[Message] = field(default_factory=list)
    effects: list[do.Effect] = field(default_factory=list)
    progress: Progressed | None = None
    checkpoint_opened: bool | None = None
    """whether the job has opened what it was restored from; None: not known"""
    saved_file: str = ""
    """the file that it seems to save its state to, while no checkpoint of it was found"""
    stall: checkpoints.Stall | None = None
    """for how long saving has held its loop, by its own word"""
    boot: str = ""
    """this start of the machine"""
    usage: UsageOfRun = field(default_factory=UsageOfRun)
    upload: UploadOfRun | None = None
    """how far it is with what it uploads"""
    killed_ms: int = 0
    """when it was last killed, while it was live"""
    deadline_renewed_ms: int = 0
    prepared_tick_ms: int | None = None
    """when it was last seen not to have started yet"""
    broker_reads: Reads = field(default_factory=dict)
    """The versions of documents that the broker reads; nothing until it has said so."""

    # -- what the agent calls --------------------------------------------------------------------

    def handle(self, event: Event, now_ms: int) -> None:
        """Take an event of this run."""
        if isinstance(event, UploadFailed) and event.stale:
            self.discard()
            return
        if isinstance(event, DeadlinePassed):
            budget = event.over == "budget"
            reason = Reason.BUDGET_EXHAUSTED if budget else Reason.RUN_KILLED
            self.stop("drain", reason, 0, now_ms, deadline_text(event.over))
            return
        trigger = _TRIGGERS[type(event)]
        if not self._takes(trigger):
            return
        match event:
            case ImageReady(image=image) if image and self.record.image not in ("", image):
                says = f"the pull gave {image!a} instead of {self.record.image}"
                self._end(Trigger.PREPARATION_FAILED, Reason.PULL_FAILED, says, now_ms)
            case ImageReady():
                self._enter(trigger)
            case Restored():
                self.record.boot, self.changed = self.boot, True
                self._enter(trigger)
            case PreparationFailed():
                reason, detail = event.reason, event.detail
                if self.record.device_failed and reason is Reason.START_FAILED:
                    reason, detail = Reason.DEVICE_FAILED, self.record.device_failed
                stop = self.record.stop
                if stop is not None:  # asked while it started: that is why, whatever then failed
                    reason, detail = stop.reason, stop.detail or "before it had started"
                self._end(trigger, reason, detail, now_ms)
            case Observed():
                self._observed(event, now_ms)
            case Vanished():
                self._vanished(now_ms)
            case CheckpointFound():
                self._delete_overtaken(event.overtaken)
                self._checkpoint_found(event.step, now_ms, event.age_ms, unsynced=event.unsynced)
            case FolderScanned():
                for step in event.steps:
                    self._checkpoint_found(step, now_ms, unsynced=step in event.unsynced)
                if not event.finished:
                    self._undo_success()
                self._plan_outputs()
                self.record.folder_scanned = self.changed = True
                self._finish(now_ms)
            case UploadMoved():
                self._upload_moved(event, now_ms)
            case Uploaded():
                self._uploaded(event, now_ms)
            case UploadFailed():
                self._upload_failed(event, now_ms)
            case Progressed():
                self.progress = event
            case CheckpointOpened():
                self.checkpoint_opened = event.opened
            case FileSaved():
                self.saved_file = event.path
            case StallTold():
                self.stall = checkpoints.within(event.stall, metering.ran_ms(self.record))
                cadence.held(self.record, self.stall.saves, self.stall.stall_ms)
                self.changed = True
            case Measured(measure=measure):
                self.usage.measured(measure)
            case DiskUsed():
                self.usage.disk_used(event.used_bytes, now_ms)
                limit = self.record.job.resources.disk_bytes
                if event.used_bytes > limit:
                    says = disk_limit_text(event.used_bytes, limit)
                    self.stop("stop", Reason.DISK_LIMIT, 0, now_ms, says)
            case DiskFull():
                self.stop("stop", Reason.PROVIDER_DISK_FULL, 0, now_ms, event.detail)
            case RulesBroken():
                self.stop("stop", event.reason, 0, now_ms, event.detail)
            case Quarantined():
                self._put_aside(event.detail, now_ms)

    def tick(self, now_ms: int) -> None:
        """Time passes: deadlines, receipts, and the asks for a checkpoint."""
        record = self.record
        self._count_preparation(now_ms)
        if record.phase in LIVE:
            # A clock that is set back says nothing of how long ago the last one was.
            if not 0 <= now_ms - self.deadline_renewed_ms < RENEW_EVERY_MS:
                self.deadline_renewed_ms = now_ms
                self._renew_deadline()
            stop = record.stop
            if stop and not stop.killed and now_ms >= stop.deadline_ms:
                stop.killed = self.changed = True
                self._kill(now_ms)
            elif stop and stop.killed and abs(now_ms - self.killed_ms) >= KILL_AGAIN_MS:
                # It came before there was anything to kill, or it failed.
                self._kill(now_ms)
            failed_ms = record.device_failed_ms
            if failed_ms and not stop and now_ms - failed_ms >= DEVICE_GRACE_MS:
                says = record.device_failed
                self.stop("drain", Reason.DEVICE_FAILED, DEVICE_GRACE_MS, now_ms, says)
                stop = record.stop
            if not stop and record.phase is RunPhase.RUNNING:
                if checkpoints.save_is_due(record):
                    record.interval_began_ms = metering.ran_ms(record)
                    cadence.asked(record)
                    self.changed = True
                    self.effects.append(do.AskSave(record.lease_id))
                left_ms = metering.must_stop_in_ms(record)
                if left_ms is not None:
                    # The broker's order comes earlier than this; here we stop working for nothing
                    # when it can't be heard.
                    self.stop("drain", Reason.BUDGET_EXHAUSTED, left_ms, now_ms)
            if receipts.is_due(record):
                self._receipt(now_ms)
        elif record.phase is RunPhase.FINISHING:
            self._finish(now_ms)

    def _count_preparation(self, now_ms: int) -> None:
        """Measure how long it takes until the run starts; tell when that begins to cost."""
        record = self.record
        if record.phase not in _PREPARING:
            self.prepared_tick_ms = None
            return
        before_ms = record.prepared_ms
        record.prepared_ms = metering.prepared_ms(record, self.prepared_tick_ms, now_ms)
        self.prepared_tick_ms = now_ms
        # Each half minute: so much at most is lost of it with the agent.
        if before_ms // PREPARED_SAVE_MS != record.prepared_ms // PREPARED_SAVE_MS:
            self.changed = True
        if before_ms < PULL_FREE_MS <= record.prepared_ms:
            says = (
                f"it is not ready after {format_duration(PULL_FREE_MS)}: the time from now until "
                "it starts counts as device time, if it does start; at most a quarter of what this "
                "lease may cost"
            )
            self.effects.append(do.AddLogLine(record.lease_id, says))

    def stop(
        self,
        desired: Literal["drain", "stop"],
        reason: Reason,
        grace_ms: int,
        now_ms: int,
        says: str = "",
    ) -> None:
        """Ask the run to end: drain (checkpoint first) or stop. It only hardens."""
        record = self.record
        if not self._takes(Trigger.STOP_ASKED):
            return
        before = record.stop
        deadline_ms = now_ms + grace_ms
        if before and (before.desired == "stop" or desired == "drain"):
            if deadline_ms < before.deadline_ms:
                before.deadline_ms = deadline_ms
                self.changed = True
            return
        record.stop = Stop(
            desired=desired,
            reason=reason,
            deadline_ms=min(deadline_ms, before.deadline_ms) if before else deadline_ms,
            detail=_printable(says),
        )
        self.changed = True
        if next_phase(record.phase, Trigger.STOP_ASKED) is RunPhase.ENDED:
            self._end(Trigger.STOP_ASKED, reason, says or "before it had started", now_ms)
            return
        self._enter(Trigger.STOP_ASKED)
        self.effects.append(do.AskStop(record.lease_id))
        if grace_ms <= 0:
            record.stop.killed = True
            self._kill(now_ms)

    def device_failed(self, says: str, now_ms: int) -> None:
        """A device of the run has failed. What has not started yet ends here; what runs is judged
        by it when it exits, and is stopped if it doesn't."""
        record = self.record
        if record.device_failed or record.phase not in (
            *LIVE,
            RunPhase.PULLING,
            RunPhase.RESTORING,
        ):
            return
        record.device_failed, record.device_failed_ms = says[:2048], now_ms
        self.changed = True
        self.effects.append(do.AddLogLine(record.lease_id, f"a device of this run failed: {says}"))
        if record.phase not in LIVE:
            self.stop("stop", Reason.DEVICE_FAILED, 0, now_ms, says)

    def verdict(self, verdict: CheckpointVerdict, now_ms: int) -> None:
        """Take the broker's word on an upload."""
        if not self._takes(Trigger.VERDICT):
            return
        record = self.record
        awaiting = record.awaiting_verdict.pop(verdict.checkpoint, None)
        if awaiting is None:
            return
        self.changed = True
        if verdict.durable:
            if awaiting.kind == "checkpoint" and (
                record.durable_checkpoint is None or awaiting.step >= record.durable_step
            ):
                record.durable_step = awaiting.step
                record.durable_checkpoint = verdict.checkpoint
                record.durable_device_ms = awaiting.cum_device_ms
                cadence.durable(record, awaiting.cum_device_ms)
                self.effects.append(do.AckStep(record.lease_id, awaiting.step))
                if record.job.checkpoints:
                    # A copy of ours: the job has its own, and its disk back.
                    self.effects.append(do.DeleteSteps(record.lease_id, (awaiting.step,)))
                if record.phase is not RunPhase.ENDED:
                    self._receipt(now_ms)
                self._delete_old_checkpoints()
        else:
            self._refused(awaiting.kind, awaiting.step, verdict.detail)
        if record.phase is RunPhase.FINISHING:
            self._finish(now_ms)

    def resume(self, now_ms: int) -> None:
        """Do the phase's effects again, after a restart of the agent."""
        record = self.record
        lease_id = record.lease_id
        if record.boot != self.boot:
            self._let_go_of_torn()
            unsent = record.outputs_to_upload or not record.folder_scanned
            if record.phase is RunPhase.FINISHING and unsent:
                self._let_go_of_outputs()
        if record.phase in LIVE:
            self._renew_deadline()
        ask = _ASKED_ON_ENTRY.get(record.phase)
        scanned = record.phase is RunPhase.FINISHING and record.folder_scanned
        if ask is not None and not scanned:
            self.effects.append(ask(lease_id))
        if record.stop and record.phase in (RunPhase.RUNNING, RunPhase.DRAINING):
            self.effects.append(do.AskStop(lease_id))
        if record.stop and record.stop.killed and record.phase in LIVE:
            self.effects.append(do.Kill(lease_id))
        if record.quarantined and record.phase is RunPhase.ENDED:
            self.effects.append(do.PutAside(lease_id))
        if record.uploading:
            self._ask_upload(record.uploading)
        for awaiting in record.awaiting_verdict.values():
            # The message is in the outbox, or was acknowledged; the wait begins anew.
            awaiting.since_ms = now_ms

    def _let_go_of_torn(self) -> None:
        """The machine was started anew: what it has of this run that nobody had made durable is
        not used any more."""
        record = self.record
        torn = checkpoints.torn_by_restart(record)
        if not torn:
            return
        self.changed = True
        for step in torn:
            del record.local_checkpoints[step]
        record.unsynced_steps = []
        uploading = record.uploading
        if uploading is not None and uploading.kind == "checkpoint" and uploading.step in torn:
            record.uploading = None
        lost = [step for step in torn if step > record.uploaded_step]
        if lost:
            says = (
                f"the machine was started anew: the checkpoint of step {max(lost)}, which was not "
                "off it yet, may be torn and is not used"
            )
            self.effects.append(do.AddLogLine(record.lease_id, says))

    def _let_go_of_outputs(self) -> None:
        """The machine was started anew: the outputs of a job that had finished may be torn, where
        they were not off it yet. Where the job named them it has not finished, then, and goes on
        from what is durable."""
        record = self.record
        if record.reason is not Reason.SUCCEEDED:
            return
        if record.job.outputs:
            record.reason = Reason.RUN_VANISHED
            record.detail = "the machine was started anew before the job's outputs were off it"
        if record.uploading is not None and record.uploading.kind == "outputs":
            record.uploading = None
        if record.folder_scanned:
            self._plan_outputs()
        self.changed = True

    def discard(self) -> None:
        """The lease has gone elsewhere: kill and forget, say nothing."""
        if self._takes(Trigger.LEASE_GONE):
            self._enter(Trigger.LEASE_GONE)

    @property
    def advanced(self) -> bool:
        """Whether the job has made a step beyond where this run began."""
        return self.progress is not None and self.progress.step > self.record.lease.start_step

    @property
    def step(self) -> int:
        """How far the job is, by its own word."""
        return self.progress.step if self.progress else self.record.lease.start_step

    @property
    def total_steps(self) -> int:
        """Of how many steps; 0: it has not said."""
        return self.progress.total_steps if self.progress else 0

    def report(self, now_ms: int, devices: Mapping[str, DeviceMeasure] = _NO_DEVICES) -> RunReport:
        """Return its line in the heartbeat; `devices`: how busy the machine's GPUs are."""
        record, progress = self.record, self.progress
        need = record.job.resources
        usage = self.usage.told(
            now_ms,
            memory_limit_bytes=need.memory_bytes,
            disk_limit_bytes=need.disk_bytes,
            device_ids=record.lease.device_ids,
            devices=devices,
        )
        upload = self.upload.told(now_ms) if self.upload and record.uploading else None
        return RunReport.model_validate(
            {
                "usage": usage,
                "upload": upload,
                "lease": record.lease_id,
                "epoch": record.lease.epoch,
                "state": WIRE_STATES[record.phase],
                "cum_device_ms": record.cum_device_ms,
                "step": self.step,
                "total_steps": self.total_steps,
                "metrics": progress.metrics if progress else {},
                "checkpoint_opened": self.checkpoint_opened,
                "saved_file": self.saved_file[:MAX_SAVED_FILE_CHARACTERS],
                "stall": None if self.stall is None else asdict(self.stall),
                "cadence": cadence.told(record) if record.phase is RunPhase.RUNNING else None,
                "detail": record.detail[:256],
            }
        )

    # -- how it goes on --------------------------------------------------------------------------

    def _takes(self, trigger: Trigger) -> bool:
        """Whether something is to be done about it. What can't happen is said, and left alone."""
        try:
            return next_phase(self.record.phase, trigger) is not LATE
        except UnexpectedTrigger as error:
            self.effects.append(do.Unexpected(self.record.lease_id, str(error)))
            return False

    def _enter(self, trigger: Trigger) -> None:
        """Go on to the phase that the trigger leads to, if that is another one.

        Raises UnexpectedTrigger: whoever calls this has asked `_takes`, or knows the phase.
        """
        before = self.record.phase
        phase = next_phase(before, trigger)
        if phase is LATE or phase is before:
            return
        self.record.phase = phase
        self.changed = True
        if phase in _TOLD_ON_ENTRY and WIRE_STATES[phase] != WIRE_STATES[before]:
            self.messages.append(self._changed(WIRE_STATES[phase]))
        if phase is RunPhase.STARTING:
            self._renew_deadline()  # before there is a container
        ask = _ASKED_ON_ENTRY.get(phase)
        if ask is not None:
            self.effects.append(ask(self.record.lease_id))

    def _renew_deadline(self) -> None:
        deadline = deadline_of(self.record)
        self.effects.append(do.RenewDeadline(self.record.lease_id, deadline.in_ms, deadline.over))

    def _changed(self, state: str) -> RunChanged:
        record = self.record
        return RunChanged.model_validate(
            {
                "lease": record.lease_id,
                "epoch": record.lease.epoch,
                "state": state,
                "cum_device_ms": record.cum_device_ms,
                "reason": record.reason if state == "exited" else None,
                "exit_code": record.exit_code if state == "exited" else None,
                "detail": record.detail[:2048] if state == "exited" else "",
            }
        )

    def _observed(self, seen: Observed, now_ms: int) -> None:
        record = self.record
        if record.started_ms is None:
            record.started_ms = seen.started_ms
            record.prepared_ms = metering.prepared_until_start_ms(
                record, self.prepared_tick_ms, seen.ran_ms, now_ms
            )
            record.pull_device_ms = metering.pull_device_ms(record)
            self.changed = True
            if record.pull_device_ms:
                paid = format_duration(record.pull_device_ms // record.devices)
                says = f"it took {format_duration(record.prepared_ms)} to get ready: {paid} count"
                self.effects.append(do.AddLogLine(record.lease_id, f"{says} as device time"))
        # Not saved by itself: the runner's clock says it again after a restart.
        record.cum_device_ms = metering.metered(record, seen.ran_ms)
        before = record.phase
        self._enter(Trigger.OBSERVED)
        if record.stop and before is RunPhase.STARTING:
            self._enter(Trigger.STOP_ASKED)
            self.effects.append(do.AskStop(record.lease_id))
        if seen.running:
            return
        end = seen.end or ExitEvidence(None)
        if record.device_failed:
            end = replace(end, device_failed=record.device_failed)
        record.exit_code = end.exit_code
        record.reason = reason_of_exit(end, record.stop)
        record.unless_finished = reason_of_exit(end, record.stop, finished=False)
        said = (record.stop.detail if record.stop else "") or seen.detail
        if record.reason is Reason.OUT_OF_MEMORY:
            limit = record.job.resources.memory_bytes
            said = memory_limit_text(self.usage.peak_memory_bytes, limit)
        record.detail = _printable(said or exit_text(end, record.reason))
        record.exited_ms = now_ms
        self._enter(Trigger.EXITED)

    def _plan_outputs(self) -> None:
        """Say what is to be brought back of what it has written, now that its end is known."""
        record = self.record
        finished = record.reason is Reason.SUCCEEDED
        whole = finished and record.boot == self.boot
        record.outputs_to_upload = "outputs" if whole else "partial-outputs"
        waited_for = whole and bool(record.job.outputs)
        record.outputs_until_ms = 0 if waited_for else partial_outputs.until_ms(record)

    def _undo_success(self) -> None:
        """Exit 0 of a script that was asked to stop and may not have finished: it goes on."""
        record = self.record
        if record.reason is not Reason.SUCCEEDED or record.unless_finished in (None, record.reason):
            return
        record.reason = record.unless_finished
        follows = {Next.RETRY: ": it is to go on", Next.PAUSE: ": a resume goes on with it"}
        says = "it exited with 0 when asked to stop, and nothing says that it had finished"
        says += follows.get(MEANINGS[record.reason].next, "")
        self.effects.append(do.AddLogLine(record.lease_id, says))

    def _vanished(self, now_ms: int) -> None:
        record = self.record
        if record.phase is RunPhase.STARTING:
            self.effects.append(do.Start(record.lease_id))
            return
        record.reason = Reason.RUN_VANISHED
        record.detail = "the runner no longer knows this run"
        record.exited_ms = now_ms
        self._enter(Trigger.VANISHED)

    def _checkpoint_found(
        self, step: int, now_ms: int, age_ms: int = 0, *, unsynced: bool = False
    ) -> None:
        record = self.record
        if unsynced and record.boot != self.boot:
            return  # it was saved before the machine was started anew
        if step in record.local_checkpoints or (
            step <= record.lease.start_step and record.checkpoint is not None
        ):
            return
        record.local_checkpoints[step] = checkpoints.worth_device_ms(record, age_ms)
        cadence.found(record, record.local_checkpoints[step])
        if unsynced:
            record.unsynced_steps.append(step)
        record.interval_began_ms = metering.ran_ms(record)
        self.changed = True
        whole_ms = {**record.whole_ms, step: now_ms - age_ms}
        record.whole_ms = {s: whole_ms[s] for s in record.local_checkpoints if s in whole_ms}
        self._upload_next()
        self._delete_old_checkpoints()

    def _upload_next(self) -> bool:
        record = self.record
        step = checkpoints.next_upload(record)
        if step is None or record.is_over or self._ends_at_once():
            return False
        record.uploading = Uploading(
            kind="checkpoint",
            step=step,
            cum_device_ms=record.local_checkpoints[step],
            whole_ms=record.whole_ms.get(step, 0),
        )
        self.changed = True
        self._ask_upload(record.uploading)
        return True

    def _ends_at_once(self) -> bool:
        """Whether it has exited and was to stop without saving anything."""
        stop = self.record.stop
        finishing = self.record.phase is RunPhase.FINISHING
        return finishing and stop is not None and stop.desired == "stop"

    def _ask_upload(self, uploading: Uploading) -> None:
        self.upload = UploadOfRun(uploading.kind, uploading.step)
        until_ms = 0 if uploading.kind == "checkpoint" else self.record.outputs_until_ms
        lease_id, kind, step = self.record.lease_id, uploading.kind, uploading.step
        self.effects.append(do.Upload(lease_id, kind, step, until_ms))

    def _upload_moved(self, event: UploadMoved, now_ms: int) -> None:
        upload = self.upload
        if upload is not None and (upload.kind, upload.step) == (event.kind, event.step):
            upload.moved(event.moved, now_ms)

    def _uploaded(self, event: Uploaded, now_ms: int) -> None:
        record = self.record
        uploading = record.uploading
        if uploading is None or (uploading.kind, uploading.step) != (event.kind, event.step):
            return
        document = Checkpoint(
            provider=self.key.party,
            job=record.job_id,
            lease=record.lease_id,
            epoch=record.lease.epoch,
            kind=event.kind,
            step=event.step,
            index_digest=event.index_digest,
            total_bytes=event.total_bytes,
            cum_device_ms=uploading.cum_device_ms,
            image=record.image,
            issued_ms=now_ms,
        )
        envelope = sign_document(document, self.key).envelope
        # A clock that was set back says nothing of how long it took.
        took_ms = max(0, now_ms - uploading.whole_ms) if uploading.whole_ms else 0
        stall_ms = (
            None
            if event.stall_ms is None
            else min(event.stall_ms, max(0, metering.ran_ms(self.record)))
        )
        self.messages.append(
            CheckpointUploaded(
                checkpoint=envelope,
                sent_bytes=event.sent_bytes,
                took_ms=took_ms,
                stall_ms=stall_ms,
            )
        )
        record.awaiting_verdict[envelope.id] = AwaitingVerdict(
            kind=event.kind, step=event.step, cum_device_ms=uploading.cum_device_ms, since_ms=now_ms
        )
        record.uploading = None
        self.changed = True
        if event.kind == "checkpoint":
            record.uploaded_step = max(record.uploaded_step, event.step)
            self._upload_next()
        else:
            record.outputs_to_upload = None
        if record.phase is RunPhase.FINISHING:
            self._finish(now_ms)

    def _upload_failed(self, event: UploadFailed, now_ms: int) -> None:
        record = self.record
        uploading = record.uploading
        if uploading is None or (uploading.kind, uploading.step) != (event.kind, event.step):
            return
        record.uploading = None
        self.changed = True
        if not event.nothing:
            kind = event.kind
            how = "is left out" if kind == "checkpoint" else "can't be brought back"
            says = f"{_of_step(kind, event.step)} {how}: {event.detail}"
            self.effects.append(do.AddLogLine(record.lease_id, says))
        if event.kind != "checkpoint":
            record.outputs_to_upload = None
        if event.kind == "outputs" and record.job.outputs:
            # The command succeeded, yet what it made can't be brought back.
            record.reason = Reason.CHECKPOINT_INVALID
            record.detail = _printable(f"outputs: {event.detail}")
        elif event.kind == "checkpoint":
            record.uploaded_step = max(record.uploaded_step, event.step)
            self._upload_next()
        if record.phase is RunPhase.FINISHING:
            self._finish(now_ms)

    def _refused(self, kind: str, step: int, detail: str) -> None:
        record = self.record
        record.refused_uploads += 1
        says = f"the broker refused {_of_step(kind, step)}: {detail}"
        self.effects.append(do.AddLogLine(record.lease_id, says))
        if record.refused_uploads > MAX_REFUSALS:
            return
        if kind != "checkpoint":
            if record.outputs_until_ms:
                return
            if record.boot != self.boot:
                self._let_go_of_outputs()
                return
            record.uploading = Uploading(
                kind="outputs",
                step=step,
                cum_device_ms=record.cum_device_ms,
                whole_ms=record.exited_ms,
            )
            self._ask_upload(record.uploading)
        elif step == max(record.local_checkpoints, default=-1):
            record.uploaded_step = step - 1
            self._upload_next()

    def _finish(self, now_ms: int) -> None:
        """Go on with an exited run: checkpoint, outputs, then its end is told."""
        record = self.record
        if not record.folder_scanned:
            return
        at_once = self._ends_at_once()
        if at_once and record.uploading and record.uploading.kind == "checkpoint":
            record.uploading, self.changed = None, True
        self._give_up_outputs(now_ms)
        if record.uploading is not None:
            return
        if self._upload_next():
            return
        kind = record.outputs_to_upload
        if kind is not None and (not at_once or record.outputs_until_ms):
            step = max([record.lease.start_step, *record.local_checkpoints])
            record.uploading = Uploading(
                kind=kind,
                step=step,
                cum_device_ms=record.cum_device_ms,
                whole_ms=record.exited_ms,
            )
            self.changed = True
            self._ask_upload(record.uploading)
            return
        if self._awaits_verdict(now_ms, at_once=at_once):
            return
        assert record.reason is not None
        self._end(Trigger.HANDED_OVER, record.reason, record.detail, now_ms)

    def _give_up_outputs(self, now_ms: int) -> None:
        """Whoever waits for the end doesn't wait for them any longer."""
        record = self.record
        until_ms = record.outputs_until_ms
        if not record.outputs_to_upload or not until_ms or now_ms < until_ms:
            return
        under_way = record.uploading is not None and record.uploading.kind != "checkpoint"
        if under_way and now_ms < until_ms + partial_outputs.GIVE_UP_MS:
            return  # What is there by now is being listed.
        record.outputs_to_upload, self.changed = None, True
        if under_way:
            record.uploading = None
        says = "the time for it is over: what this run has written is not brought back"
        self.effects.append(do.AddLogLine(record.lease_id, says))

    def _awaits_verdict(self, now_ms: int, *, at_once: bool) -> bool:
        """Whether the broker's word on an upload is still to be waited for."""
        until_ms = self.record.outputs_until_ms
        for awaiting in self.record.awaiting_verdict.values():
            if awaiting.kind == "checkpoint":
                waits = not at_once and now_ms - awaiting.since_ms < VERDICT_WAIT_MS
            else:
                # On the outputs that were asked for the broker itself waits.
                waits = bool(until_ms) and now_ms < until_ms + partial_outputs.GIVE_UP_MS
            if waits:
                return True
        return False

    def _end(self, trigger: Trigger, reason: Reason, detail: str, now_ms: int) -> None:
        record = self.record
        record.reason, record.detail = reason, _printable(detail)
        record.uploading = None
        self._enter(trigger)
        self.messages.append(self._changed("exited"))
        self._receipt(now_ms, final=reason)
        # The devices are free from here on; nothing of a container may be left on them.
        self.effects.append(do.Kill(record.lease_id))

    def _kill(self, now_ms: int) -> None:
        self.killed_ms = now_ms
        self.effects.append(do.Kill(self.record.lease_id))

    def _put_aside(self, detail: str, now_ms: int) -> None:
        """End it where it stands. What was known of its end by then stays known: a job can't make
        its own failure ours by what it leaves behind."""
        record = self.record
        if record.quarantined and record.phase is RunPhase.ENDED:
            self.effects.append(do.Unexpected(record.lease_id, _printable(detail)))
            return
        record.quarantined = _printable(detail) or "unknown"
        record.uploading = None
        self.changed = True
        self.effects.append(do.Unexpected(record.lease_id, record.quarantined))
        if record.phase is not RunPhase.ENDED:
            reason, says = Reason.RUN_QUARANTINED, QUARANTINED_TEXT
            if record.stop is not None and record.stop.desired == "stop":
                reason, says = record.stop.reason, record.stop.detail
            elif record.reason is not None and MEANINGS[record.reason].fault is Fault.RENTER:
                reason, says = record.reason, record.detail
            self._end(Trigger.QUARANTINED, reason, says, now_ms)
        self.effects.append(do.PutAside(record.lease_id))

    def _receipt(self, now_ms: int, final: Reason | None = None) -> None:
        envelope = receipts.write_receipt(
            self.record, self.key, self.broker_reads, now_ms, final=final
        )
        self.changed = True
        self.messages.append(ReceiptIssued(receipt=envelope))

    def _delete_overtaken(self, steps: tuple[int, ...]) -> None:
        """Let go of what was never told of: the newest alone are worth resuming from."""
        unknown = tuple(step for step in steps if step not in self.record.local_checkpoints)
        if unknown:
            self.effects.append(do.DeleteSteps(self.record.lease_id, unknown))

    def _delete_old_checkpoints(self) -> None:
        steps = checkpoints.to_delete(self.record)
        if steps:
            for step in steps:
                del self.record.local_checkpoints[step]
            kept = self.record.local_checkpoints
            self.record.unsynced_steps = [s for s in self.record.unsynced_steps if s in kept]
            self.effects.append(do.DeleteSteps(self.record.lease_id, steps))


def _of_step(kind: str, step: int) -> str:
    what = kind.replace("-", " ")
    return f"the {what} of step {step}" if kind == "checkpoint" else f"the {what}"


def _printable(text: str) -> str:
    """Return what of a text from outside can be written down: bounded, no half characters."""
    return (
        text[:MAX_DETAIL_CHARACTERS]
        .encode(errors="backslashreplace")
        .decode()[:MAX_DETAIL_CHARACTERS]
    )
