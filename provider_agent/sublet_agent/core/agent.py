"""The whole agent as one pure object: leases, runs, offers, drain. Events in, a Step out.

The shell commits `step.save` in one transaction, then acknowledges the message, then performs
`step.effects`. A crash between any two of these loses nothing: after a restart `started` looks at
what is on disk and at what the runner still has, and asks for the missing effects again.
"""

from collections.abc import Iterable, Mapping

from sublet_agent.core import effects
from sublet_agent.core.effects import Queued, Step
from sublet_agent.core.events import (
    Disconnected,
    DrainAsked,
    Event,
    Joined,
    MessageArrived,
    OfferAgain,
    PrepareDone,
    Removed,
    Tick,
)
from sublet_agent.core.offers import (
    KEEP_OFFERS,
    OFFER_REFRESH_MS,
    Terms,
    make_offer,
    read_assign,
    refusal,
)
from sublet_agent.core.records import IssuedOffer, RunRecord, Saved
from sublet_agent.core.run import UNLISTED_MS, Run
from sublet_agent.core.run_phases import RunPhase
from sublet_contracts.amounts import format_credits
from sublet_contracts.documents import (
    DocumentRefused,
    Settlement,
    open_document,
    sign_document,
)
from sublet_contracts.keys import SigningKey, short
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


class AgentCore:
    """One agent at one broker. `saved` is what the journal holds; it is changed in step."""

    def __init__(self, terms: Terms, key: SigningKey, saved: Saved) -> None:
        self.terms = terms
        self.key = key
        self.saved = saved
        self.runs = {lease_id: Run(record, key) for lease_id, record in saved.runs.items()}
        self.live = False
        self.heartbeat_ms = 3_000
        self.draining: DrainAsked | None = None
        self._last_heartbeat_ms = 0
        self._last_offer_ms: int | None = None
        self._withdrawn = False
        self._told_done = False
        self._broker_ahead_ms = 0
        self._broker_reads: Reads = {}
        self._joined_ms = 0
        self._step = Step()

    # -- in ---------------------------------------------------------------------------------------

    def started(self, found: Iterable[str], now_ms: int) -> tuple[Step, list[str]]:
        """After a start of the agent: take up what was running. `found` are the lease ids that the
        runner still has. Returns the first Step, and those of `found` that nobody knows (remove
        them)."""
        for run in self.runs.values():
            run.resume(now_ms)
            self._collect(run)
        strangers = [lease_id for lease_id in found if lease_id not in self.runs]
        return self._take_step(), strangers

    def handle(self, event: Event, now_ms: int) -> Step:
        """Take one event."""
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
                if not self.saved.broker:
                    self.saved.broker = self._step.save.broker = broker
            case Disconnected():
                self.live = False
            case Tick():
                self._tick(now_ms)
            case DrainAsked():
                self._drain(event, now_ms)
            case OfferAgain():
                self.draining = None
                self._withdrawn = self._told_done = False
                self._send_offer(now_ms)
            case PrepareDone(job_id, ready, detail):
                self._send(Prepared(job=job_id, ready=ready, detail=detail[:256]))
            case Removed(lease_id):
                if self.runs.pop(lease_id, None):
                    self.saved.runs.pop(lease_id, None)
                    self._step.save.forget_runs.append(lease_id)
            case _:
                run = self.runs.get(event.lease_id)
                if run:
                    had_advanced = run.advanced
                    run.handle(event, now_ms)
                    if run.advanced and not had_advanced:
                        # Somebody may be waiting for this step: it isn't left to the next beat.
                        self._send_heartbeat(now_ms)
                    if run.changed and run.record.phase is RunPhase.DISCARDED:
                        self._step.save.drop_messages_of.append(event.lease_id)
                    self._collect(run)
        self._check_drained()
        return self._take_step()

    def heartbeat(self) -> Heartbeat:
        """Return what the agent runs now."""
        if not self.runs:
            return _IDLE_HEARTBEAT
        reports = [
            run.report()
            for run in self.runs.values()
            if run.record.phase not in (RunPhase.DISCARDED, RunPhase.ENDED)
        ]
        return Heartbeat(runs=tuple(reports[:64]))

    # -- messages ---------------------------------------------------------------------------------

    def _arrived(self, message: Message, now_ms: int) -> None:
        match message:
            case Welcome():
                self._welcomed(message, now_ms)
            case Assign():
                self._assigned(message, now_ms)
            case Order():
                run = self.runs.get(message.lease)
                if run and run.record.lease.epoch == message.epoch:
                    run.stop(message.desired, message.reason, message.grace_ms, now_ms)
                    self._collect(run)
            case CheckpointVerdict():
                run = self.runs.get(message.lease)
                if run:
                    run.verdict(message, now_ms)
                    self._collect(run)
            case SettlementNotice():
                self._settled(message)
            case Prepare():
                if not self.draining:
                    self._step.effects.append(effects.PrepareJob(message.job, message.checkpoint))
            case Unprepare():
                self._step.effects.append(effects.UnprepareJob(message.job))
            case LogsWanted():
                self._step.effects.append(effects.SendLogs(message.lease, message.next_number))
            case _:
                pass

    def _welcomed(self, welcome: Welcome, now_ms: int) -> None:
        self.heartbeat_ms = welcome.heartbeat_ms
        held = {(lease.lease, lease.epoch) for lease in welcome.leases}
        for run in self.runs.values():
            record = run.record
            if (record.lease_id, record.lease.epoch) in held:
                record.unlisted_since_ms = 0
            elif record.phase is RunPhase.ENDED:
                # It ended in order and may be settled any moment: its settlement is on the way.
                record.unlisted_since_ms = record.unlisted_since_ms or now_ms
            elif record.phase is not RunPhase.DISCARDED:
                self._say(f"lease {short(record.lease_id)} went elsewhere meanwhile: stopping it")
                self._discard(run)
            self._collect(run)
        for run in self.runs.values():
            if not run.record.is_over:
                self._step.effects.append(effects.SendLogs(run.record.lease_id, -1))
        self._send_heartbeat(now_ms)
        if self.draining:
            self._withdraw()
        else:
            self._send_offer(now_ms)

    def _broker_now_ms(self, now_ms: int) -> int:
        """Return what the broker's clock shows at the least: it may have been slow since we met."""
        since_ms = now_ms - self._joined_ms
        return now_ms + self._broker_ahead_ms - int(since_ms * MAX_SLEW)

    def _assigned(self, assign: Assign, now_ms: int) -> None:
        lease_id = assign.lease.id
        if lease_id in self.runs:
            return
        try:
            assigned = read_assign(assign, self.saved.broker)
        except DocumentRefused as error:
            self._refuse(lease_id, f"{error.field}: {error}" if error.field else str(error))
            return
        why = (
            "I am being drained"
            if self.draining
            else refusal(
                assigned,
                provider=self.key.party,
                offers=self.saved.offers,
                runs=self.saved.runs.values(),
                epochs=self.saved.epochs,
                now_ms=now_ms,
                broker_now_ms=self._broker_now_ms(now_ms),
            )
        )
        if why:
            self._refuse(lease_id, why)
            return
        record = RunRecord(
            lease_id=lease_id,
            lease=assigned.lease.document,
            job_id=assigned.job.id,
            job=assigned.job.document,
            checkpoint=assigned.checkpoint.document if assigned.checkpoint else None,
            durable_step=assigned.lease.document.start_step,
        )
        run = Run(record, self.key, broker_reads=self._broker_reads)
        self.runs[lease_id] = run
        self.saved.runs[lease_id] = record
        epoch = assigned.lease.document.epoch
        self.saved.epochs[record.job_id] = self._step.save.epochs[record.job_id] = epoch
        # The signature leaves this machine with the outbox, and that is in the same transaction as
        # the record that blocks the devices.
        self._queue(
            lease_id, LeaseAnswer(lease=lease_id, signed=assign.lease.countersigned(self.key))
        )
        run.changed = True
        run.effects.append(effects.Pull(lease_id))
        self._say(
            f"job {record.job.name!r} of {short(record.job.renter)} on "
            f"{', '.join(record.lease.device_ids)}, epoch {epoch}"
        )
        self._collect(run)

    def _refuse(self, lease_id: str, why: str) -> None:
        self._say(f"refused lease {short(lease_id)}: {why}")
        self._queue("", LeaseAnswer(lease=lease_id, signed=None, refusal=why[:256]))

    def _settled(self, message: SettlementNotice) -> None:
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
            run.discard()
            self._collect(run)

    # -- time -------------------------------------------------------------------------------------

    def _tick(self, now_ms: int) -> None:
        for run in list(self.runs.values()):
            run.tick(now_ms)
            record = run.record
            if record.unlisted_since_ms and now_ms - record.unlisted_since_ms > UNLISTED_MS:
                self._discard(run)
            self._collect(run)
        if now_ms >= self._next_heartbeat_ms():
            self._send_heartbeat(now_ms)
        if self.live and not self.draining and now_ms >= self._next_offer_ms():
            self._send_offer(now_ms)

    def _next_heartbeat_ms(self) -> int:
        return self._last_heartbeat_ms + self.heartbeat_ms * (
            1 if self.runs else IDLE_HEARTBEAT_FACTOR
        )

    def _next_offer_ms(self) -> int:
        return 0 if self._last_offer_ms is None else self._last_offer_ms + OFFER_REFRESH_MS

    def quiet_until_ms(self) -> int:
        """Return the time before which a Tick does nothing, as long as no other event comes."""
        if self.runs:
            return 0
        if not self.live:
            return NEVER_MS
        return (
            self._next_heartbeat_ms()
            if self.draining
            else min(self._next_heartbeat_ms(), self._next_offer_ms())
        )

    def _send_heartbeat(self, now_ms: int) -> None:
        if self.live:
            self._last_heartbeat_ms = now_ms
            self._send(self.heartbeat())

    def _send_offer(self, now_ms: int) -> None:
        if not self.live or not self.terms.devices:
            return
        sequence = self.saved.offer_sequence + 1
        offer = make_offer(
            self.terms,
            provider=self.key.party,
            broker=self.saved.broker,
            sequence=sequence,
            now_ms=now_ms,
        )
        signed = sign_document(offer, self.key)
        issued = IssuedOffer(id=signed.id, sequence=sequence, envelope=signed.envelope)
        self.saved.offers = [*self.saved.offers, issued][-KEEP_OFFERS:]
        self.saved.offer_sequence = sequence
        self._step.save.offers = self.saved.offers
        self._step.save.offer_sequence = sequence
        self._last_offer_ms = now_ms
        self._send(Announce(offer=signed.envelope))

    # -- drain ------------------------------------------------------------------------------------

    def _drain(self, asked: DrainAsked, now_ms: int) -> None:
        self.draining = asked
        self._withdraw()
        for run in self.runs.values():
            run.stop("drain", asked.reason, asked.grace_ms, now_ms)
            self._collect(run)

    def _withdraw(self) -> None:
        if not self._withdrawn and self.saved.offer_sequence:
            self._withdrawn = True
            self._queue("", Withdraw(offer_sequence=self.saved.offer_sequence))

    def _check_drained(self) -> None:
        if self.draining and self.draining.then_stop and not self.runs and not self._told_done:
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


def devices_in_use(runs: Mapping[str, RunRecord]) -> dict[str, str]:
    """Return device id -> lease id for all that is leased."""
    return {
        device: record.lease_id
        for record in runs.values()
        if not record.is_over
        for device in record.lease.device_ids
    }
