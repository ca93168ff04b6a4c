"""Small markets in which anything may happen next: whatever does, the books are right."""

from __future__ import annotations

import random

import pytest

from sublet_broker.service.errors import Refusal
from sublet_contracts.api import NextStep
from sublet_contracts.export import verify_export
from sublet_contracts.reasons import Reason
from sublet_contracts.states import JOB, is_terminal
from sublet_contracts.wire import ReceiptIssued
from tests.service.world import PRICE, AgentDouble, RenterDouble, World

EXITS = (
    Reason.SUCCEEDED, Reason.JOB_FAILED, Reason.RECLAIMED, Reason.RUN_KILLED, Reason.YIELDED,
    Reason.START_FAILED, Reason.RESTORE_FAILED, Reason.CANCELLED, Reason.BUDGET_EXHAUSTED,
)  # fmt: skip


class Chance:
    """Draws what happens next."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.world = World()
        self.renters = [self.world.renter(f"renter{n}", 3_000_000) for n in range(2)]
        self.agents = [
            self.world.agent(f"agent{n}", price_ucr_per_device_hour=PRICE // (n + 1))
            for n in range(4)
        ]
        self.jobs: list[tuple[RenterDouble, str]] = []
        self.liars: set[str] = set()

    def happen(self) -> None:
        act = self.draw.choice(
            (
                self.submit,
                self.requirements,
                self.exit,
                self.save,
                self.save,
                self.meter,
                self.blink,
                self.die,
                self.lie,
                self.restart,
                self.offer,
                self.sign,
            )
        )
        try:
            act()
        except Refusal:
            pass
        self.world.pass_ms(self.draw.choice((500, 3_000, 11_000, 26_000)), every_ms=2_000)

    def submit(self) -> None:
        renter = self.draw.choice(self.renters)
        budget = self.draw.choice((60_000, 200_000, 900_000))
        changes = {"outputs": self.draw.choice(("", "/out")), "budget_ucr": budget}
        if self.draw.random() < 0.3:
            changes["accept_receipts_up_to_ucr"] = 60_000
        self.jobs.append((renter, renter.submit(**changes)))

    def requirements(self) -> None:
        if self.jobs:
            renter, job = self.draw.choice(self.jobs)
            jobs = self.world.broker.jobs
            match self.draw.randrange(4):
                case 0:
                    jobs.cancel(renter.party, job)
                case 1:
                    jobs.pause(renter.party, job)
                case 2:
                    jobs.resume(renter.party, job)
                case _:
                    total = renter.view(job).budget_ucr + 50_000
                    jobs.resume(renter.party, job, renter.amendment(job, total))

    def sign(self) -> None:
        for renter, job in self.jobs:
            renter.cosign(job)

    def agent(self) -> AgentDouble | None:
        busy = [agent for agent in self.agents if agent.runs and agent.awake]
        return self.draw.choice(busy) if busy else None

    def exit(self) -> None:
        agent = self.agent()
        if agent:
            run = next(iter(agent.runs.values()))
            reason = run.orders[0].reason if run.orders else self.draw.choice(EXITS)
            agent.exit(run, reason)

    def save(self) -> None:
        agent = self.agent()
        if agent and agent.connected:
            run = next(iter(agent.runs.values()))
            if run.job.outputs and self.draw.random() < 0.2:
                agent.checkpoint(run, run.step, kind="outputs")
            else:
                signed = agent.checkpoint(run, run.step + 10, upload=self.draw.random() < 0.9)
                self.world.settle_down(2)
                if any(v.durable and v.checkpoint == signed.id for v in run.verdicts):
                    run.durable = (signed.id, run.step, signed.document.cum_device_ms)

    def meter(self) -> None:
        agent = self.agent()
        if agent:
            agent.receipt(next(iter(agent.runs.values())))

    def blink(self) -> None:
        agent = self.draw.choice(self.agents)
        if agent.connected:
            agent.leave()
            agent.awake = False
        else:
            agent.awake = True
            agent.join()

    def die(self) -> None:
        agent = self.draw.choice(self.agents)
        agent.die()
        if self.draw.random() < 0.5:
            agent.past.update(agent.runs)
            agent.runs.clear()

    def lie(self) -> None:
        agent = self.agent()
        if agent and agent.connected:
            run = next(iter(agent.runs.values()))
            match self.draw.randrange(3):
                case 0:
                    run.started_ms -= 500_000
                    self.liars.add(run.id)
                case 1:
                    durable_ms = run.durable[2] if run.durable else 0
                    other = agent.make_receipt(run, cum_device_ms=durable_ms + 1)
                    agent.receipt(run)
                    agent.send(ReceiptIssued(receipt=other.envelope))
                case _:
                    agent.obeys = not agent.obeys

    def restart(self) -> None:
        self.world.restart_broker()

    def offer(self) -> None:
        agent = self.draw.choice(self.agents)
        if agent.connected:
            agent.announce(price_ucr_per_device_hour=self.draw.randrange(PRICE // 2, PRICE))

    def calm(self) -> None:
        """The faults stop: everything that can end, ends."""
        for agent in self.agents:
            agent.obeys = agent.awake = True
            agent.join()
            agent.announce()
        for _ in range(60):
            self.world.pass_ms(10_000, every_ms=2_000)
            for agent in self.agents:
                for run in list(agent.runs.values()):
                    if run.id in self.liars:
                        agent.exit(run, Reason.RUN_KILLED)
                    else:
                        agent.succeed(run)
            for renter, job in self.jobs:
                renter.cosign(job)
                try:
                    self.world.broker.jobs.resume(renter.party, job)
                except Refusal:
                    continue


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_the_books_are_right_and_the_evidence_verifies(seed: int) -> None:
    chance = Chance(seed)
    for _ in range(60):
        chance.happen()
        chance.world.audit()
    chance.calm()
    chance.world.audit()
    for renter, job in chance.jobs:
        view = renter.view(job)
        assert view.settled_ucr <= view.budget_ucr
        # Every job has ended, but for those that only money can move on: and they say so.
        spent = is_terminal(JOB, view.state) or view.next_step is NextStep.RAISE_BUDGET
        assert spent, (view.state, view.reason, view.says)
        data = chance.world.broker.views.export(renter.party, job).model_dump_json().encode()
        verdict = verify_export(data, broker=chance.world.key.party)
        assert verdict.problems == []
        assert verdict.charged_ucr == view.settled_ucr
        assert verdict.lost_work_charged_ucr == 0
