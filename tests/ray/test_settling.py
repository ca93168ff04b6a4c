"""Batches of settlements: Ray's task and the broker's own process come to the same documents."""

from __future__ import annotations

from sublet_broker.adapters.ray.tasks import settle_batch
from sublet_broker.market.facts import LogEntryFact, SettlementFact
from sublet_broker.market.settling import SettlementCase, SettlementDecision
from sublet_broker.service.periodic.settling import BATCH
from sublet_broker.service.ports import Settler
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import RunChanged
from tests.ray.conftest import RayMarket
from tests.service.world import World

LEASES = BATCH + 4


class Counted:
    """A settler that notes the size of each batch."""

    def __init__(self, settler: Settler | None) -> None:
        self._settler = settler
        self.batches: list[int] = []

    def decide(self, cases: list[SettlementCase]) -> list[SettlementDecision]:
        self.batches.append(len(cases))
        return self._settler.decide(cases) if self._settler else settle_batch(cases)


def cached_writer(settler: Settler | None) -> tuple[list[str], list[str], list[int]]:
    """Many runs end at once and never send their last receipt. Return the documents."""
    counted = Counted(settler)
    world = World(settler=counted)
    agents = [world.agent(f"agent-{number}") for number in range(LEASES)]
    renter = world.renter(credits_ucr=1_000_000_000)
    for number in range(LEASES):
        renter.run(name=f"job-{number}", budget_ucr=1_000_000 + number)
    reasons = (Reason.JOB_FAILED, Reason.SUCCEEDED, Reason.YIELDED)
    runs = [agent.the_run for agent in agents]
    for number, (agent, run) in enumerate(zip(agents, runs, strict=True)):
        world.clock.ms += 37 * number
        for other in agents:
            other.beat()
        if number % 4:
            agent.durable(run, 1)
        world.clock.ms += 1_000
        if number % 3:
            agent.receipt(run)
    for number, (agent, run) in enumerate(zip(agents, runs, strict=True)):
        agent.send(
            RunChanged(
                lease=run.id,
                epoch=run.lease.epoch,
                state="exited",
                cum_device_ms=0,
                reason=reasons[number % 3],
                exit_code=1,
            )
        )
    world.clock.ms += 60_000
    closed = world.broker.settling.settle_due()
    assert closed == LEASES
    world.audit()
    with world.store.snapshot() as tx:
        documents = [fact.envelope.payload for fact in tx.find(SettlementFact)]
        log = [entry.document for entry in tx.find(LogEntryFact)]
    return documents, log, counted.batches


def test_a_batch_through_ray_gives_the_same_documents(ray_market: RayMarket) -> None:
    here = cached_writer(None)
    there = cached_writer(ray_market.ports.settler)
    assert here[2] == there[2] == [LEASES]
    assert len(here[0]) == LEASES
    assert there[:2] == here[:2]
