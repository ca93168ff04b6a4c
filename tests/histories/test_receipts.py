"""One lease's receipt chain, honest and not, against a model of what counts and what it costs.

The provider signs whatever it likes: the next receipt, an old one again, one too early, another
history, a wrong charge, time that goes back, durable progress that nobody verified, hours that the
broker's clock never saw. The model keeps the chain that DESIGN.md allows, and at the end the
settlement is what the durable-progress rule says of its head, to the micro-credit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sublet_broker.market.facts import ChainFact, LeaseFact, ReceiptFact, SettlementFact
from sublet_broker.service.broker import Settings
from sublet_broker.service.errors import NotYet
from sublet_contracts.documents import Receipt, Settlement, Signed, read_document
from sublet_contracts.export import verify_export
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import ReceiptIssued, RunChanged
from tests.histories.profiles import profile
from tests.service.world import World

HOUR_MS = 3_600_000
TOLERANCE_MS = 1_000
TOLERANCE_PPM = 1_000
PROVIDERS_FAULT = {
    Reason.RECLAIMED, Reason.RUN_KILLED, Reason.START_FAILED, Reason.PROVIDER_LOST,
    Reason.EVIDENCE_OF_FRAUD, Reason.RESTORE_FAILED,
}  # fmt: skip
"""Whose GPU time after the last durable checkpoint costs nothing (the last one: the broker's)."""
ENDINGS = (
    Reason.SUCCEEDED, Reason.JOB_FAILED, Reason.YIELDED, Reason.RECLAIMED, Reason.RUN_KILLED,
    Reason.START_FAILED, Reason.RESTORE_FAILED,
)  # fmt: skip


@dataclass(frozen=True)
class Head:
    """The chain as the model has it, up to one receipt."""

    sequence: int = 0
    id: str | None = None
    cum_ms: int = 0
    durable_ms: int = 0
    received_ms: int = 0
    final: bool = False


class Chain(RuleBasedStateMachine):
    """A lease on one or two devices."""

    @initialize(
        price=st.sampled_from((3_600_000, 3_599_999, 7_777_777, 1)),
        fee=st.sampled_from((0, 333, 500, 10_000)),
    )
    def lease(self, price: int, fee: int) -> None:
        self.world = World(Settings(fee_bps=fee))
        self.agent = self.world.agent("provider", price_ucr_per_device_hour=price)
        self.renter = self.world.renter()
        self.job = self.renter.run(
            budget_ucr=2_000_000, max_price_ucr_per_device_hour=price, patience_ms=300_000
        )
        self.run = self.agent.the_run
        self.price, self.fee = price, fee
        self.hold = self.run.lease.hold_ucr
        self.chain = [Head()]
        self.sent: list[Signed[Receipt]] = []
        self.durable: tuple[str, int, int] | None = None
        self.closed: Reason | None = None
        self.cosigned: set[str] = set()

    def is_open(self) -> bool:
        return hasattr(self, "world") and self.closed is None

    @property
    def head(self) -> Head:
        return self.chain[-1]

    def cum_ms(self) -> int:
        """What it claims next: a liar goes on from its lie, or its own chain would refuse it."""
        return max(self.head.cum_ms, self.run.cum_ms(self.world.now_ms))

    def charge(self, cum_ms: int) -> int:
        return min(self.price * cum_ms // HOUR_MS, self.hold)

    def receipt(self, **changes: Any) -> Signed[Receipt]:
        """Return the chain's next receipt, but for `changes`."""
        durable = self.durable or (None, 0, 0)
        cum = changes.get("cum_device_ms", self.cum_ms())
        fields: dict[str, Any] = {
            "sequence": self.head.sequence + 1,
            "previous": self.head.id,
            "cum_device_ms": cum,
            "durable_checkpoint": durable[0],
            "durable_step": durable[1],
            "durable_device_ms": durable[2],
            "charge_ucr": self.charge(cum),
        }
        signed = self.agent.make_receipt(self.run, **(fields | changes))
        self.sent.append(signed)
        return signed

    def send(self, signed: Signed[Receipt]) -> bool:
        """Send it; say whether it was acknowledged."""
        try:
            self.agent.tell(ReceiptIssued(receipt=signed.envelope))
        except NotYet:
            return False
        return True

    def counts(self, signed: Signed[Receipt]) -> None:
        document = signed.document
        self.chain.append(
            Head(
                document.sequence,
                signed.id,
                document.cum_device_ms,
                document.durable_device_ms,
                self.world.now_ms,
                document.final,
            )
        )

    # -- honest ------------------------------------------------------------------------------------

    @precondition(is_open)
    @rule(span_ms=st.integers(0, 15_000))
    def time_passes(self, span_ms: int) -> None:
        self.world.clock.ms += span_ms
        self.agent.beat()

    @precondition(is_open)
    @rule()
    def next(self) -> None:
        signed = self.receipt()
        assert self.send(signed)
        if not self.head.final:
            self.counts(signed)

    @precondition(is_open)
    @rule()
    def save(self) -> None:
        if self.head.final:
            return
        signed = self.agent.checkpoint(self.run, self.run.step + 1)
        self.world.broker.supervision.verdicts()
        document = signed.document
        self.durable = (signed.id, document.step, document.cum_device_ms)

    @precondition(is_open)
    @rule(which=st.integers(0, 20))
    def again(self, which: int) -> None:
        """One that counts already comes once more, as after a lost ack."""
        known = {head.id for head in self.chain}
        old = [signed for signed in self.sent if signed.id in known]
        if old:
            assert self.send(old[which % len(old)])

    @precondition(is_open)
    @rule(which=st.integers(0, 20))
    def cosign(self, which: int) -> None:
        known = {head.id for head in self.chain}
        mine = [signed for signed in self.sent if signed.id in known]
        if mine:
            signed = mine[which % len(mine)]
            both = signed.envelope.countersigned(self.renter.key)
            self.world.broker.countersigning.countersign(self.renter.party, signed.id, both)
            self.cosigned.add(signed.id)

    # -- not honest --------------------------------------------------------------------------------

    @precondition(is_open)
    @rule(ahead=st.integers(1, 3))
    def too_early(self, ahead: int) -> None:
        """Before its predecessor: not acknowledged, so that it comes again."""
        sequence = self.head.sequence + 1 + ahead
        assert not self.send(self.receipt(sequence=sequence, previous="e" * 64))

    @precondition(is_open)
    @rule(off=st.sampled_from((-1, 1, 10**6)))
    def wrong_charge(self, off: int) -> None:
        right = self.charge(self.cum_ms())
        if right + off >= 0:
            assert self.send(self.receipt(charge_ucr=right + off))

    @precondition(is_open)
    @rule(back_ms=st.integers(1, 5_000))
    def goes_back(self, back_ms: int) -> None:
        cum = self.head.cum_ms - back_ms
        if cum >= self.head.durable_ms and (self.durable or ("", 0, 0))[2] <= cum:
            assert self.send(self.receipt(cum_device_ms=cum))

    @precondition(is_open)
    @rule(step=st.integers(1, 9))
    def progress_of_nobody(self, step: int) -> None:
        """Durable time on a checkpoint that isn't there."""
        cum = self.run.cum_ms(self.world.now_ms)
        signed = self.receipt(durable_checkpoint="c" * 64, durable_step=step, durable_device_ms=cum)
        assert self.send(signed)

    @precondition(is_open)
    @rule(hours=st.integers(1, 100))
    def inflates(self, hours: int) -> None:
        """It may claim what it likes: what is paid is bounded by the broker's own clock."""
        signed = self.receipt(cum_device_ms=self.head.cum_ms + hours * HOUR_MS)
        assert self.send(signed)
        if not self.head.final:
            self.counts(signed)

    @precondition(is_open)
    @rule(one_more_ms=st.integers(1, 5))
    def forks(self, one_more_ms: int) -> None:
        """Another receipt with the newest one's sequence: evidence, and the lease's end."""
        if self.head.sequence == 0:
            return
        before = self.chain[-2]
        signed = self.receipt(
            sequence=self.head.sequence,
            previous=before.id,
            cum_device_ms=self.head.cum_ms + one_more_ms,
        )
        assert self.send(signed)
        self.chain.pop()
        self.is_closed(Reason.EVIDENCE_OF_FRAUD)

    # -- the end -----------------------------------------------------------------------------------

    @precondition(is_open)
    @rule(reason=st.sampled_from(ENDINGS))
    def ends(self, reason: Reason) -> None:
        if self.head.final:
            return
        signed = self.receipt(final=reason)
        assert self.send(signed)
        self.counts(signed)
        self.agent.tell(
            RunChanged(
                lease=self.run.id,
                epoch=self.run.lease.epoch,
                state="exited",
                cum_device_ms=self.run.cum_ms(self.world.now_ms),
                reason=reason,
            )
        )
        self.world.broker.settling.settle_due()
        self.is_closed(reason)

    @precondition(is_open)
    @rule()
    def is_lost(self) -> None:
        """It falls silent for longer than the job's patience."""
        self.agent.die()
        self.world.clock.ms += 10_000
        self.world.broker.supervision.sweep()
        self.world.clock.ms += 300_001
        self.world.broker.supervision.sweep()
        self.is_closed(Reason.PROVIDER_LOST)

    @precondition(lambda self: not self.is_open())
    @rule(hours=st.integers(0, 2))
    def too_late(self, hours: int) -> None:
        """After the settlement a receipt is acknowledged, and changes nothing."""
        before = self.settlement()
        assert self.send(self.receipt(cum_device_ms=self.cum_ms() + hours * HOUR_MS))
        assert self.settlement() == before

    def settlement(self) -> Settlement:
        with self.world.store.snapshot() as tx:
            (fact,) = tx.find(SettlementFact, {"lease": self.run.id})
        return read_document(fact.envelope, Settlement, signed_by=(self.world.key.party,))

    def is_closed(self, reason: Reason) -> None:
        self.closed = reason
        head = self.head
        passed = max(0, head.received_ms - self.proposed_ms())
        seen = (passed + TOLERANCE_MS + passed * TOLERANCE_PPM // 1_000_000) if head.id else 0
        cum = min(head.cum_ms, seen)
        payable = min(head.durable_ms, cum) if reason in PROVIDERS_FAULT else cum
        charged = min(self.price * payable // HOUR_MS, self.hold)
        fee = charged * self.fee // 10_000
        by = "none"
        if charged:
            by = "renter" if head.id in self.cosigned else "job"
        said = self.settlement()
        assert said.reason == reason
        assert said.receipt == head.id
        assert (said.cum_device_ms, said.payable_device_ms) == (cum, payable)
        assert (said.charged_ucr, said.fee_ucr, said.provider_ucr) == (charged, fee, charged - fee)
        assert said.accepted_by == by
        assert sum(t.amount_ucr for t in said.transfers) == charged <= self.hold

    def proposed_ms(self) -> int:
        with self.world.store.snapshot() as tx:
            lease = tx.get(LeaseFact, self.run.id)
        assert lease is not None
        return lease.proposed_ms

    # -- what must hold ----------------------------------------------------------------------------

    @invariant()
    def the_chain_is_the_models(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.audit()
        with self.world.store.snapshot() as tx:
            chain = tx.get(ChainFact, self.run.id)
            kept = tx.find(ReceiptFact, {"lease": self.run.id}, order_by="sequence")
        assert chain is not None
        head = self.head
        assert (chain.sequence, chain.head) == (head.sequence, head.id)
        assert (chain.cum_device_ms, chain.durable_device_ms) == (head.cum_ms, head.durable_ms)
        counted = [r for r in kept if r.id not in chain.evidence]
        if self.closed is not Reason.EVIDENCE_OF_FRAUD:
            assert [r.id for r in counted] == [h.id for h in self.chain[1:]]
            assert {r.id for r in kept if r.countersigned} == self.cosigned
        previous: str | None = None
        for fact in counted[: head.sequence]:
            document = read_document(fact.envelope, Receipt, signed_by=(self.agent.party,))
            assert document.previous == previous
            previous = fact.id

    def teardown(self) -> None:
        """Both sides can show it to anybody."""
        if not hasattr(self, "world"):
            return
        view = self.world.broker.views.export(self.renter.party, self.job)
        verdict = verify_export(view.model_dump_json().encode(), broker=self.world.key.party)
        assert verdict.problems == []
        assert verdict.lost_work_charged_ucr == 0


Chain.TestCase.settings = profile(examples=100, steps=25, long=3)
TestChain = Chain.TestCase
