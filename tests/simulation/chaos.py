"""The faults, about one a minute, each drawn among those that are switched on."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from sublet_agent.core import events
from sublet_agent.core.offers import read_assign
from sublet_agent.core.records import RunRecord
from sublet_agent.core.run_phases import LIVE, RunPhase
from sublet_broker.market.facts import CheckpointFact
from sublet_broker.service.errors import Refusal
from sublet_contracts.digests import digest_of
from sublet_contracts.documents import (
    Checkpoint,
    CheckpointKind,
    Receipt,
    Signed,
    read_document,
    sign_document,
)
from sublet_contracts.wire import (
    Assign,
    CheckpointUploaded,
    Heartbeat,
    LeaseAnswer,
    Message,
    ReceiptIssued,
    RunChanged,
    RunReport,
)
from tests.simulation.broker import BrokerAway
from tests.simulation.disk import FSYNCS
from tests.simulation.jobs import tree
from tests.simulation.mishaps import Mishaps
from tests.simulation.store import UNKEPT

if TYPE_CHECKING:
    from tests.simulation.agents import AgentHost
    from tests.simulation.market import Market

AMBIENT = frozenset({"renter-mute", "bad-jobs", "rewrite"})
"""Not events: properties of a market from its beginning."""

PARTIAL: tuple[CheckpointKind, ...] = ("outputs", "partial-outputs")
LAST_STEP = 10**15 - 1
"""what a checkpoint's folder can be called at most"""
MOST = 2**53 - 1
"""what a document can hold at most"""

REBOOT_MS, HOUR_MS = 120_000, 3_600_000

COUNTED_LATER = frozenset({"two-leases"})
"""They come to nothing where the market gives them no opportunity."""


class Chaos(Mishaps):
    """Draws what goes wrong next."""

    def __init__(self, market: Market) -> None:
        self.market = market
        self.engine = market.engine
        self.names = sorted(market.plan.faults - AMBIENT)
        self.over = False
        self._again = 10**9

    def begin(self) -> None:
        """Faults come from now on."""
        if self.names:
            self._plan()

    def _plan(self) -> None:
        every_ms = self.market.plan.fault_every_ms
        self.engine.after(int(self.engine.random.expovariate(1 / every_ms)) + 1, self._happen)

    def _happen(self) -> None:
        if self.over:
            return
        name = self.engine.random.choice(self.names)
        if name not in COUNTED_LATER:
            self.market.count(name)
        self.engine.say(f"FAULT {name}")
        getattr(self, "_" + name.replace("-", "_"))()
        self._plan()

    def calm(self) -> None:
        """The faults stop: everything works and everybody is honest from here on."""
        self.over = True
        market = self.market
        self.engine.say("the faults stop")
        market.broker.store.doom.lift()
        market.broker.store.full_until_ms = market.broker.store.away_until_ms = 0
        market.broker.store.breaks_in, market.broker.store.breaks_at = 0, None
        market.broker.disk.calm()
        market.broker.puts.troubles = 0
        market.broker.wall_offset_ms = 0
        # A broker that lost time while its wall clock was wrong is restarted by its operator.
        market.broker.die(1_000)
        market.broker.start()
        market.registry.calm()
        for agent in market.agents:
            agent.calm()
        for renter in market.renters:
            renter.mute = False
            renter.generous = True
            renter.fund(200_000_000)

    def _put(self) -> None:
        self.market.broker.puts.troubles = self.engine.draw_ms(1, 6)

    def _sweeper(self) -> None:
        self.market.broker.blobs.sweeps_in = self.engine.draw_ms(1, 12)

    # -- the network --------------------------------------------------------------------------

    def _break(self) -> None:
        self._agent().break_wire(late=self.engine.happens(0.6))

    def _delay(self) -> None:
        line = self._agent().line
        line.slow_ms = self.engine.draw_ms(500, 7_000)
        line.slow_until_ms = self.engine.now_ms + self.engine.draw_ms(10_000, 180_000)

    def _partition(self) -> None:
        """At once; or as a machine begins to pull, which takes all of its line."""
        if self.engine.happens(0.6):
            self._block(up=True, down=True)
        else:
            self._busy_agent().pull_blocks_ms = self.engine.draw_ms(10_000, 50_000)

    def _one_way(self) -> None:
        up = self.engine.happens(0.5)
        self._block(up=up, down=not up)

    def _block(self, *, up: bool, down: bool) -> None:
        now_ms = self.engine.now_ms
        self._agent().line.block(now_ms, now_ms + self._span_ms(), up=up, down=down)

    def _span_ms(self) -> int:
        """A blip, something near the patience, or a long while."""
        kind = self.engine.random.random()
        if kind < 0.4:
            return self.engine.draw_ms(500, 9_000)
        return self.engine.draw_ms(9_000, 70_000 if kind < 0.9 else 400_000)

    def _repeat(self) -> None:
        agent = self._agent()
        if agent.up and agent.live and agent.past:
            for _ in range(self.engine.draw_ms(1, 6)):
                self._say(agent, self.engine.random.choice(agent.past))

    def _say(self, agent: AgentHost, message: Message) -> None:
        self._again += 1
        agent.say_again(message, self._again)

    # -- the broker ---------------------------------------------------------------------------

    def _broker_crash(self) -> None:
        if self.engine.happens(0.25):
            self._crash_at_the_disk()
        else:
            self._crash_at_a_commit()

    def _crash_at_a_commit(self) -> None:
        doom = self.market.broker.store.doom
        if self.engine.happens(0.3):
            doom.at_new = True
            return
        doom.passes_common = self.engine.happens(0.7)
        doom.countdown = self.engine.draw_ms(1, 4 if doom.passes_common else 12)

    def _crash_at_the_disk(self) -> None:
        doom = self.market.broker.disk.doom
        if self.engine.happens(0.2):
            doom.at_new = True
            return
        # A put has ten crash points, and the first ones of a market some more.
        doom.countdown = self.engine.draw_ms(1, 12)

    def _power_cut(self) -> None:
        host = self.market.broker
        host.disk.power_fails = True
        kind = self.engine.random.random()
        if kind < 0.3:
            self._crash_at_the_disk()
        elif kind < 0.5:
            self._crash_at_a_commit()
        elif host.up:
            host.die(self.engine.draw_ms(5_000, 120_000))
        else:
            host.disk.died()

    def _bad_fsync(self) -> None:
        """The next one, or one of those that come seldom."""
        disk = self.market.broker.disk
        disk.fsync_fails_of = self.engine.random.choice(("", *FSYNCS))
        disk.fsync_fails_in = self.engine.draw_ms(1, 3)

    def _broker_full(self) -> None:
        span_ms = self.engine.draw_ms(1_000, 60_000)
        self.market.broker.store.full_until_ms = self.engine.now_ms + span_ms
        if "shard" in self.names and self.engine.happens(0.5):
            self._shard()  # Ray's files lie there too

    def _database(self) -> None:
        if "shard-slow" in self.names and self.engine.happens(0.5):
            self.market.broker.ray.stumbles_ms = self.engine.draw_ms(500, 12_000)
            return
        store = self.market.broker.store
        kind = self.engine.random.random()
        span_ms = 0 if kind < 0.3 else self.engine.draw_ms(200, 5_000 if kind < 0.7 else 90_000)
        if self.engine.happens(0.3):
            # Where a checkpoint is noted, or judged: few commits are, and much hangs on them.
            store.breaks_at, store.breaks_for_ms = CheckpointFact, span_ms
        elif self.engine.happens(0.6):
            store.breaks_in, store.breaks_for_ms = self.engine.draw_ms(1, 12), span_ms
        else:
            store.away_until_ms = self.engine.now_ms + span_ms

    def _bit_flip(self) -> None:
        disk = self.market.broker.disk
        names = disk.names()
        if names:
            disk.flip(self.engine.random.choice(names))

    def _blackout(self) -> None:
        self.market.broker.die(self.engine.draw_ms(30_000, 900_000))

    def _shard(self) -> None:
        ray = self.market.broker.ray
        if self.engine.happens(0.6):
            ray.doom.countdown = self.engine.draw_ms(1, 4)
        elif ray.host is not None:
            self.engine.random.choice(ray.host.keeper.actors).die()

    def _shard_slow(self) -> None:
        for _ in range(self.engine.draw_ms(1, 20)):
            self.engine.after(self.engine.draw_ms(1, 240_000), self._slow_shard)

    def _slow_shard(self) -> None:
        host = self.market.broker.ray.host
        if host is None or self.over:
            return
        actor = self.engine.random.choice(host.keeper.actors)
        # Within the host's patience, beyond it, and until it is replaced.
        span_ms = self.engine.draw_ms(500, self.engine.random.choice((5_000, 12_000, 60_000)))
        actor.be_slow(span_ms, to_say=self.engine.happens(0.5))

    def _shard_zombie(self) -> None:
        self.market.broker.matcher.haunt(self.engine.draw_ms(10_000, 120_000))

    def _ray_host(self) -> None:
        ray = self.market.broker.ray
        most_ms = self.engine.random.choice((0, 20_000, 200_000))
        ray.back_after_ms = self.engine.draw_ms(0, most_ms)
        way = self.engine.random.random()
        if way < 0.5:
            ray.host_doom.countdown = self.engine.draw_ms(1, 4)
        elif way < 0.75:
            ray.lose_host()
        else:
            ray.hang(self.engine.draw_ms(5_000, 20_000))

    def _verifier(self) -> None:
        self.market.verifier_dies = True

    def _broker_clock(self) -> None:
        host = self.market.broker
        host.wall_offset_ms = -self.engine.draw_ms(1_000, 86_400_000)
        if self.engine.happens(0.5):
            host.die(self.engine.draw_ms(200, 3_000))

        def set_right() -> None:
            host.wall_offset_ms = 0
            if self.engine.happens(0.5) and not self.over:
                # Its operator sees that its clock is late, and that it would take long to catch up.
                host.die(self.engine.draw_ms(200, 3_000))

        self.engine.after(self.engine.draw_ms(10_000, 600_000), set_right)

    def _upgrade(self) -> None:
        draw = self.engine.random
        heartbeat_ms = draw.choice((2_000, 3_000, 5_000))
        self.market.settings = replace(
            self.market.settings,
            fee_bps=draw.choice((0, 250, 500, 1_000)),
            heartbeat_ms=heartbeat_ms,
            unknown_after_ms=3 * heartbeat_ms,
            keep_checkpoints=draw.choice((3, 5)),
            backoff_ms=draw.choice((500, 2_000)),
        )
        self.market.broker.die(self.engine.draw_ms(200, 20_000))

    def _drift(self) -> None:
        ppm = self.engine.draw_ms(-500, 500)
        if self.engine.happens(0.2):
            self.market.broker.clock.drift(ppm)
        else:
            self._agent().clock.drift(ppm)

    # -- agents and machines ------------------------------------------------------------------

    def _agent_crash(self) -> None:
        if self.engine.happens(0.3):
            for agent in self.market.agents:
                agent.doom.at_new = True
            return
        doom = self._agent().doom
        doom.passes_common = self.engine.happens(0.7)
        doom.countdown = self.engine.draw_ms(1, 6 if doom.passes_common else 20)

    def _machine(self) -> None:
        """A machine reboots: at once; or one does at the worst moment, when something was just
        saved there."""
        if self.engine.happens(0.5):
            self._agent().reboot(self.engine.draw_ms(5_000, 90_000))
            return
        when: Literal["saved", "finished"] = "saved" if self.engine.happens(0.6) else "finished"
        for agent in self.market.agents:
            agent.reboots_when = when
            agent.reboots_until_ms = self.engine.now_ms + REBOOT_MS

    def _torn(self) -> None:
        agent = self._agent()
        for lease_id in sorted(agent.containers):
            container = agent.containers[lease_id]
            if container.steps:
                container.steps[max(container.steps)] = None

    def _agent_full(self) -> None:
        agent = self._agent()
        agent.full_until_ms = self.engine.now_ms + self.engine.draw_ms(500, 15_000)
        if not agent.up:
            return
        for lease_id in sorted(agent.core.runs):
            if agent.core.runs[lease_id].record.phase in LIVE and self.engine.happens(0.3):
                agent._later(20_000, partial(agent.disk_full, lease_id))

    def _pause(self) -> None:
        self._agent().hang(self._span_ms())

    def _agent_clock(self) -> None:
        agent = self._busy_agent()
        draw = self.engine.random
        if self.engine.happens(0.5):
            span_ms = draw.choice((2_000, 60_000, 250_000, 3_600_000, 86_400_000))
            agent.wall_offset_ms = self.engine.draw_ms(-span_ms, span_ms)
            away_ms, wrong_ms = (
                self.engine.draw_ms(500, 5_000),
                self.engine.draw_ms(10_000, 600_000),
            )
        else:
            # Its own clock has local time, until a time server says better: in seconds, so that its
            # leases are still its own.
            agent.wall_offset_ms = draw.choice((-5, 1, 2, 8)) * HOUR_MS
            away_ms = self.engine.draw_ms(500, 2_000)
            wrong_ms = away_ms + self.engine.draw_ms(2_000, 8_000)
        agent.die(away_ms)

        def set_right() -> None:
            agent.wall_offset_ms = 0

        self.engine.after(wrong_ms, set_right)

    # -- liars --------------------------------------------------------------------------------

    def _inflate(self) -> None:
        agent = self._agent()
        agent.honest = False
        agent.inflates = self.engine.draw_ms(2, 50)

    def _fork(self) -> None:
        agent = self._agent()
        issued = [m for m in agent.past if isinstance(m, ReceiptIssued)]
        if not (agent.up and agent.live and issued):
            return
        agent.honest = False
        one = read_document(self.engine.random.choice(issued[-3:]).receipt, Receipt)
        later_ms = one.cum_device_ms + self.engine.draw_ms(0, 60_000)
        other = one.model_copy(update={"issued_ms": one.issued_ms + 1, "cum_device_ms": later_ms})
        self._say(agent, ReceiptIssued(receipt=sign_document(other, agent.key).envelope))

    def _two_leases(self) -> None:
        agent = self._agent()
        withheld: list[Assign] = []

        def take(assign: Assign) -> None:
            withheld.append(assign)
            if len(withheld) == 2:
                agent.on_assign = None
                self._sign_both(agent, *withheld)

        agent.on_assign = take

    def _sign_both(self, agent: AgentHost, passed: Assign, other: Assign) -> None:
        """The first lease was not answered in time, so that its devices are leased anew."""
        agent.honest = False
        self.market.count("two-leases")
        document = read_assign(passed, agent.core.saved.broker).lease.document
        id = passed.lease.id
        self._say(agent, LeaseAnswer(lease=id, signed=passed.lease.countersigned(agent.key)))
        agent.post(events.MessageArrived(other))
        for ms in range(0, 60_000, 3_000):
            report = RunReport(lease=id, epoch=document.epoch, state="running", cum_device_ms=ms)
            agent._later(ms, partial(agent._send, Heartbeat(runs=(report,))))

    def _zombie(self) -> None:
        agent = self._agent()
        if not (agent.up and agent.live and agent.past):
            return
        agent.honest = False
        model = self.market.auditor
        old = [
            (id, lease)
            for id, lease in model.leases.items()
            if lease.document["provider"] == agent.party and lease.state == "closed"
        ]
        for message in agent.past[-20:]:
            if self.engine.happens(0.3):
                self._say(agent, message)
        if not old:
            return
        id, lease = self.engine.random.choice(old)
        epoch = lease.document["epoch"]
        agent._send(
            Heartbeat(
                runs=(
                    RunReport(
                        lease=id,
                        epoch=epoch,
                        state="running",
                        cum_device_ms=10**7,
                        step=10**6,
                    ),
                )
            )
        )
        self._say(agent, RunChanged(lease=id, epoch=epoch, state="running", cum_device_ms=10**7))
        self._phantom_of(agent, id, lease.document["job"], epoch)
        blobs = self.market.broker.broker.blobs
        try:
            self.market.broker.call(
                blobs.put,
                agent.party,
                lease.document["job"],
                epoch,
                "blake3:" + "0" * 64,
                b"zombie",
            )
        except Refusal as refusal:
            if refusal.code not in ("stale_epoch", "not_found"):
                self.engine.say(f"a zombie's upload is refused only by {refusal.code}")
        except (BrokerAway, *UNKEPT):
            return

    def _phantom(self) -> None:
        agent = self._agent()
        live = _live_runs(agent)
        if live:
            agent.honest = False
            record = self.engine.random.choice(live)
            self._phantom_of(agent, record.lease_id, record.job_id, record.lease.epoch)

    def _phantom_of(self, agent: AgentHost, lease: str, job: str, epoch: int) -> None:
        known = sorted(self.market.auditor.checkpoints)
        index, total = digest_of(self.engine.random.randbytes(32)), 100
        if self.engine.happens(0.3):
            # An index of its own, of which it keeps the chunks to itself.
            raw, _, total = tree({"state.json": self.engine.random.randbytes(40)})
            index = digest_of(raw)
            with suppress(BrokerAway, OSError, Refusal, *UNKEPT):
                self.market.broker.call(
                    self.market.broker.broker.blobs.put, agent.party, job, epoch, index, raw
                )
        elif known and self.engine.happens(0.5):
            # Somebody's real content, which this job has no right to.
            found = self.market.auditor.checkpoints[self.engine.random.choice(known)]
            index = found.document["index_digest"]
        document = Checkpoint(
            provider=agent.party,
            job=job,
            lease=lease,
            epoch=epoch,
            kind="checkpoint",
            step=10**6,
            index_digest=index,
            total_bytes=total,
            cum_device_ms=1,
            # What else is wrong with it is to be found out.
            image=self.market.auditor.images.of(lease),
            issued_ms=agent.now_ms(),
        )
        self._say(agent, CheckpointUploaded(checkpoint=sign_document(document, agent.key).envelope))

    def _partial(self) -> None:
        """Whatever it hands over is no progress, and nothing is paid for it."""
        agent = self._agent()
        live = _live_runs(agent)
        if not live:
            return
        record = self.engine.random.choice(live)
        kind = self.engine.random.choice(PARTIAL)
        signed = self._hand_over(agent, record, kind, record.durable_step + 10**6)
        if signed is not None:
            agent._later(self.engine.draw_ms(2_000, 10_000), partial(self._rest_on, agent, signed))

    def _huge_step(self) -> None:
        """What it hands over is whole. A job that went on from it could save nothing any more."""
        found = [(agent, record) for agent in self.market.agents for record in _live_runs(agent)]
        if found:
            agent, record = self.engine.random.choice(found)
            step = self.engine.random.choice((LAST_STEP, LAST_STEP + 1, MOST))
            self._hand_over(agent, record, "checkpoint", step)

    def _hand_over(
        self, agent: AgentHost, record: RunRecord, kind: CheckpointKind, step: int
    ) -> Signed[Checkpoint] | None:
        """Have a liar upload some file, and report it as that."""
        agent.honest = False
        index, chunks, total = tree({"progress.txt": b"it is nearly done"})
        blobs = self.market.broker.broker.blobs
        scope, epoch = record.job_id, record.lease.epoch
        try:
            for data in (*chunks.values(), index):
                digest = digest_of(data)
                self.market.broker.call(blobs.put, agent.party, scope, epoch, digest, data)
        except (BrokerAway, Refusal, OSError, *UNKEPT):
            return None
        document = Checkpoint(
            provider=agent.party,
            job=record.job_id,
            lease=record.lease_id,
            epoch=epoch,
            kind=kind,
            step=step,
            index_digest=digest_of(index),
            total_bytes=total,
            cum_device_ms=record.cum_device_ms,
            image=self.market.auditor.images.of(record.lease_id),
            issued_ms=agent.now_ms(),
        )
        signed = sign_document(document, agent.key)
        self._say(agent, CheckpointUploaded(checkpoint=signed.envelope))
        return signed

    def _rest_on(self, agent: AgentHost, handed_over: Signed[Checkpoint]) -> None:
        """Sign the next receipt of the run so that its durable progress is what it handed over."""
        lease = handed_over.document.lease
        issued = [m.receipt for m in agent.past if isinstance(m, ReceiptIssued)]
        mine = [r for envelope in issued if (r := read_document(envelope, Receipt)).lease == lease]
        run = agent.core.runs.get(lease)
        if self.over or run is None or run.record.is_over or not mine or not agent.live:
            return
        receipt = max(mine, key=lambda r: r.sequence).model_copy(
            update={
                "sequence": run.record.last_receipt_sequence + 1,
                "previous": run.record.last_receipt_id,
                "durable_checkpoint": handed_over.id,
                "durable_step": handed_over.document.step,
                "reached_step": handed_over.document.step,
                "durable_device_ms": handed_over.document.cum_device_ms,
                "issued_ms": agent.now_ms(),
            }
        )
        signed = sign_document(receipt, agent.key)
        self._say(agent, ReceiptIssued(receipt=signed.envelope))

    # -- renters ------------------------------------------------------------------------------

    def _renter_acts(self) -> None:
        self.engine.random.choice(self.market.renters).act()

    def _renter_repeats(self) -> None:
        self.engine.random.choice(self.market.renters).repeat()

    def _renter_drains(self) -> None:
        self.engine.random.choice(self.market.renters).drain()


def _live_runs(agent: AgentHost) -> list[RunRecord]:
    """Return the runs of which an agent can tell the broker something now."""
    if not (agent.up and agent.live):
        return []
    records = (run.record for run in agent.core.runs.values())
    return [record for record in records if record.phase is RunPhase.RUNNING]
