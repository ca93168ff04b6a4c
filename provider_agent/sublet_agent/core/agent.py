"""The whole agent as one pure object: leases, runs, offers, drain. Events in, a Step out.

The shell commits `step.save` in one transaction, then acknowledges the message, then performs
`step.effects`. A crash between any two of these loses nothing: after a restart `started` looks at
what is on disk and at what the runner still has, and asks for the missing effects again.

A run's trouble stays its own: where handling one run raises, all that this event had changed of it
is taken back, and its last saved record is ended as quarantined. The others notice nothing.

Once somebody tells what is seen of the machine (`FactsRead`), a lease is signed, and a run that
ended badly on a GPU is judged, only by a look that began after it came: until then it waits here.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from sublet_agent.core import draining, effects, image_lookups
from sublet_agent.core.effects import Queued, Step
from sublet_agent.core.events import (
    DeviceFailed,
    Disconnected,
    DiskUsed,
    DrainAsked,
    Event,
    FactsRead,
    ImageLookedUp,
    Joined,
    LookUpFailed,
    MessageArrived,
    Observed,
    OfferAgain,
    PreparationFailed,
    PrepareDone,
    Quarantined,
    Removed,
    StartTested,
    Tick,
)
from sublet_agent.core.image_lookups import LookUps
from sublet_agent.core.image_troubles import ImageTroubles
from sublet_agent.core.offers import (
    KEEP_OFFERS,
    OFFER_REFRESH_MS,
    Terms,
    lacking,
    make_offer,
    read_assign,
    refusal,
)
from sublet_agent.core.records import IssuedOffer, RunRecord, Saved
from sublet_agent.core.run import UNLISTED_MS, Run
from sublet_agent.core.run_phases import LIVE, RunPhase
from sublet_agent.core.runner_port import CPU_DEVICE
from sublet_agent.core.set_aside import SetAside
from sublet_agent.core.supply import Held, Supply, is_less, is_more
from sublet_agent.core.usage import DeviceMeasure, devices_measured
from sublet_contracts.amounts import format_credits
from sublet_contracts.documents import (
    DocumentRefused,
    Offer,
    Settlement,
    open_document,
    sign_document,
)
from sublet_contracts.image_references import can_mean
from sublet_contracts.keys import SigningKey, short
from sublet_contracts.reasons import Reason
from sublet_contracts.rules import BPS, fee_ucr
from sublet_contracts.session import MAX_SLEW
from sublet_contracts.versions import Reads
from sublet_contracts.wire import (
    Announce,
    Assign,
    CheckpointVerdict,
    Heartbeat,
    LeaseAnswer,
    LogsWanted,
    Message,
    Order,
    Prepare,
    Prepared,
    RunReport,
    SettlementNotice,
    Unprepare,
    Welcome,
    Withdraw,
)

NEVER_MS = 2**53 - 1
IDLE_HEARTBEAT_FACTOR = 3
"""So many times as long an agent that runs nothing waits between heartbeats: nobody counts its
silence, and its connection has pings. A broker drops who says nothing for five of them."""


_IDLE_HEARTBEAT = Heartbeat(runs=())
LOOK_WAIT_MS = 4_000
"""what waits for a look goes on without it after so long: well within a lease's time to answer"""
BETWEEN_GAINS_MS = 3_000
"""What can be offered more waits for so long after an offer; what is gone is told at once."""


@dataclass(frozen=True)
class _Waiting:
    """An event that waits for a look at the machine."""

    event: Event
    since_ms: int


class AgentCore:
    """One agent at one broker. `saved` is what the journal holds; it is changed in step. `boot`
    names this start of the machine: what its disk has of another one may be torn."""

    def __init__(self, terms: Terms, key: SigningKey, saved: Saved, *, boot: str = "") -> None:
        self.supply = Supply(terms, _remembered(saved))
        self.key = key
        self.saved = saved
        self.boot = boot
        self.runs = {
            lease_id: Run(record, key, boot=boot) for lease_id, record in saved.runs.items()
        }
        self.live = False
        self.heartbeat_ms = 3_000
        self.draining: DrainAsked | None = None
        if saved.reclaimed:
            self.draining = DrainAsked(Reason.RECLAIMED, terms.grace_ms, then_stop=False)
        self.aside = SetAside()
        self.images = ImageTroubles()
        self.lookups = LookUps()
        self.fee_bps: int | None = None
        """the broker's share of a charge, as it said last"""
        self._drain_wait: draining.Drain | None = None
        self._announced: Terms | None = None
        """what the offer says that the broker has; None: it has none of this agent's"""
        self._looks = False
        self._waiting: dict[str, _Waiting] = {}
        self.disk_used: dict[str, int] = {}
        self._devices_measured: dict[str, DeviceMeasure] = {}
        self._last_heartbeat_ms = 0
        self._last_offer_ms: int | None = None
        self._withdrawn = False
        self._told_done = False
        self._broker_ahead_ms = 0
        self._broker_reads: Reads = {}
        self._joined_ms = 0
        self._step = Step()
        self.last_saved: Callable[[str], RunRecord | None] = self._in_memory
        """how a run's record was when it was last committed"""

    @property
    def terms(self) -> Terms:
        """What can be offered now."""
        return self.supply.terms

    # -- in ---------------------------------------------------------------------------------------

    def started(self, found: Iterable[str], now_ms: int) -> tuple[Step, list[str]]:
        """After a start of the agent: take up what was running. `found` are the lease ids that the
        runner still has. Returns the first Step, and those of `found` that nobody knows (remove
        them)."""
        for run in list(self.runs.values()):
            self._with_run(run, partial(run.resume, now_ms), now_ms)
        if self.draining:
            self._say("reclaimed: nothing is offered until `sublet provider offer`")
        strangers = [lease_id for lease_id in found if lease_id not in self.runs]
        return self._take_step(), strangers

    def handle(self, event: Event, now_ms: int) -> Step:
        """Take one event. It never raises for what the event holds."""
        try:
            if self._needs_a_look(event, now_ms):
                self._step.effects.append(effects.ReadFacts())
            else:
                self._take(event, now_ms)
            self._check_drained(now_ms)
        except Exception as error:  # noqa: BLE001 - the event is lost, not the agent
            # What was done so far is consistent, run by run; what is left out comes round again.
            named = event.message if isinstance(event, MessageArrived) else event
            self._unexpected("", f"{type(named).__name__}: {_said(error)}")
        return self._take_step()

    def put_aside(self, step: Step, lease_id: str, says: str, now_ms: int) -> Step:
        """Return `step` with this run quarantined, and without what it had of it: that can't be
        written down."""
        self._step = step
        self._quarantine(lease_id, says, now_ms)
        return self._take_step()

    def _take(self, event: Event, now_ms: int) -> None:
        match event:
            case MessageArrived(message):
                self._arrived(message, now_ms)
            case Joined(broker, broker_ahead_ms, broker_reads):
                self.live = True
                self._broker_reads = broker_reads
                for each in self.runs.values():
                    each.broker_reads = broker_reads
                self._broker_ahead_ms = broker_ahead_ms
                self._joined_ms = now_ms
                self._something_moves(now_ms)
                if not self.saved.broker:
                    self.saved.broker = self._step.save.broker = broker
            case Disconnected():
                self.live = False
                self._announced = None
                self._something_moves(now_ms)
            case Tick():
                self._tick(now_ms)
            case DrainAsked():
                self._drain(event, now_ms)
            case OfferAgain():
                self._offer_again(now_ms)
            case FactsRead():
                self._facts_read(event, now_ms)
            case DeviceFailed(device_id, detail):
                self._say(f"{device_id}: {detail}")
                self.supply.fault(device_id, detail, now_ms)
                self._device_failed(device_id, detail, now_ms)
                self._update_offer(now_ms)
            case StartTested(trouble):
                self._start_tested(trouble, now_ms)
            case ImageLookedUp():
                self._looked_up(event, now_ms)
            case LookUpFailed():
                self._lookup_failed(event, now_ms)
            case PrepareDone(job_id, ready, detail):
                self._send(Prepared(job=job_id, ready=ready, detail=detail[:256]))
            case Removed(lease_id):
                self.disk_used.pop(lease_id, None)
                self._waiting.pop(lease_id, None)
                if self.runs.pop(lease_id, None):
                    self.saved.runs.pop(lease_id, None)
                    self._step.save.forget_runs.append(lease_id)
            case Quarantined(lease_id, detail):
                if lease_id in self.runs:
                    self._quarantine(lease_id, detail, now_ms)
            case _:
                run = self.runs.get(event.lease_id)
                if run:
                    self._with_run(run, partial(self._happened, run, event, now_ms), now_ms)

    def _happened(self, run: Run, event: Event, now_ms: int) -> None:
        had_advanced, before = run.advanced, run.record.phase
        run.handle(event, now_ms)
        self._judge_start(run, event, before, now_ms)
        self.images.take(run.record.image or run.record.job.image, event, now_ms)
        if isinstance(event, DiskUsed):
            self.disk_used[run.record.lease_id] = event.used_bytes
        if run.advanced and not had_advanced:
            # Somebody may be waiting for this step: it isn't left to the next beat.
            self._send_heartbeat(now_ms)
        if run.changed and run.record.phase is RunPhase.DISCARDED:
            self._step.save.drop_messages_of.append(run.record.lease_id)

    # -- what nobody had thought of ---------------------------------------------------------------

    def _with_run(self, run: Run, act: Callable[[], object], now_ms: int) -> None:
        """Do something to one run and take up what came of it. Where it raises, the run ends."""
        try:
            act()
            self._collect(run)
        except Exception as error:  # noqa: BLE001 - its run ends, not the agent
            self._quarantine(run.record.lease_id, _said(error), now_ms)

    def _quarantine(self, lease_id: str, says: str, now_ms: int) -> None:
        self._take_back(lease_id)
        run = self.runs[lease_id]
        try:
            record = self.last_saved(lease_id)
            if record is None:
                self._unsign(run.record, says)
                return
            record.cum_device_ms = max(record.cum_device_ms, run.record.cum_device_ms)
            run = self._replace(record)
            run.handle(Quarantined(lease_id, says), now_ms)
        except Exception as error:  # noqa: BLE001 - what can't end in order is dropped
            # Its end can't even be told: the broker hears nothing more of it, and concludes.
            run.messages, run.effects = [], []
            self._unexpected(lease_id, f"{says}; and its end can't be told: {_said(error)}")
            self._discard(run)
        self._collect(run)

    def _unsign(self, record: RunRecord, says: str) -> None:
        """Forget a lease that nobody outside has seen signed: the signature was taken back."""
        del self.runs[record.lease_id], self.saved.runs[record.lease_id]
        if self._step.save.epochs.pop(record.job_id, None):
            self.saved.epochs.pop(record.job_id, None)
        self._unexpected(record.lease_id, says)
        self._refuse(record.lease_id, "an unexpected error at this provider")

    def _replace(self, record: RunRecord) -> Run:
        run = Run(record, self.key, broker_reads=self._broker_reads, boot=self.boot)
        self.runs[record.lease_id] = run
        self.saved.runs[record.lease_id] = record
        return run

    def _take_back(self, lease_id: str) -> None:
        """Drop all that the step under way holds of a run: none of it was committed or sent."""
        step = self._step
        step.save.runs.pop(lease_id, None)
        step.save.queue[:] = [each for each in step.save.queue if each.lease_id != lease_id]
        for leases in (step.save.forget_runs, step.save.drop_messages_of):
            leases[:] = [each for each in leases if each != lease_id]
        step.effects[:] = [e for e in step.effects if getattr(e, "lease_id", "") != lease_id]

    def _in_memory(self, lease_id: str) -> RunRecord | None:
        run = self.runs.get(lease_id)
        return copy.deepcopy(run.record) if run else None

    def _unexpected(self, lease_id: str, text: str) -> None:
        self._step.effects.append(effects.Unexpected(lease_id, text))

    def heartbeat(self, now_ms: int) -> Heartbeat:
        """Return what the agent runs now."""
        return self._heartbeat(now_ms)[0]

    def _heartbeat(self, now_ms: int) -> tuple[Heartbeat, dict[str, str]]:
        """Return it, and of which runs nothing can be said: lease id -> why."""
        if not self.runs:
            return _IDLE_HEARTBEAT, {}
        reports: list[RunReport] = []
        failed: dict[str, str] = {}
        for lease_id, run in self.runs.items():
            if run.record.phase in (RunPhase.DISCARDED, RunPhase.ENDED):
                continue
            try:
                reports.append(run.report(now_ms, self._devices_measured))
            except Exception as error:  # noqa: BLE001 - one must not silence the others
                failed[lease_id] = _said(error)
        return Heartbeat(runs=tuple(reports[:64])), failed

    # -- messages ---------------------------------------------------------------------------------

    def _arrived(self, message: Message, now_ms: int) -> None:
        match message:
            case Welcome():
                self._welcomed(message, now_ms)
            case Assign():
                self._assigned(message, now_ms)
            case Order():
                waiting = self._waiting.get(message.lease)
                if waiting is not None and isinstance(waiting.event, MessageArrived):
                    del self._waiting[message.lease]
                    self._refuse(message.lease, "it was to stop before it was signed")
                elif self.lookups.end(message.lease) is not None:
                    self._refuse(message.lease, "it was to stop before it was signed")
                run = self.runs.get(message.lease)
                if run and run.record.lease.epoch == message.epoch:
                    order = (message.desired, message.reason, message.grace_ms)
                    self._with_run(run, partial(run.stop, *order, now_ms), now_ms)
            case CheckpointVerdict():
                run = self.runs.get(message.lease)
                if run:
                    self._with_run(run, partial(run.verdict, message, now_ms), now_ms)
            case SettlementNotice():
                self._settled(message, now_ms)
            case Prepare(job=job, checkpoint=checkpoint, image=image):
                if not self.draining:
                    self._step.effects.append(effects.PrepareJob(job, checkpoint, image))
            case Unprepare():
                self._step.effects.append(effects.UnprepareJob(message.job))
            case LogsWanted():
                self._step.effects.append(effects.SendLogs(message.lease, message.next_number))
            case _:
                pass

    def _welcomed(self, welcome: Welcome, now_ms: int) -> None:
        self.heartbeat_ms = welcome.heartbeat_ms
        self._tell_fee(welcome.fee_bps)
        held = {(lease.lease, lease.epoch) for lease in welcome.leases}
        for run in list(self.runs.values()):
            self._with_run(run, partial(self._compare, run, held, now_ms), now_ms)
        for run in self.runs.values():
            if not run.record.is_over:
                self._step.effects.append(effects.SendLogs(run.record.lease_id, -1))
        self._send_heartbeat(now_ms)
        self._announced = None
        self._update_offer(now_ms)

    def _compare(self, run: Run, held: set[tuple[str, int]], now_ms: int) -> None:
        """Go by what the broker says that we hold."""
        record = run.record
        if (record.lease_id, record.lease.epoch) in held:
            record.unlisted_since_ms = 0
        elif record.phase is RunPhase.ENDED:
            # It ended in order and may be settled any moment: its settlement is on the way.
            record.unlisted_since_ms = record.unlisted_since_ms or now_ms
        elif record.phase is not RunPhase.DISCARDED:
            self._say(f"lease {short(record.lease_id)} went elsewhere meanwhile: stopping it")
            self._discard(run)

    def _tell_fee(self, fee_bps: int) -> None:
        if fee_bps == self.fee_bps:
            return
        self.fee_bps = fee_bps
        price = self.terms.price_ucr_per_device_hour
        self._say(
            f"the broker keeps {fee_bps * 100 / BPS:g} % of each charge: of "
            f"{format_credits(price)} credits per device-hour you earn "
            f"{format_credits(price - fee_ucr(price, fee_bps))}"
        )

    def _broker_now_ms(self, now_ms: int) -> int:
        """Return what the broker's clock shows at the least: it may have been slow since we met."""
        since_ms = now_ms - self._joined_ms
        return now_ms + self._broker_ahead_ms - int(since_ms * MAX_SLEW)

    def _assigned(self, assign: Assign, now_ms: int, found: str = "") -> None:
        """Sign a lease, refuse it, or let it wait. `found`: what its job's tag means now."""
        lease_id = assign.lease.id
        if lease_id in self.runs or lease_id in self.lookups:
            return
        try:
            assigned = read_assign(assign, self.saved.broker)
        except DocumentRefused as error:
            self._refuse(lease_id, f"{error.field}: {error}" if error.field else str(error))
            return
        why = self.why_nothing_is_offered() or refusal(
            assigned,
            provider=self.key.party,
            offers=self.saved.offers,
            runs=self.saved.runs.values(),
            epochs=self.saved.epochs,
            now_ms=now_ms,
            broker_now_ms=self._broker_now_ms(now_ms),
        )
        if not why and self._looks:
            why = self.supply.why_not(assigned.lease.document.device_ids) or lacking(
                assigned, self._make_offer(now_ms)
            )
        lease, job = assigned.lease.document, assigned.job.document
        why = why or self.images.why_not(lease.image or job.image, now_ms)
        if why:
            self._refuse(lease_id, why)
            return
        if not found and image_lookups.must_look_up(job, lease, self.terms.runner):
            left_ms = lease.answer_by_ms - self._broker_now_ms(now_ms)
            self.lookups.begin(assign, job.image, left_ms, now_ms)
            self._step.effects.append(effects.LookUpImage(lease_id, job.image))
            return
        record = RunRecord(
            lease_id=lease_id,
            lease=assigned.lease.document,
            job_id=assigned.job.id,
            job=assigned.job.document,
            checkpoint=assigned.checkpoint.document if assigned.checkpoint else None,
            image=lease.image or found,
            durable_step=assigned.lease.document.start_step,
            loss_every_ms=assign.loss_every_ms,
            cpu_millis=self.terms.cpu_millis * len(assigned.lease.document.device_ids),
        )
        run = Run(
            record,
            self.key,
            broker_reads=self._broker_reads,
            prepared_tick_ms=now_ms,
            boot=self.boot,
        )
        self.runs[lease_id] = run
        self.saved.runs[lease_id] = record
        self._with_run(run, partial(self._sign, run, assign), now_ms)

    def _sign(self, run: Run, assign: Assign) -> None:
        record, lease_id = run.record, run.record.lease_id
        epoch = record.lease.epoch
        # The signature leaves this machine with the outbox, and that is in the same transaction as
        # the record that blocks the devices.
        self._queue(
            lease_id,
            LeaseAnswer(
                lease=lease_id, signed=assign.lease.countersigned(self.key), image=record.image
            ),
        )
        run.changed = True
        run.effects.append(effects.Pull(lease_id))
        self._say(
            f"job {record.job.name!r} of {short(record.job.renter)} on "
            f"{', '.join(record.lease.device_ids)}, epoch {epoch}"
        )
        self.saved.epochs[record.job_id] = self._step.save.epochs[record.job_id] = epoch

    def _refuse(self, lease_id: str, why: str, reason: Reason | None = None) -> None:
        self._say(f"refused lease {short(lease_id)}: {why}")
        answer = LeaseAnswer(lease=lease_id, signed=None, refusal=why[:256], reason=reason)
        self._queue("", answer)

    def _looked_up(self, event: ImageLookedUp, now_ms: int) -> None:
        waiting = self.lookups.end(event.lease_id)
        if waiting is None:
            return  # It was refused meanwhile.
        if can_mean(waiting.image, event.image):
            self._assigned(waiting.assign, now_ms, event.image)
        else:
            says = f"image: what was found for {waiting.image!a} is another one: {event.image!a}"
            self._refuse(event.lease_id, says, Reason.PULL_FAILED)

    def _lookup_failed(self, event: LookUpFailed, now_ms: int) -> None:
        waiting = self.lookups.end(event.lease_id)
        if waiting is not None:
            self.images.take(waiting.image, event, now_ms)
            self._refuse(event.lease_id, event.detail, event.reason)

    def _settled(self, message: SettlementNotice, now_ms: int) -> None:
        try:
            settled = open_document(message.settlement, Settlement, signed_by=(self.saved.broker,))
        except DocumentRefused as error:
            self._say(f"a settlement that is not the broker's was left aside: {error}")
            return
        self._step.save.settlements.append(message.settlement)
        document = settled.document
        self._say(
            f"lease {short(document.lease)} settled: "
            f"earned {format_credits(document.provider_ucr)} credits ({document.reason})"
        )
        run = self.runs.get(document.lease)
        if run:
            self._with_run(run, run.discard, now_ms)

    # -- time -------------------------------------------------------------------------------------

    def _tick(self, now_ms: int) -> None:
        for run in list(self.runs.values()):
            self._with_run(run, partial(self._tick_run, run, now_ms), now_ms)
        if now_ms >= self._next_heartbeat_ms():
            self._send_heartbeat(now_ms)
        for lease_id, waiting in list(self._waiting.items()):
            # Also where the clock went back.
            if not 0 <= now_ms - waiting.since_ms <= LOOK_WAIT_MS:
                del self._waiting[lease_id]
                self._take(waiting.event, now_ms)
        for late in self.lookups.over(now_ms):
            lease_id = late.assign.lease.id
            says = f"image {late.image[:100]!a}: its registry did not answer in time"
            self._lookup_failed(LookUpFailed(lease_id, Reason.PULL_FAILED, says), now_ms)
        if self.aside.test_is_due(now_ms):
            self._step.effects.append(effects.StartTest(self._all_devices()))
        self._update_offer(now_ms)

    def _tick_run(self, run: Run, now_ms: int) -> None:
        run.tick(now_ms)
        since_ms = run.record.unlisted_since_ms
        if since_ms and now_ms - since_ms > UNLISTED_MS:
            self._discard(run)

    def _next_heartbeat_ms(self) -> int:
        return self._last_heartbeat_ms + self.heartbeat_ms * (
            1 if self.runs else IDLE_HEARTBEAT_FACTOR
        )

    def _next_offer_ms(self) -> int:
        if self.why_nothing_is_offered() or not self.terms.devices:
            return NEVER_MS
        return 0 if self._last_offer_ms is None else self._last_offer_ms + OFFER_REFRESH_MS

    def quiet_until_ms(self) -> int:
        """Return the time before which a Tick does nothing, as long as no other event comes."""
        if self.runs or self._waiting or self.lookups:
            return 0
        test_ms = self.aside.next_test_ms if self.aside.is_set else NEVER_MS
        if not self.live:
            return test_ms
        return min(test_ms, self._next_heartbeat_ms(), self._next_offer_ms())

    def _send_heartbeat(self, now_ms: int) -> None:
        if self.live:
            self._last_heartbeat_ms = now_ms
            heartbeat, failed = self._heartbeat(now_ms)
            self._send(heartbeat)
            for lease_id, says in failed.items():
                self._quarantine(lease_id, says, now_ms)

    # -- the market --------------------------------------------------------------------------------

    def why_nothing_is_offered(self) -> str:
        """Return why nothing at all is offered, in words; '' if something may be."""
        if self.draining:
            return "I am being drained"
        if self.aside.is_set:
            return f"this machine has set itself aside: {self.aside.why}"
        if self.supply.engine:
            return f"the machine's engine does not answer: {self.supply.engine}"
        return ""

    def _update_offer(self, now_ms: int) -> None:
        """Bring the market to what can be offered: less at once, more after a while, and all of it
        anew in time before it expires."""
        if self.why_nothing_is_offered() or not self.terms.devices:
            self._withdraw()
            return
        if not self.live:
            return
        before = self._announced
        since_ms = now_ms - (self._last_offer_ms or 0)
        if (
            before is None
            or is_less(self.terms, before)
            or now_ms >= self._next_offer_ms()
            or (is_more(self.terms, before) and not 0 <= since_ms < BETWEEN_GAINS_MS)
        ):
            self._send_offer(now_ms)

    def _make_offer(self, now_ms: int) -> Offer:
        return make_offer(
            self.terms,
            provider=self.key.party,
            broker=self.saved.broker,
            sequence=self.saved.offer_sequence + 1,
            now_ms=now_ms,
        )

    def _send_offer(self, now_ms: int) -> None:
        offer = self._make_offer(now_ms)
        sequence = offer.sequence
        signed = sign_document(offer, self.key)
        issued = IssuedOffer(id=signed.id, sequence=sequence, envelope=signed.envelope)
        self.saved.offers = [*self.saved.offers, issued][-KEEP_OFFERS:]
        self.saved.offer_sequence = sequence
        self._step.save.offers = self.saved.offers
        self._step.save.offer_sequence = sequence
        self._last_offer_ms = now_ms
        self._announced = self.terms
        self._withdrawn = False
        self._send(Announce(offer=signed.envelope))

    def _offer_again(self, now_ms: int) -> None:
        self.draining = self._drain_wait = None
        self._told_done = False
        if self.saved.reclaimed:
            self.saved.reclaimed = self._step.save.reclaimed = False
        self.supply.believe_all()
        self.aside.try_now(now_ms)
        self._announced = None
        self._update_offer(now_ms)
        self._step.effects.append(effects.ReadFacts())

    # -- the machine -------------------------------------------------------------------------------

    def _needs_a_look(self, event: Event, now_ms: int) -> bool:
        """Keep what is to be judged by how the machine is now until that was seen."""
        if not self._looks:
            return False
        match event:
            case MessageArrived(Assign() as assign) if not self.why_nothing_is_offered():
                lease_id = assign.lease.id
                if lease_id in self.runs or lease_id in self.lookups:
                    return False
            case Observed(lease_id, running=False, end=end) if not end or end.exit_code != 0:
                if not self._holds_gpu(lease_id):
                    return False
            case PreparationFailed(lease_id, Reason.START_FAILED):
                if not self._holds_gpu(lease_id):
                    return False
            case _:
                return False
        self._waiting.setdefault(lease_id, _Waiting(event, now_ms))
        return True

    def _holds_gpu(self, lease_id: str) -> bool:
        run = self.runs.get(lease_id)
        return run is not None and CPU_DEVICE not in run.record.lease.device_ids

    def _facts_read(self, event: FactsRead, now_ms: int) -> None:
        self._looks = True
        self._devices_measured = devices_measured(event.facts.devices, event.looked_ms)
        before, missing = self.supply.engine, dict(self.supply.missing)
        held = [
            Held(
                run.record.lease.device_ids,
                run.record.job.resources.memory_bytes,
                self.disk_used.get(lease_id, 0),
            )
            for lease_id, run in self.runs.items()
            if run.record.phase in (*LIVE, RunPhase.FINISHING)
        ]
        for lost in self.supply.take(event.facts, held, now_ms):
            self._device_failed(lost.id, lost.says, now_ms)
        for id, one in self.supply.missing.items():
            if id not in missing:
                self._say(f"{id} is not offered: {one.says}")
        for id in missing.keys() - self.supply.missing.keys():
            self._say(f"{id} can be offered again")
        if self.supply.engine and not before:
            self._say(f"nothing is offered: the engine does not answer: {self.supply.engine}")
        elif before and not self.supply.engine:
            self._say("the engine answers again")
        self._update_offer(now_ms)
        for lease_id, waiting in list(self._waiting.items()):
            if event.looked_ms >= waiting.since_ms:
                del self._waiting[lease_id]
                self._blame_doubtful(lease_id, now_ms)
                self._take(waiting.event, now_ms)

    def _blame_doubtful(self, lease_id: str, now_ms: int) -> None:
        """Its end came while a device of its did not answer: that is what it is judged by."""
        run = self.runs.get(lease_id)
        for id in run.record.lease.device_ids if run else ():
            if run and id in self.supply.missing:
                says = f"{id}: {self.supply.missing[id].says}"
                self._with_run(run, partial(run.device_failed, says, now_ms), now_ms)

    def _device_failed(self, device_id: str, says: str, now_ms: int) -> None:
        for run in list(self.runs.values()):
            if device_id in run.record.lease.device_ids:
                why = f"{device_id}: {says}"
                self._with_run(run, partial(run.device_failed, why, now_ms), now_ms)

    def _all_devices(self) -> tuple[str, ...]:
        return tuple(device.id for device in self.terms.devices)

    def _judge_start(self, run: Run, event: Event, before: RunPhase, now_ms: int) -> None:
        record = run.record
        if before is RunPhase.STARTING and record.phase not in (before, RunPhase.ENDED):
            self.aside.started()
        elif (
            isinstance(event, PreparationFailed)
            and record.phase is not before
            and record.reason is Reason.START_FAILED
            and self.aside.start_failed(record.job_id, event.detail, now_ms)
        ):
            self._say(
                "nothing is offered for now: the last jobs could not be started here, so it is "
                f"this machine ({event.detail}). Mend that (the engine's own log says more: "
                "`journalctl -u docker`); the agent tests itself and offers again, and "
                "`sublet provider offer` has it try at once"
            )
            self._update_offer(now_ms)

    def _start_tested(self, trouble: str, now_ms: int) -> None:
        if not self.aside.is_set:
            return
        if self.aside.tested(trouble, now_ms):
            self._say("a start test went well: offering again")
            self._update_offer(now_ms)
        else:
            wait_s = max(0, self.aside.next_test_ms - now_ms) // 1000
            self._say(f"a start test failed ({trouble}); the next one in {wait_s} s")

    # -- drain ------------------------------------------------------------------------------------

    def _drain(self, asked: DrainAsked, now_ms: int) -> None:
        self.draining = asked
        self._told_done = False
        self._drain_wait = draining.Drain(now_ms) if asked.then_stop else None
        if not asked.then_stop:
            self.saved.reclaimed = self._step.save.reclaimed = True
        self._withdraw()
        for run in list(self.runs.values()):
            ask = partial(run.stop, "drain", asked.reason, asked.grace_ms, now_ms)
            self._with_run(run, ask, now_ms)

    def _withdraw(self) -> None:
        if not self._withdrawn and self.saved.offer_sequence:
            self._withdrawn = True
            self._announced = None
            self._queue("", Withdraw(offer_sequence=self.saved.offer_sequence))

    def _something_moves(self, now_ms: int) -> None:
        if self._drain_wait is not None:
            self._drain_wait.moved_ms = now_ms

    def waits_for(self) -> tuple[str, ...]:
        """Return what a drain waits for, a line each; () if it doesn't, or isn't asked for."""
        records = [run.record for run in self.runs.values()]
        return draining.waits_for(records, live=self.live) if self._drain_wait else ()

    def _check_drained(self, now_ms: int) -> None:
        drain = self._drain_wait
        if drain is None or self._told_done:
            return
        waits_for = self.waits_for()
        for line in waits_for:
            if line not in drain.told:
                self._say(f"draining: waiting for {line}")
        if waits_for != drain.told:
            drain.told, drain.moved_ms = waits_for, now_ms
        records = [run.record for run in self.runs.values()]
        if drain.is_over(records, live=self.live, now_ms=now_ms):
            self._told_done = True
            self._step.effects.append(effects.Done())

    # -- out --------------------------------------------------------------------------------------

    def _discard(self, run: Run) -> None:
        run.discard()
        self._step.save.drop_messages_of.append(run.record.lease_id)

    def _collect(self, run: Run) -> None:
        record = run.record
        if run.record.phase is RunPhase.DISCARDED and run.changed:
            run.messages.clear()
        for message in run.messages:
            self._queue(record.lease_id, message)
        if run.changed:
            self._step.save.runs[record.lease_id] = record
        if run.effects:
            self._step.effects += run.effects
            run.effects = []
        if run.messages:
            run.messages = []
        run.changed = False

    def _queue(self, lease_id: str, message: Message) -> None:
        mid = self.saved.next_mid
        self.saved.next_mid = self._step.save.next_mid = mid + 1
        self._step.save.queue.append(Queued(mid, lease_id, message))

    def _send(self, message: Message) -> None:
        self._step.effects.append(effects.Send(message))

    def _say(self, text: str) -> None:
        self._step.effects.append(effects.Say(text))

    def _take_step(self) -> Step:
        if self._step.empty:
            return effects.NOTHING
        step, self._step = self._step, Step()
        return step


def _remembered(saved: Saved) -> dict[str, int]:
    """Return the devices of the last offer, and what memory it said that each has."""
    if not saved.offers:
        return {}
    try:
        offer = open_document(saved.offers[-1].envelope, Offer).document
    except DocumentRefused:
        return {}  # An older release's: it is measured anew.
    return {device.id: device.memory_bytes for device in offer.devices}


def devices_in_use(runs: Mapping[str, RunRecord]) -> dict[str, str]:
    """Return device id -> lease id for all that is leased."""
    return {
        device: record.lease_id
        for record in runs.values()
        if not record.is_over
        for device in record.lease.device_ids
    }


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
