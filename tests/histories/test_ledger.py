"""The ledger of a whole broker against a model of sums: to the micro-credit, after every command.

tests/market/test_ledger.py holds the ledger's own functions; here the use-cases move the money
(deposit, submit, amend, lease, charge, fee, release), and what each must move is computed anew from
the rules in DESIGN.md, sharing no code with the broker.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sublet_broker.market.facts import AccountFact, PendingFact, TransferFact
from sublet_broker.service.errors import Refusal
from sublet_contracts.export import verify_export
from sublet_contracts.reasons import Reason
from tests.histories.profiles import profile
from tests.service.world import AgentDouble, RenterDouble, RunDouble, World

RENTERS = ("anna", "boris")
HOUR_MS = 3_600_000
FREE = (Reason.RECLAIMED, Reason.RUN_KILLED, Reason.START_FAILED, Reason.PROVIDER_DRAINED)
"""Endings by the provider's fault, as DESIGN.md has it: what was not durable costs nothing."""
PAID = (Reason.SUCCEEDED, Reason.JOB_FAILED, Reason.OUT_OF_MEMORY, Reason.YIELDED)


@dataclass
class JobModel:
    """A job as the model has it."""

    renter: str
    budget_ucr: int
    charged_ucr: int = 0
    over: bool = False


class Money(RuleBasedStateMachine):
    """Two renters, one provider, and any order of what moves money."""

    @initialize(
        price=st.sampled_from((1, 3_599_999, 3_600_001, 7_777_777, 12_345_678)),
        fee=st.sampled_from((0, 1, 333, 500, 10_000)),
        funds=st.sampled_from((20_000_000, 6_000_000, 1)),
    )
    def open_market(self, price: int, fee: int, funds: int) -> None:
        plain = World().settings
        self.world = World(type(plain)(fee_bps=fee, fruitless_limit=1_000))
        self.price, self.fee = price, fee
        self.agent: AgentDouble = self.world.agent("owner", price_ucr_per_device_hour=price)
        self.renters: dict[str, RenterDouble] = {
            name: self.world.renter(name, credits_ucr=0) for name in RENTERS
        }
        self.available = dict.fromkeys(RENTERS, 0)
        self.earned = self.fees = self.deposited = 0
        self.jobs: dict[str, JobModel] = {}
        self.transfers: dict[str, TransferFact] = {}
        self.resolved: dict[str, PendingFact] = {}
        for name in RENTERS:
            self.deposit(name, funds)
            self.submit(name, -(-price // 60) * 20)

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
        try:
            total = model.budget_ucr + more
            self.world.broker.jobs.resume(renter.party, job, renter.amendment(job, total))
        except Refusal:
            assert renter.view(job).budget_ucr == model.budget_ucr
            return
        assert more >= 0
        self.available[model.renter] -= more
        model.budget_ucr += more
        self.world.settle_down(2)

    @rule(draw=st.data(), sure=st.integers(0, 4))
    def cancel(self, draw: st.DataObject, sure: int) -> None:
        job = self.some_job(draw)
        if job is None or sure:
            return
        renter = self.renters[self.jobs[job].renter]
        try:
            self.world.broker.jobs.cancel(renter.party, job)
        except Refusal:
            return
        run = self.the_run()
        if run is not None and run.job_id == job:
            self.end(run, Reason.CANCELLED, covered=self.due(run))
        self.world.settle_down(3)
        self.close_books(job)

    @precondition(lambda self: self.the_run() is not None)
    @rule(span_ms=st.integers(1, 60_000))
    def work(self, span_ms: int) -> None:
        self.world.pass_ms(span_ms)

    @precondition(lambda self: self.the_run() is not None)
    @rule(span_ms=st.integers(1, 20_000))
    def save(self, span_ms: int) -> None:
        self.world.pass_ms(span_ms)
        run = self.the_run()
        if run is not None and not run.orders:
            self.agent.durable(run, run.step + 1)

    @precondition(lambda self: self.the_run() is not None)
    @rule(reason=st.sampled_from(FREE + PAID), span_ms=st.integers(0, 30_000))
    def finish(self, reason: Reason, span_ms: int) -> None:
        self.world.pass_ms(span_ms)
        run = self.the_run()
        if run is None:
            return
        if run.orders:
            reason = run.orders[0].reason
        free = reason in FREE
        durable = run.durable[2] if run.durable else 0
        self.end(run, reason, covered=min(durable, self.due(run)) if free else self.due(run))
        job = run.job_id
        self.world.settle_down(3)
        if reason in (Reason.SUCCEEDED, Reason.JOB_FAILED, Reason.OUT_OF_MEMORY):
            self.close_books(job)

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
        self.agent.join()
        self.world.settle_down(2)

    # -- the model ---------------------------------------------------------------------------------

    def some_job(self, draw: st.DataObject) -> str | None:
        alive = [job for job, model in self.jobs.items() if not model.over]
        return draw.draw(st.sampled_from(alive)) if alive else None

    def the_run(self) -> RunDouble | None:
        runs = list(self.agent.runs.values()) if hasattr(self, "agent") else []
        return runs[0] if runs else None

    def due(self, run: RunDouble) -> int:
        return run.cum_ms(self.world.now_ms)

    def end(self, run: RunDouble, reason: Reason, *, covered: int) -> None:
        """The run ends; the model charges `covered` device-ms of it."""
        self.agent.exit(run, reason)
        model = self.jobs[run.job_id]
        charge = min(self.price * covered // HOUR_MS, run.lease.hold_ucr)
        fee = charge * self.fee // 10_000
        model.charged_ucr += charge
        self.earned += charge - fee
        self.fees += fee

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


Money.TestCase.settings = profile(examples=80, steps=30)
TestMoney = Money.TestCase
