"""A provider's machine, its disk, and the agent's process on it: the real AgentCore and session.

What the shell, the link, the journal, the runner and the transfer do in production is done here in
simulated time, with a crash point before and after each commit and each effect.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from sublet_agent.core import cadence, effects, events
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.effects import Step
from sublet_agent.core.folders_at_rest import Ended, decide
from sublet_agent.core.offers import Terms
from sublet_agent.core.records import RunRecord
from sublet_agent.core.run_phases import LIVE, RunPhase
from sublet_agent.core.supply import DeviceSeen, Facts, Missing
from sublet_contracts.checkpoint_folders import next_step
from sublet_contracts.keys import SigningKey
from sublet_contracts.reasons import Reason
from sublet_contracts.run_conventions import EXIT_PREEMPTED
from sublet_contracts.session import AgentSession, SessionError
from sublet_contracts.session import Phase as SessionPhase
from sublet_contracts.wire import Ack, Assign, CheckpointVerdict, Heartbeat, Message, Order
from tests.simulation.broker import Door
from tests.simulation.doom import Doom
from tests.simulation.engine import BEGIN_MS, Crashed, Quartz
from tests.simulation.jobs import Container, Program, state_at
from tests.simulation.journal import DiskFailed, SimJournal
from tests.simulation.models import Violation
from tests.simulation.network import Line, Wire
from tests.simulation.transfer import Transfer
from tests.simulation.watchdog import Watchdog

if TYPE_CHECKING:
    from tests.simulation.market import Market

TICK_MS = 1_000
CALM_TICK_MS = 3_000
"""Where nothing is about to end: heartbeats and receipts are due at their own intervals."""
_CALM = (RunPhase.RUNNING, RunPhase.PULLING, RunPhase.RESTORING)
RESEND_MS = 5_000
LOOK_MS = 2_000
FACTS_MS = 3_000
"""Where something of the machine is missing, it is looked at so often."""
_TICK = events.Tick()
SILENCE_MS = (8_000, 12_000)
"""A line that is blocked for so long costs the connection: pings come every 4 s, and 8 s without a
pong are too many."""


class AgentHost:
    """One provider: machine, disk and process. True times in ms."""

    def __init__(self, market: Market, name: str, key: SigningKey, terms: Terms) -> None:
        self.market = market
        self.engine = market.engine
        self.name = name
        self.key = key
        self.party = key.party
        self.terms = terms
        self.line = Line(on_blocked=self._miss_pongs)
        self.journal = SimJournal()
        self.containers: dict[str, Container] = {}
        self.transfer = Transfer(self)
        self.restored: dict[str, tuple[int, str]] = {}
        self.clock = Quartz(self.engine)
        self.wall_offset_ms = 0
        self.doom = Doom(market.points)
        self.on_assign: Callable[[Assign], None] | None = None
        """What a liar does with a lease, in the core's place."""
        self.pull_blocks_ms = 0
        """For so long nothing passes its line once it begins to pull."""
        self.full_until_ms = 0
        self.hung_until_ms = 0
        self.hangs_since_ms = 0
        self.lost_devices: dict[str, int] = {}
        """Until when each device doesn't answer."""
        self.engine_away_until_ms = 0
        self.engine_stumbles_ms = 0
        """It goes away for so long, with what it runs left alone, just when it is to end a run."""
        self.broken_until_ms = 0
        """So long it can start nothing,"""
        self.breaks_by: Literal["start", "flaky", "odd"] = "start"
        """because its engine refuses, always or every other time; or because its agent can't handle
        what it is given."""
        self.odd_runs: set[str] = set()
        self.watchdog = Watchdog(self)
        self.alive_since_ms: int | None = None
        """Since when its process has run without a stop; None: it is dead."""
        self.died_ms = 0
        self.inflates = 1
        self.honest = True
        self.up = False
        self.doing = ""
        self.started = 0
        self.core: AgentCore
        self.past: list[Message] = []
        """Reliable messages that were sent once: what a liar or a bad line sends again."""
        self.boots = 1
        self.reboots_until_ms = 0
        """Until when it reboots at the worst moment, unless another machine was first:"""
        self.reboots_when: Literal["saved", "finished"] = "saved"
        """as soon as a run of its has saved something, or has exited with its work done."""
        self._offset_ms = 0
        self._wire: Wire | None = None
        self._door: Door | None = None
        self._session: AgentSession | None = None
        self._sent_up_to = 0
        self._delay_ms = 200
        self._steps: dict[str, int] = {}
        """The step that was told last of each run."""
        self._told: dict[str, set[int]] = {}
        self._due_ms: dict[str, int] = {}
        """Since when a snapshot of a run's folder is due."""
        self._rested_ms: dict[str, int] = {}
        """The change at which a run's folder was last seen at rest."""
        self._resends = False
        self._tick_ms = 0
        """When the next tick is planned."""
        self._look_planned: set[str] = set()
        self._looked_ms: dict[str, int] = {}
        """When this process has looked at each run last."""
        self._facts_planned = False

    @property
    def boot(self) -> str:
        """The name of this start of the machine."""
        return f"boot {self.boots} of {self.name}"

    # -- the process --------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process on what is on its disk."""
        if self.up:
            return
        self.up = True
        self.alive_since_ms = self.engine.now_ms
        self.started += 1
        self._set_clock()
        self._wire = self._session = None
        self._told = {}
        self._steps = {}
        self._due_ms = {}
        self._rested_ms = {}
        self._look_planned = set()
        self._looked_ms = {}
        self.engine.say(f"{self.name} starts (start {self.started})")
        self.doing = "its start"
        self.core = AgentCore(self.terms, self.key, self.journal.load(), boot=self.boot)
        self.core.last_saved = self.journal.run
        step, strangers = self.core.started(list(self.containers), self.now_ms())
        for lease_id in strangers:
            self._drop_container(lease_id)
        for lease_id, run in self.core.runs.items():
            if run.record.phase in LIVE:
                self._watch(lease_id)
        self._facts_planned = False
        self._guard(lambda: self._perform(step))
        self._later(0, lambda: self._facts_read(self.now_ms()))
        self._later(self.engine.draw_ms(10, 500), self._dial)
        self._tick_ms = 0
        self._plan_tick()
        self._resends = False

    def now_ms(self) -> int:
        """The process's steady clock: set from the wall when it started, or was refused for it."""
        return BEGIN_MS + self.clock.now_ms() + self._offset_ms

    def _set_clock(self) -> None:
        """By the machine's wall clock, which somebody keeps right unless a fault moves it."""
        self._offset_ms = self.wall_offset_ms - self.clock.ahead_ms()

    def die(self, back_after_ms: int) -> None:
        """The process is gone. Its runs go on."""
        if not self.up:
            return
        self.up = False
        self.alive_since_ms, self.died_ms = None, self.engine.now_ms
        # Who was stopped is stopped no longer: the next process has never been.
        self.hung_until_ms = min(self.hung_until_ms, self.engine.now_ms)
        self.doom.countdown = 0
        if self._wire is not None:
            self._wire.close(late=self.engine.happens(0.5))
            self._wire = None
        self.engine.after(back_after_ms, self.start)

    def _guard(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Crashed:
            self.die(self.engine.draw_ms(500, 60_000))
        except DiskFailed:
            self.engine.say(f"{self.name} stops: its journal can't be written")
            self.die(self.engine.draw_ms(5_000, 20_000))

    def _later(self, delay_ms: int, act: Callable[[], None]) -> None:
        """Do it in this process, if it still runs then; a process that hangs does it later."""
        self.engine.after(delay_ms, partial(self._come, self.started, act))

    def _come(self, number: int, act: Callable[[], None]) -> None:
        if not self.up or self.started != number:
            return
        hung_ms = self.hung_until_ms - self.engine.now_ms
        if hung_ms > 0:
            self.engine.after(hung_ms, partial(self._come, number, act))
        else:
            self._guard(act)

    def _crash_point(self, where: str) -> None:
        if self.doom.strikes(f"agent {where} of {self.doing}"):
            self.engine.say(f"{self.name} dies {where}")
            raise Crashed(where)

    def post(self, event: events.Event) -> None:
        """Let the core take an event: commit, then perform."""
        self.doing = type(event).__name__
        if isinstance(event, events.MessageArrived):
            self.doing = f"a {event.message.TYPE}"
        if isinstance(event, events.UploadFailed):
            self.market.cadences.failed(event.lease_id)
        self._perform(self.core.handle(event, self.now_ms()))
        if self._tick_ms > self.engine.now_ms + TICK_MS:
            self._plan_tick()  # It may be due earlier now.

    def _perform(self, step: Step) -> None:
        if not step.save.empty:
            self._crash_point("before a commit")
            if self.full_until_ms > self.engine.now_ms:
                raise DiskFailed
            self.journal.commit(step.save)
            for queued in step.save.queue:
                self.past.append(queued.message)
            del self.past[:-200]
            self._crash_point("after a commit")
            if step.save.queue:
                self._send_outbox()
        for effect in step.effects:
            self._crash_point(f"before {type(effect).__name__}")
            self._do(effect)

    def _plan_tick(self) -> None:
        delay_ms = CALM_TICK_MS
        if not self.core.runs:
            quiet_ms = self.core.quiet_until_ms() - self.now_ms()
            delay_ms = max(delay_ms, min(quiet_ms, 60_000))
        for run in self.core.runs.values():
            if run.record.phase not in _CALM or run.record.stop is not None:
                delay_ms = TICK_MS
        due_ms = self.engine.now_ms + delay_ms
        if self._tick_ms and due_ms >= self._tick_ms:
            return
        self._tick_ms = due_ms
        self._later(delay_ms, partial(self._tick, due_ms))

    def _tick(self, due_ms: int) -> None:
        if self._tick_ms == due_ms:
            self._tick_ms = 0
            self.post(_TICK)
            self._plan_tick()

    # -- the link -----------------------------------------------------------------------------

    @property
    def live(self) -> bool:
        return self._session is not None and self._session.phase is SessionPhase.LIVE

    def _dial(self) -> None:
        host = self.market.broker
        if self._wire is not None:
            return
        if not host.up or not self.line.works(self.engine.now_ms):
            self._dial_later()
            return
        session = AgentSession(
            self.key,
            instance=hashlib.sha256(f"{self.name}{self.started}".encode()).hexdigest(),
            agent_version="sim",
            broker=self.core.saved.broker or None,
        )
        doors: list[Door] = []
        wire = Wire(
            self.engine,
            self.line,
            lambda frame: doors[0].arrive(frame),
            lambda frame: self._frame(wire, frame),
        )
        self._wire, self._session, self._sent_up_to = wire, session, 0
        wire.on_agent_closed = lambda: self._later(0, lambda: self._closed(wire))
        door = host.accept(wire)
        if door is None:
            self._wire = self._session = None
            self._dial_later()
            return
        doors.append(door)
        self._later(10_000, lambda: self._joined_yet(wire))
        if not self.line.works(self.engine.now_ms):
            self._miss_pongs()

    def _dial_later(self) -> None:
        self._later(self.engine.draw_ms(self._delay_ms // 2, self._delay_ms), self._dial)
        self._delay_ms = min(10_000, self._delay_ms * 2)

    def _joined_yet(self, wire: Wire) -> None:
        if self._wire is wire and not self.live:
            self._hang_up()

    def _miss_pongs(self) -> None:
        """The line is blocked: where it stays so, the connection is given up."""
        wire, since_ms = self._wire, self.line.blocked_since_ms

        def look() -> None:
            blocked = not self.line.works(self.engine.now_ms)
            if self._wire is wire and blocked and self.line.blocked_since_ms == since_ms:
                self._hang_up()

        if wire is not None:
            self._later(self.engine.draw_ms(*SILENCE_MS), look)

    def _hang_up(self) -> None:
        wire = self._wire
        if wire is not None:
            wire.close()
            self._closed(wire)

    def _closed(self, wire: Wire) -> None:
        if self._wire is not wire:
            return
        self._wire = self._session = None
        if self.core.live:
            self.post(events.Disconnected())
        self._dial_later()

    def _frame(self, wire: Wire, frame: bytes) -> None:
        if self.up and self._wire is wire:
            self._later(0, lambda: self._arrived(wire, frame))

    def _arrived(self, wire: Wire, frame: bytes) -> None:
        session = self._session
        if self._wire is not wire or session is None:
            return
        was_live = self.live
        try:
            received, answer = session.receive(frame, self.now_ms())
        except SessionError as error:
            self.engine.say(f"{self.name} is turned away ({error.code})")
            if error.code == "clock":
                self._set_clock()
            self._hang_up()
            return
        if answer is not None:
            wire.up.send(answer)
        if self.live and not was_live:
            self._delay_ms = 200
            joined = events.Joined(
                session.broker or "", session.broker_ahead_ms, session.broker_reads
            )
            self.post(joined)
            self._send_outbox()
        message, mid = received.message, received.mid
        if isinstance(message, Ack):
            for done in message.mids:
                self.journal.outbox.pop(int(done.rsplit("-", 1)[1]), None)
            return
        if self.live:
            if mid is not None:
                self.engine.say(f"{self.name} takes {message.TYPE} {mid}")
            if isinstance(message, Order):
                self.market.auditor.truth.asked(message.lease, message.reason, message.desired)
            if isinstance(message, Assign):
                self.market.cadences.told(message)
            if isinstance(message, CheckpointVerdict) and not message.durable:
                self.market.cadences.failed(message.lease)
            if self.on_assign is not None and isinstance(message, Assign):
                self.on_assign(message)
            else:
                self.post(events.MessageArrived(message))
            if mid is not None:
                self.market.auditor.taken(self.party, mid, message)
                self._send(Ack(mids=(mid,)))

    def _send(self, message: Message, mid: str | None = None) -> None:
        if self.live and self._session is not None and self._wire is not None:
            self._wire.up.send(self._session.send(message, mid))

    def _send_outbox(self) -> None:
        if not self.live:
            return
        outbox = self.journal.outbox
        for number in sorted(number for number in outbox if number > self._sent_up_to):
            self._send(outbox[number][1], f"{self.name}-{number}")
            self._sent_up_to = number
        if outbox and not self._resends:
            self._resends = True
            self._later(RESEND_MS, self._resend)

    def _resend(self) -> None:
        self._resends = False
        self._sent_up_to = 0
        self._send_outbox()

    def say_again(self, message: Message, number: int) -> None:
        """Send a message once more, or one that no honest agent would: repeats and lies."""
        self._send(message, f"{self.name}-{number}")

    # -- effects ------------------------------------------------------------------------------

    def _do(self, effect: effects.Effect) -> None:
        draw = self.engine.draw_ms
        match effect:
            case effects.Send(message):
                for report in message.runs if isinstance(message, Heartbeat) else ():
                    record = self._record(report.lease)
                    self.market.cadences.reported(self, record, report)
                self._send(message)
            case effects.Say(text):
                self.engine.say(f"{self.name}: {text}")
            case effects.Unexpected(lease_id, text):
                if lease_id in self.odd_runs:
                    return
                raise Violation(f"{self.name}: lease {lease_id[:10]}: {text}")
            case effects.LookUpImage(lease_id, image):
                slow = self.engine.happens(0.03)
                took_ms = draw(50, 20_000 if slow else 2_000)
                self._later(took_ms, lambda: self._looked_up(lease_id, image))
            case effects.Pull(lease_id):
                self.market.auditor.pulls.began(self, lease_id)
                if self.pull_blocks_ms:
                    now_ms = self.engine.now_ms
                    self.line.block(now_ms, now_ms + self.pull_blocks_ms, up=True, down=True)
                    self.pull_blocks_ms = 0
                took_ms = self.market.registry.pull_takes_ms(self.name)
                self._later(took_ms, lambda: self._pulled(lease_id))
            case effects.Restore(lease_id):
                self._later(draw(20, 800), lambda: self.transfer.restore(lease_id))
            case effects.Start(lease_id):
                self._later(draw(100, 500), lambda: self._start(lease_id))
            case effects.AskStop(lease_id):
                self._due_ms.setdefault(lease_id, self.engine.now_ms)
                self._later(draw(1, 50), lambda: self._tell_engine(lease_id, Container.stop))
            case effects.AskSave(lease_id):
                held = self.containers.get(lease_id)
                self.market.cadences.asked(self, self._record(lease_id), held)
                self._due_ms.setdefault(lease_id, self.engine.now_ms)
                self._later(draw(1, 500), lambda: self._on_container(lease_id, Container.save))
            case effects.Kill(lease_id):
                self._later(draw(1, 50), lambda: self._tell_engine(lease_id, Container.kill))
            case effects.ScanFolder(lease_id):
                self._later(draw(1, 100), lambda: self._scan(lease_id))
            case effects.Upload(lease_id, kind, step):
                self._later(draw(20, 1_500), lambda: self.transfer.upload(lease_id, kind, step))
            case effects.RenewDeadline(lease_id, in_ms, over):
                self.watchdog.renew(lease_id, in_ms, over)
            case effects.AckStep(lease_id, step):
                self.market.auditor.step_acknowledged(lease_id, step)
            case effects.DeleteSteps(lease_id, steps):
                container = self.containers.get(lease_id)
                for step in steps if container else ():
                    container.steps.pop(step, None)
            case effects.PutAside(lease_id):
                self._later(draw(10, 500), lambda: self._tell_engine(lease_id, Container.kill))
            case effects.Remove(lease_id):
                self._later(draw(10, 500), lambda: self._remove(lease_id))
            case effects.ReadFacts():
                slow = self.engine.happens(0.02)
                self._look_at_machine(draw(5, 6_000 if slow else 300))
            case effects.StartTest():
                self._later(draw(200, 2_000), self._test_start)
            case effects.PrepareJob(job, checkpoint):
                self._later(draw(50, 3_000), lambda: self.transfer.prepare(job, checkpoint))
            case _:
                pass  # logs, drops of what was prepared: they carry no money

    def _record(self, lease_id: str) -> RunRecord | None:
        run = self.core.runs.get(lease_id)
        return run.record if run else None

    def _on_container(self, lease_id: str, act: Callable[[Container], None]) -> None:
        container = self.containers.get(lease_id)
        if container is not None:
            act(container)

    def _tell_engine(self, lease_id: str, act: Callable[[Container], None]) -> None:
        """As the shell does: what an engine that is away isn't told is not told later."""
        container = self.containers.get(lease_id)
        kills = act is Container.kill and container is not None and container.running
        if self.engine_stumbles_ms and kills:
            self.restart_engine(self.engine_stumbles_ms, keeps_runs=True)
            self.engine_stumbles_ms = 0
        if self.engine_is_away:
            self.engine.say(f"{self.name}: the engine does not answer")
        else:
            self._on_container(lease_id, act)

    @property
    def engine_is_away(self) -> bool:
        return self.engine_away_until_ms > self.engine.now_ms

    def fail(self, lease_id: str, reason: Reason, says: str) -> None:
        """A run could not be prepared, in truth."""
        self.market.auditor.truth.not_started(lease_id, reason)
        self.post(events.PreparationFailed(lease_id, reason, says))

    def _looked_up(self, lease_id: str, image: str) -> None:
        registry = self.market.registry
        trouble = registry.trouble(image, self.name)
        if trouble is None:
            self.post(events.ImageLookedUp(lease_id, registry.meaning(image)))
        else:
            self.market.auditor.truth.not_started(lease_id, trouble[0])
            self.post(events.LookUpFailed(lease_id, *trouble))

    def _pulled(self, lease_id: str) -> None:
        record = self._record(lease_id)
        if record is None:
            return
        image = record.image or record.job.image
        trouble = self.market.registry.trouble(image, self.name)
        if trouble is None:
            self.post(events.ImageReady(lease_id, self.market.registry.meaning(image)))
        else:
            self.fail(lease_id, *trouble)

    def quarantine(self, lease_id: str) -> None:
        """The agent's own mistake, in handling one run."""
        self.odd_runs.add(lease_id)
        self.market.auditor.truth.asked(lease_id, "run_quarantined", "stop")
        self.post(events.Quarantined(lease_id, "KeyError: 'State'"))

    def _cant_start(self, record: RunRecord) -> tuple[Reason, str] | None:
        now_ms = self.engine.now_ms
        if self.engine_is_away:
            return Reason.START_FAILED, "the engine does not answer"
        lost = [id for id in record.lease.device_ids if self.lost_devices.get(id, 0) > now_ms]
        if lost:
            self.market.auditor.truth.asked(record.lease_id, "device_failed", "drain")
            return Reason.START_FAILED, f"could not select device {lost[0]}"
        if self.breaks_by != "odd" and self._is_broken():
            return Reason.START_FAILED, "OCI runtime create failed"
        return None

    def _is_broken(self) -> bool:
        """Say whether it can't start what it is given now."""
        breaks = self.breaks_by != "flaky" or self.engine.happens(0.5)
        return breaks and self.broken_until_ms > self.engine.now_ms

    def _test_start(self) -> None:
        trouble = "the engine does not answer" if self.engine_is_away else ""
        if self._is_broken():
            trouble = "OCI runtime create failed"
        self.post(events.StartTested(trouble))

    def _start(self, lease_id: str) -> None:
        record = self._record(lease_id)
        if record is None or record.is_over:
            return
        if self.broken_until_ms > self.engine.now_ms and self.breaks_by == "odd":
            self.quarantine(lease_id)
            return
        trouble = self._cant_start(record)
        if trouble is not None and (lease_id not in self.containers or self.engine_is_away):
            self.fail(lease_id, *trouble)
            return
        if lease_id not in self.containers:
            if record.boot != self.boot and record.phase is RunPhase.STARTING:
                self.post(events.Restored(lease_id))  # its folders, once more
            program = Program.of(record.job)
            begin = self.restored.get(lease_id)
            if begin is None:
                begin = (0, state_at(record.job.nonce, 0))
            container = Container(
                self.engine,
                self.clock,
                lease_id,
                record.job.nonce,
                program,
                begin,
                bool(record.job.outputs),
                lambda: self._look_soon(lease_id),
                devices=record.lease.device_ids,
                stalls=record.job.stall_ms > 0,
            )
            self.containers[lease_id] = container
            container.start()
            image = self.market.registry.meaning(record.image or record.job.image)
            self.market.auditor.run_began(lease_id, container, image)
            self.doing = "Start"
            self._crash_point("after the effect")
        self._watch(lease_id)

    # -- watching -----------------------------------------------------------------------------

    def _watch(self, lease_id: str) -> None:
        self._look_planned.discard(lease_id)
        self._look_soon(lease_id, 10)

    def _look_soon(self, lease_id: str, delay_ms: int = 0) -> None:
        if not self.up:
            return
        delay_ms = delay_ms or self.engine.draw_ms(1, 200)
        self._later(delay_ms, lambda: self._look(lease_id))

    def _look(self, lease_id: str) -> None:
        record = self._record(lease_id)
        if record is None or record.phase not in LIVE:
            return
        if self.engine_is_away:
            self._look_soon(lease_id, 1_000)
            return
        container = self.containers.get(lease_id)
        if container is None or container.forgotten:
            self.post(events.Vanished(lease_id))
            return
        if not container.running and (over := self.watchdog.passed.get(lease_id)):
            self.post(events.DeadlinePassed(lease_id, over))
        now_ms = self.engine.now_ms
        self.market.cadences.looked(lease_id, now_ms - self._looked_ms.get(lease_id, 0))
        self._looked_ms[lease_id] = now_ms
        self._take_folder(container, record)
        told = self._told.setdefault(lease_id, set())
        for step in sorted(container.steps.keys() - told):
            told.add(step)
            self._tell_step(container, step)
        step = container.step_now()
        if self._steps.get(lease_id) != step:
            self._steps[lease_id] = step
            self.post(events.Progressed(lease_id, step, container.program.steps))
        self.post(
            events.Observed(
                lease_id,
                running=container.running,
                started_ms=BEGIN_MS + container.started_ms + self._offset_ms,
                ran_ms=container.clocked_ms() * self.inflates,
                end=container.end,
            )
        )
        if container.running and lease_id not in self._look_planned:
            self._look_planned.add(lease_id)
            self._later(LOOK_MS, partial(self._look_again, lease_id))

    def _look_again(self, lease_id: str) -> None:
        self._look_planned.discard(lease_id)
        self._look(lease_id)

    def _take_folder(self, container: Container, record: RunRecord) -> None:
        """Copy the folder that a job named, by the agent's own rules; at a look, as Workspace and
        Observer do it."""
        folder, lease_id = container.folder, container.lease_id
        if folder is None:
            return
        ended: Ended = ""
        if not container.running:
            ended = "by itself" if container.exit_code in (0, EXIT_PREEMPTED) else "killed"
            if record.stop is not None and record.stop.desired == "stop":
                return
        elif not folder.open:
            self._rested_ms[lease_id] = folder.changed_ms
        due_ms = self._due_ms.get(lease_id)
        state, _ = decide(
            folder.seen(self._rested_ms.get(lease_id, -1)),
            waited_ms=None if due_ms is None else self.engine.now_ms - due_ms,
            interval_ms=cadence.interval(record).ms,
            ended=ended,
        )
        if state in ("same", "ready"):
            self._due_ms.pop(lease_id, None)
        under_way = record.uploading is not None or record.awaiting_verdict
        if state != "ready" or (under_way and not ended):
            return
        after = max([record.lease.start_step, *record.local_checkpoints, *folder.copied])
        step = next_step(after, 0)
        container.steps[step] = folder.copy(step)
        self._crash_point("after a copy")

    def _tell_step(self, container: Container, step: int) -> None:
        age_ms = 0
        if container.folder is not None:
            until_ms = container.finished_ms or self.engine.now_ms
            age_ms = until_ms - container.folder.copied[step][0]
        unsynced = container.folder is None
        found = events.CheckpointFound(container.lease_id, step, age_ms=age_ms, unsynced=unsynced)
        self.market.cadences.found(container.lease_id)
        self.post(found)
        if unsynced and self.reboots_when == "saved":
            self._reboot_if_due(self.engine.draw_ms(0, 1_500))

    def _reboot_if_due(self, in_ms: int) -> None:
        """It has something now that is on no disk for sure."""
        if self.engine.now_ms >= self.reboots_until_ms:
            return
        for host in self.market.agents:
            host.reboots_until_ms = 0
        away_ms = self.engine.draw_ms(3_000, 10_000)  # its leases are still its own then
        self.engine.after(in_ms, partial(self.reboot, away_ms))

    def _scan(self, lease_id: str) -> None:
        container, record = self.containers.get(lease_id), self._record(lease_id)
        steps = tuple(sorted(container.steps)) if container else ()
        finished = container is not None and container.had_finished
        if container is not None and container.folder is not None:
            if record is not None and record.phase is RunPhase.FINISHING:
                self._take_folder(container, record)
                for step in sorted(container.steps):
                    self._tell_step(container, step)
            # Nothing in such a folder says that the work was done.
            steps, finished = (), False
        done = container is not None and container.truth == "finished"
        if done and self.reboots_when == "finished":
            self._reboot_if_due(self.engine.draw_ms(0, 300))
        self.post(events.FolderScanned(lease_id, steps, unsynced=steps, finished=finished))

    def _remove(self, lease_id: str) -> None:
        if self.engine_is_away:
            self._later(2_000, lambda: self._remove(lease_id))
            return
        self._drop_container(lease_id)
        self.restored.pop(lease_id, None)
        self.post(events.Removed(lease_id))

    def _drop_container(self, lease_id: str) -> None:
        container = self.containers.pop(lease_id, None)
        self.watchdog.forget(lease_id)
        if container is not None:
            container.looked = _nobody
            container.kill()

    # -- faults -------------------------------------------------------------------------------

    def reboot(self, away_ms: int) -> None:
        """The machine reboots: the process and every run are gone; the folders are there, and what
        nobody had fsynced in them may be torn."""
        self.boots += 1
        forgets = self.engine.happens(0.5)
        for container in self.containers.values():
            container.looked = _nobody
            container.loses_power()
            if not container.running:
                continue  # What its engine knows of an end it has on its disk.
            if forgets:
                container.ends(None, "forgotten")
                container.forgotten = True
            elif self.engine.happens(0.5):
                container.engine_says = "the machine was started anew"
                container.ends(137, "engine")
            else:
                container.ends(None, "killed unseen")
        self.watchdog.rebooted()
        self.die(away_ms)

    def restart_engine(self, away_ms: int, *, keeps_runs: bool) -> None:
        """The container engine goes away for a while, and with it what runs, unless it keeps it."""
        self.engine_away_until_ms = self.engine.now_ms + away_ms
        for container in self.containers.values() if not keeps_runs else ():
            patient = self.engine.happens(0.5)
            container.engine_stops("the engine went away", patient=patient)
        self.engine.after(self.engine.draw_ms(0, FACTS_MS), self._notice)
        self.engine.after(away_ms, self._notice)

    def lose_device(self, id: str, span_ms: int) -> None:
        """A device fails, and answers again later."""
        self.lost_devices[id] = self.engine.now_ms + span_ms
        says = f"{id}: the driver says that the GPU is lost"
        self._note_lost(id)
        for container in self.containers.values():
            if id in container.devices and container.running:
                container.device_says = says
                hangs = self.engine.happens(0.5)
                if hangs:
                    container.hang()
                ends = partial(container.ends, self.engine.random.choice((1, 134, 137)), "device")
                if hangs or self.engine.happens(0.6):
                    self.engine.after(self.engine.draw_ms(50, 40_000), ends)
        if self.engine.happens(0.5):
            self._later(
                self.engine.draw_ms(1, 2_000), lambda: self.post(events.DeviceFailed(id, says))
            )
        self.engine.after(self.engine.draw_ms(0, FACTS_MS), self._notice)
        self.engine.after(span_ms, self._notice)

    def _note_lost(self, device: str) -> None:
        for lease_id, run in self.core.runs.items():
            if device in run.record.lease.device_ids:
                self.market.auditor.truth.asked(lease_id, "device_failed", "drain")

    # -- the machine --------------------------------------------------------------------------

    def _notice(self) -> None:
        if self.up:
            self._look_at_machine(1)

    def _look_at_machine(self, delay_ms: int) -> None:
        """Look at it, and again as long as something is missing."""
        began_ms = self.now_ms()
        self._later(delay_ms, lambda: self._facts_read(began_ms))

    def _facts_read(self, began_ms: int) -> None:
        facts = self._facts()
        for missing in facts.missing:
            self._note_lost(missing.id)
        self.post(events.FactsRead(facts, began_ms))
        supply = self.core.supply
        if (supply.missing or supply.engine) and not self._facts_planned:
            self._facts_planned = True
            self._later(FACTS_MS, self._look_again_at_machine)

    def _look_again_at_machine(self) -> None:
        self._facts_planned = False
        self._look_at_machine(self.engine.draw_ms(5, 300))

    def _facts(self) -> Facts:
        now_ms, terms = self.engine.now_ms, self.terms
        gone = [d.id for d in terms.devices if self.lost_devices.get(d.id, 0) > now_ms]
        count = len(terms.devices)
        return Facts(
            devices=tuple(DeviceSeen(d) for d in terms.devices if d.id not in gone),
            cpu_millis=terms.cpu_millis * count,
            memory_bytes=terms.memory_bytes * count * 2,
            memory_free_bytes=terms.memory_bytes * count * 2,
            disk_free_bytes=terms.disk_bytes * count * 2,
            missing=tuple(Missing(id, "the driver says that the GPU is lost") for id in gone),
            engine="it does not answer" if self.engine_is_away else "",
        )

    def hang(self, span_ms: int) -> None:
        """Its process, where there is one, stands still (SIGSTOP) and goes on later."""
        if not self.up:
            return
        now_ms = self.engine.now_ms
        if self.hung_until_ms <= now_ms:
            self.hangs_since_ms = now_ms
        # What is to be done is put off to then already: another such stop doesn't end it sooner.
        self.hung_until_ms = max(self.hung_until_ms, now_ms + span_ms)

    def calm(self) -> None:
        """Everything works from now on, and its owner is honest."""
        self.doom.lift()
        self.on_assign = None
        self.full_until_ms = self.wall_offset_ms = self.broken_until_ms = 0
        self.reboots_until_ms = 0
        self.engine_away_until_ms = self.engine_stumbles_ms = self.pull_blocks_ms = 0
        self.lost_devices = {}
        self.hung_until_ms = self.engine.now_ms
        self.inflates = 1
        self.line.open()
        self.start()
        self._later(1_000, lambda: self.post(events.OfferAgain()))

    def disk_full(self, lease_id: str) -> None:
        """A run meets the end of the machine's disk."""
        self.market.auditor.truth.asked(lease_id, "provider_disk_full", "stop")
        self.post(events.DiskFull(lease_id, "the disk is full"))

    def drain(self, reason: Reason, grace_ms: int) -> None:
        """Its owner takes all devices back."""
        for lease_id in self.core.runs:
            self.market.auditor.truth.asked(lease_id, reason, "drain")
        self.post(events.DrainAsked(reason, grace_ms, then_stop=False))

    def break_wire(self, *, late: bool) -> None:
        """The connection breaks."""
        if self._wire is not None:
            self._wire.close(late=late)


def _nobody() -> None:
    return None
