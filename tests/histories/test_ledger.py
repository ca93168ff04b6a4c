"""The ledger of a whole broker against a model of sums: to the micro-credit, after every command.

tests/market/test_ledger.py holds the ledger's own functions; here the use-cases move the money
(deposit, submit, amend, lease, charge, fee, release), and what each must move is computed anew from
the rules in DESIGN.md, sharing no code with the broker.

Some leases end because time passes: at the budget's edge the run is ordered to drain, after the
job's grace to stop, and whoever doesn't stop then is given up. The model says when each of these is
due, to the millisecond, and what the lease costs when it ends so: all its time where the agent
stopped as it was told, only what was durable where the provider didn't.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sublet_broker.market.facts import AccountFact, PendingFact, TransferFact
from sublet_broker.service.errors import Refusal
from sublet_contracts.export import verify_export
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import Order
from tests.histories.profiles import profile
from tests.service.world import AgentDouble, RenterDouble, RunDouble, World

RENTERS = ("anna", "boris")
HOUR_MS = 3_600_000
FREE = (Reason.RECLAIMED, Reason.RUN_KILLED, Reason.START_FAILED, Reason.PROVIDER_DRAINED)
"""Endings by the provider's fault, as DESIGN.md has it: what was not durable costs nothing."""
PAID = (Reason.SUCCEEDED, Reason.JOB_FAILED, Reason.OUT_OF_MEMORY, Reason.YIELDED)
FINAL = (Reason.SUCCEEDED, Reason.JOB_FAILED, Reason.OUT_OF_MEMORY)
GRACE_MS = 30_000
"""How long a job may take to save its state and stop: all jobs here say so."""
MARGIN_MS = 10_000
"""The drain at the budget's edge begins so much before the grace."""
OVERDUE_MS = 30_000
"""Whoever is still there so long after the stop is given up."""
RESTART_GRACE_MS = 10_000
"""Nothing is overdue so soon after the broker was away itself."""
LOOK_MS = 8_000
"""After that a broker may be so much late at the edge: it has forgotten what it was last told."""


@dataclass
class JobModel:
    """A job as the model has it."""

    renter: str
    budget_ucr: int
    charged_ucr: int = 0
    cancelled: bool = False
    over: bool = False


class Told(AgentDouble):
    """An agent whose every order and ending, of its own accord or not, the model hears of."""

    told: Callable[[RunDouble, Order], None]
    ends: Callable[[RunDouble, Reason], None]

    def ordered(self, order: Order) -> None:
        run = self.runs.get(order.lease)
        if run is not None:
            self.told(run, order)
        super().ordered(order)

    def exit(self, run: RunDouble, reason: Reason, code: int | None = None) -> None:
        super().exit(run, reason, code)
        self.ends(run, reason)


class Money(RuleBasedStateMachine):
    """Two renters, one provider, and any order of what moves money."""

    @initialize(
        price=st.sampled_from((1, 3_599_999, 3_600_001, 7_777_777, 12_345_678)),
        fee=st.sampled_from((0, 1, 333, 500, 10_000)),
        funds=st.sampled_from((20_000_000, 6_000_000, 1)),
        obeys=st.booleans(),
        minutes=st.sampled_from((1, 2, 20)),
    )
    def open_market(self, price: int, fee: int, funds: int, obeys: bool, minutes: int) -> None:
        plain = World().settings
        self.world = World(type(plain)(fee_bps=fee, fruitless_limit=1_000))
        self.price, self.fee = price, fee
        self.agent = Told(self.world, "owner")
        self.agent.told, self.agent.ends, self.agent.obeys = self.told, self.ends, obeys
        self.world.agents.append(self.agent)
        self.agent.join()
        self.agent.announce(price_ucr_per_device_hour=price)
        self.renters: dict[str, RenterDouble] = {
            name: self.world.renter(name, credits_ucr=0) for name in RENTERS
        }
        self.available = dict.fromkeys(RENTERS, 0)
        self.earned = self.fees = self.deposited = 0
        self.jobs: dict[str, JobModel] = {}
        self.transfers: dict[str, TransferFact] = {}
        self.resolved: dict[str, PendingFact] = {}
        self.due_ms: dict[str, int] = {}
        """By run that was ordered to end: when the next, harder step is due."""
        self.restarted_ms = 0
        for name in RENTERS:
            self.deposit(name, funds)
            self.submit(name, -(-price // 60) * minutes)

    # -- commands ----------------------------------------------------------------------------------

    @rule(name=st.sampled_from(RENTERS), amount=st.integers(1, 3_000_000))
    def deposit(self, name: str, amount: int) -> None:
        self.world.fund(self.renters[name].party, amount)
        self.available[name] += amount
        self.deposited += amount

    @rule(name=st.sampled_from(RENTERS), budget=st.integers(1, 5_000_000))
    def submit(self, name: str, budget: int) -> None:
        least = -(-self.price // 60)
        affordable = least <= budget <= self.available[name]
        try:
            job = self.renters[name].submit(
                budget_ucr=budget, max_price_ucr_per_device_hour=self.price
            )
        except Refusal:
            assert not affordable
            return
        assert affordable
        self.available[name] -= budget
        self.jobs[job] = JobModel(name, budget)
        self.world.settle_down(2)

    @rule(draw=st.data(), more=st.integers(-10, 1_000_000))
    def amend(self, draw: st.DataObject, more: int) -> None:
        job = self.some_job(draw)
        if job is None:
            return
        model = self.jobs[job]
        renter = self.renters[model.renter]
        total = max(0, model.budget_ucr + more)
        more = total - model.budget_ucr
        try:
            self.world.broker.jobs.resume(renter.party, job, renter.amendment(job, total))
        except Refusal:
            assert renter.view(job).budget_ucr == model.budget_ucr
            return
        assert more >= 0
        self.available[model.renter] -= more
        model.budget_ucr += more
        self.world.settle_down(2)

    @rule(draw=st.data(), sure=st.integers(0, 4), at_once=st.booleans())
    def cancel(self, draw: st.DataObject, sure: int, at_once: bool) -> None:
        job = self.some_job(draw)
        if job is None or sure:
            return
        renter = self.renters[self.jobs[job].renter]
        self.world.broker.jobs.cancel(renter.party, job)
        self.jobs[job].cancelled = True
        self.world.settle_down(2)
        run = self.the_run()
        if run is None or run.job_id != job:
            self.close_books(job)
        elif at_once:
            self.agent.exit(run, run.orders[0].reason)
            self.world.settle_down(3)

    @precondition(lambda self: self.the_run() is not None)
    @rule(span_ms=st.integers(1, 60_000) | st.sampled_from((65_000, 95_000, 200_000)))
    def work(self, span_ms: int) -> None:
        self.pass_ms(span_ms)

    @precondition(lambda self: self.the_run() is not None)
    @rule(span_ms=st.integers(1, 20_000))
    def save(self, span_ms: int) -> None:
        self.pass_ms(span_ms)
        run = self.the_run()
        if run is not None:
            self.agent.durable(run, run.step + 1)

    @precondition(lambda self: self.the_run() is not None)
    @rule(
        reason=st.sampled_from(FREE + PAID),
        span_ms=st.integers(0, 30_000),
        heeds=st.sampled_from((True, True, False)),
    )
    def finish(self, reason: Reason, span_ms: int, heeds: bool) -> None:
        """The run ends: as it was ordered to, or in its own way, order or not."""
        self.pass_ms(span_ms)
        run = self.the_run()
        if run is None:
            return
        self.agent.exit(run, run.orders[0].reason if run.orders and heeds else reason)
        self.world.settle_down(3)

    @precondition(lambda self: self.the_run() is not None)
    @rule()
    def cosign(self) -> None:
        run = self.the_run()
        assert run is not None
        self.renters[self.jobs[run.job_id].renter].cosign(run.job_id)

    @rule()
    def restart(self) -> None:
        """A broker that comes back adds nothing and forgets nothing."""
        self.world.restart_broker()
        self.restarted_ms = self.world.now_ms
        for run, due_ms in self.due_ms.items():
            # Orders count from the end of the grace: what is due next, by its own time more.
            orders = self.agent.runs[run].orders
            more_ms = OVERDUE_MS if orders[-1].desired == "stop" else 0
            self.due_ms[run] = max(due_ms, self.restarted_ms + RESTART_GRACE_MS + more_ms)
        self.agent.join()
        self.world.settle_down(2)

    # -- the model ---------------------------------------------------------------------------------

    def some_job(self, draw: st.DataObject) -> str | None:
        alive = [job for job, model in self.jobs.items() if not model.over]
        return draw.draw(st.sampled_from(alive)) if alive else None

    def the_run(self) -> RunDouble | None:
        runs = list(self.agent.runs.values()) if hasattr(self, "agent") else []
        return runs[0] if runs else None

    def pass_ms(self, span_ms: int) -> None:
        """Time passes, and whatever was due by then has been done."""
        self.world.pass_ms(span_ms)
        self.world.settle_down(2)
        run = self.the_run()
        if run is None:
            return
        if run.orders:
            assert self.world.now_ms < self.due_ms[run.id], "nothing has become of an order"
        elif self.world.now_ms >= self.restarted_ms + LOOK_MS:
            assert not self.at_the_edge(run), "nobody has seen the budget's edge"

    def at_the_edge(self, run: RunDouble) -> bool:
        """Say whether the run must begin to drain: its own grace and a margin before its hold is
        used up, but never in the first half of what it pays for."""
        most = ((run.lease.hold_ucr + 1) * HOUR_MS - 1) // self.price
        return run.cum_ms(self.world.now_ms) + min(GRACE_MS + MARGIN_MS, most // 2) >= most

    def told(self, run: RunDouble, order: Order) -> None:
        """The broker gives an order: it must be due, and the order that comes next."""
        now_ms = self.world.now_ms
        before = [given.desired for given in run.orders]
        if not before:
            assert (order.desired, order.grace_ms) == ("drain", GRACE_MS)
            if self.jobs[run.job_id].cancelled:
                assert order.reason is Reason.CANCELLED
            else:
                assert order.reason is Reason.BUDGET_EXHAUSTED
                assert self.at_the_edge(run)
            self.due_ms[run.id] = now_ms + GRACE_MS
            return
        assert (order.desired, order.grace_ms) == ("stop", 0)
        assert now_ms >= self.due_ms[run.id]
        if before == ["drain"]:
            assert order.reason is run.orders[0].reason
            self.due_ms[run.id] = now_ms + OVERDUE_MS
        else:
            # Given up, by the provider's fault: the agent forgets it too, as it would.
            assert before == ["drain", "stop"]
            assert not self.agent.obeys
            assert order.reason is Reason.PROVIDER_LOST
            run.stopped_ms = now_ms
            self.agent.past[run.id] = self.agent.runs.pop(run.id)
            self.ends(run, Reason.PROVIDER_LOST)

    def ends(self, run: RunDouble, reason: Reason) -> None:
        """The run has ended: the model charges what that makes payable, within the hold."""
        self.due_ms.pop(run.id, None)
        covered = run.cum_ms(self.world.now_ms)
        if reason in FREE or reason is Reason.PROVIDER_LOST:
            covered = min(run.durable[2] if run.durable else 0, covered)
        charge = min(self.price * covered // HOUR_MS, run.lease.hold_ucr)
        fee = charge * self.fee // 10_000
        model = self.jobs[run.job_id]
        model.charged_ucr += charge
        self.earned += charge - fee
        self.fees += fee
        if model.cancelled or reason in FINAL:
            self.close_books(run.job_id)

    def close_books(self, job: str) -> None:
        model = self.jobs[job]
        model.over = True
        self.available[model.renter] += model.budget_ucr - model.charged_ucr

    # -- what must hold ----------------------------------------------------------------------------

    @invariant()
    def to_the_micro_credit(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.audit()
        money = self.world.broker.money
        for name, renter in self.renters.items():
            balance = money.balance(renter.party)
            mine = [m for m in self.jobs.values() if m.renter == name and not m.over]
            held = sum(m.budget_ucr - m.charged_ucr for m in mine)
            assert (balance.available_ucr, balance.held_ucr) == (self.available[name], held)
        assert money.balance(self.agent.party).earned_ucr == self.earned
        for job, model in self.jobs.items():
            statement = money.statement(self.renters[model.renter].party, job)
            assert statement.charged_ucr == model.charged_ucr <= model.budget_ucr
            assert statement.lost_work_charged_ucr == 0

    @invariant()
    def append_only(self) -> None:
        """Debits are credits, nothing posted changes, and each pending resolves once."""
        if not hasattr(self, "world"):
            return
        with self.world.store.snapshot() as tx:
            transfers = {t.id: t for t in tx.find(TransferFact)}
            pendings = {p.id: p for p in tx.find(PendingFact)}
            accounts = tx.find(AccountFact)
        assert self.transfers.items() <= transfers.items()
        assert self.resolved.items() <= pendings.items()
        self.transfers = transfers
        self.resolved = {id: p for id, p in pendings.items() if p.state != "open"}
        assert all(len(t.cites) == 64 for t in transfers.values()), "a transfer cites a document"
        into = sum(t.amount_ucr for t in transfers.values() if t.debit == "world")
        assert into == self.deposited
        there = sum(a.credits_ucr - a.debits_ucr for a in accounts if a.id != "world")
        assert there == self.deposited
        fees = sum(a.credits_ucr - a.debits_ucr for a in accounts if a.id == "broker:fees")
        assert fees == self.fees
        open_by_job: dict[str, int] = {}
        for pending in pendings.values():
            if pending.state == "open":
                open_by_job[pending.account] = open_by_job.get(pending.account, 0) + 1
        assert all(count == 1 for count in open_by_job.values()), "one payable epoch per job"

    def teardown(self) -> None:
        """The evidence of every job verifies offline, with the model's charge in it."""
        for job, model in getattr(self, "jobs", {}).items():
            renter = self.renters[model.renter]
            data = self.world.broker.views.export(renter.party, job).model_dump_json().encode()
            verdict = verify_export(data, broker=self.world.key.party)
            assert verdict.problems == []
            assert verdict.charged_ucr == model.charged_ucr


Money.TestCase.settings = profile(examples=80, steps=30, long=3)
TestMoney = Money.TestCase
