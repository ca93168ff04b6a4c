"""The whole agent as one pure object: leases, runs, offers, drain. Events in, a Step out.

The shell commits `step.save` in one transaction, then acknowledges the message, then performs
`step.effects`. A crash between any two of these loses nothing: after a restart `started` looks at
what is on disk and at what the runner still has, and asks for the missing effects again.
"""

from collections.abc import Iterable, Mapping

from sublet_agent.core import effects
from sublet_agent.core.effects import Queued, Step
from sublet_agent.core.events import (
    Arrived,
    Disconnected,
    DrainAsked,
    Event,
    Joined,
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
from sublet_agent.core.run import ORPHAN_MS, RunMachine
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
IDLE_BEATS = 3
"""An agent that runs nothing sends every so manieth heartbeat: nobody counts its silence, and its
connection has pings. A broker drops who says nothing for five."""


_IDLE = Heartbeat(runs=())


class AgentCore:
    """One agent at one broker. `saved` is what the journal holds; it is changed in step."""

    def __init__(self, terms: Terms, key: SigningKey, saved: Saved) -> None:
        self.terms = terms
        self.key = key
        self.saved = saved
        self.machines = {
            lease_id: RunMachine(record, key) for lease_id, record in saved.runs.items()
        }
        self.live = False
        self.heartbeat_ms = 3_000
        self.draining: DrainAsked | None = None
        self._heartbeat_sent_ms = 0
        self._offered_ms: int | None = None
        self._withdrawn = False
        self._done = False
        self._broker_ahead_ms = 0
        self._joined_ms = 0
        self._step = Step()

    # -- in ---------------------------------------------------------------------------------------

    def started(self, found: Iterable[str], now_ms: int) -> tuple[Step, list[str]]:
        """After a start of the agent: take up what was running. `found` are the lease ids that the
        runner still has. Returns the first Step, and those of `found` that nobody knows (remove
        them)."""
        for machine in self.machines.values():
            machine.resume(now_ms)
            self._collect(machine)
        strangers = [lease_id for lease_id in found if lease_id not in self.machines]
        return self._taken(), strangers

    def handle(self, event: Event, now_ms: int) -> Step:
        """Take one event."""
        match event:
            case Arrived(message):
                self._arrived(message, now_ms)
            case Joined(broker, broker_ahead_ms):
                self.live = True
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
                self._withdrawn = self._done = False
                self._offer(now_ms)
            case PrepareDone(job_id, ready, detail):
                self._send(Prepared(job=job_id, ready=ready, detail=detail[:256]))
            case Removed(lease_id):
                if self.machines.pop(lease_id, None):
                    self.saved.runs.pop(lease_id, None)
                    self._step.save.forget_runs.append(lease_id)
            case _:
                machine = self.machines.get(event.lease_id)
                if machine:
                    advanced = machine.advanced
                    machine.handle(event, now_ms)
                    if machine.advanced and not advanced:
                        # Somebody may be waiting for this step: it isn't left to the next beat.
                        self._beat(now_ms)
                    if machine.changed and machine.record.phase is RunPhase.DISCARDED:
                        self._step.save.drop_messages_of.append(event.lease_id)
                    self._collect(machine)
        self._check_done()
        return self._taken()

    def heartbeat(self) -> Heartbeat:
        """Return what the agent runs now."""
        if not self.machines:
            return _IDLE
        reports = [
            machine.report()
            for machine in self.machines.values()
            if machine.record.phase not in (RunPhase.DISCARDED, RunPhase.ENDED)
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
                machine = self.machines.get(message.lease)
                if machine and machine.record.lease.epoch == message.epoch:
                    machine.stop(message.desired, message.reason, message.grace_ms, now_ms)
                    self._collect(machine)
            case CheckpointVerdict():
                machine = self.machines.get(message.lease)
                if machine:
                    machine.verdict(message, now_ms)
                    self._collect(machine)
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
        for machine in self.machines.values():
            record = machine.record
            if (record.lease_id, record.lease.epoch) in held:
                record.orphaned_ms = 0
            elif record.phase is RunPhase.ENDED:
                # It ended in order and may be settled any moment: its settlement is on the way.
                record.orphaned_ms = record.orphaned_ms or now_ms
            elif record.phase is not RunPhase.DISCARDED:
                self._say(f"lease {short(record.lease_id)} went elsewhere meanwhile: stopping it")
                self._discard(machine)
            self._collect(machine)
        for machine in self.machines.values():
            if not machine.record.over:
                self._step.effects.append(effects.SendLogs(machine.record.lease_id, -1))
        self._beat(now_ms)
        if self.draining:
            self._withdraw()
        else:
            self._offer(now_ms)

    def _broker_now_ms(self, now_ms: int) -> int:
        """Return what the broker's clock shows at the least: it may have been slow since we met."""
        since_ms = now_ms - self._joined_ms
        return now_ms + self._broker_ahead_ms - int(since_ms * MAX_SLEW)

    def _assigned(self, assign: Assign, now_ms: int) -> None:
        lease_id = assign.lease.id
        if lease_id in self.machines:
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
        machine = RunMachine(record, self.key)
        self.machines[lease_id] = machine
        self.saved.runs[lease_id] = record
        epoch = assigned.lease.document.epoch
        self.saved.epochs[record.job_id] = self._step.save.epochs[record.job_id] = epoch
        # The signature leaves this machine with the outbox, and that is in the same transaction as
        # the record that blocks the devices.
        self._queue(
            lease_id, LeaseAnswer(lease=lease_id, signed=assign.lease.countersigned(self.key))
        )
        machine.changed = True
        machine.effects.append(effects.Pull(lease_id))
        self._say(
            f"job {record.job.name!r} of {short(record.job.renter)} on "
            f"{', '.join(record.lease.device_ids)}, epoch {epoch}"
        )
        self._collect(machine)

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
        machine = self.machines.get(document.lease)
        if machine:
            machine.discard()
            self._collect(machine)

    # -- time -------------------------------------------------------------------------------------

    def _tick(self, now_ms: int) -> None:
        for machine in list(self.machines.values()):
            machine.tick(now_ms)
            record = machine.record
            if record.orphaned_ms and now_ms - record.orphaned_ms > ORPHAN_MS:
                self._discard(machine)
            self._collect(machine)
        if now_ms >= self._beats_ms():
            self._beat(now_ms)
        if self.live and not self.draining and now_ms >= self._offers_ms():
            self._offer(now_ms)

    def _beats_ms(self) -> int:
        return self._heartbeat_sent_ms + self.heartbeat_ms * (1 if self.machines else IDLE_BEATS)

    def _offers_ms(self) -> int:
        return 0 if self._offered_ms is None else self._offered_ms + OFFER_REFRESH_MS

    def quiet_until_ms(self) -> int:
        """Return the time before which a Tick does nothing, as long as no other event comes."""
        if self.machines:
            return 0
        if not self.live:
            return NEVER_MS
        return self._beats_ms() if self.draining else min(self._beats_ms(), self._offers_ms())

    def _beat(self, now_ms: int) -> None:
        if self.live:
            self._heartbeat_sent_ms = now_ms
            self._send(self.heartbeat())

    def _offer(self, now_ms: int) -> None:
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
        self._offered_ms = now_ms
        self._send(Announce(offer=signed.envelope))

    # -- drain ------------------------------------------------------------------------------------

    def _drain(self, asked: DrainAsked, now_ms: int) -> None:
        self.draining = asked
        self._withdraw()
        for machine in self.machines.values():
            machine.stop("drain", asked.reason, asked.grace_ms, now_ms)
            self._collect(machine)

    def _withdraw(self) -> None:
        if not self._withdrawn and self.saved.offer_sequence:
            self._withdrawn = True
            self._queue("", Withdraw(offer_sequence=self.saved.offer_sequence))

    def _check_done(self) -> None:
        if self.draining and self.draining.then_stop and not self.machines and not self._done:
            self._done = True
            self._step.effects.append(effects.Done())

    # -- out --------------------------------------------------------------------------------------

    def _discard(self, machine: RunMachine) -> None:
        machine.discard()
        self._step.save.drop_messages_of.append(machine.record.lease_id)

    def _collect(self, machine: RunMachine) -> None:
        record = machine.record
        if machine.record.phase is RunPhase.DISCARDED and machine.changed:
            machine.messages.clear()
        for message in machine.messages:
            self._queue(record.lease_id, message)
        if machine.changed:
            self._step.save.runs[record.lease_id] = record
        if machine.effects:
            self._step.effects += machine.effects
            machine.effects = []
        if machine.messages:
            machine.messages = []
        machine.changed = False

    def _queue(self, lease_id: str, message: Message) -> None:
        mid = self.saved.next_mid
        self.saved.next_mid = self._step.save.next_mid = mid + 1
        self._step.save.queue.append(Queued(mid, lease_id, message))

    def _send(self, message: Message) -> None:
        self._step.effects.append(effects.Send(message))

    def _say(self, text: str) -> None:
        self._step.effects.append(effects.Say(text))

    def _taken(self) -> Step:
        if self._step.empty:
            return effects.NOTHING
        step, self._step = self._step, Step()
        return step


def devices_in_use(runs: Mapping[str, RunRecord]) -> dict[str, str]:
    """Return device id -> lease id for all that is leased."""
    return {
        device: record.lease_id
        for record in runs.values()
        if not record.over
        for device in record.lease.device_ids
    }
