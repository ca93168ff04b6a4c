"""One broker keeps documents of two versions: from agents of two releases, and from before its own
update."""

from __future__ import annotations

from sublet_contracts.documents import Receipt
from sublet_contracts.export import parse_export, verify_export
from sublet_contracts.reasons import Reason
from sublet_contracts.states import JobState
from sublet_contracts.versions import ReceiptV1
from sublet_contracts.wire import ReceiptIssued
from tests.service.world import AgentDouble, RenterDouble, World

ONLY_V1 = {"receipt": (1,)}
V1, V2 = ReceiptV1.payload_type(), Receipt.payload_type()


def exported(world: World, renter: RenterDouble, job: str) -> tuple[bytes, list[str]]:
    """Return a job's export, and the types of its receipts, sorted: they are in no order."""
    data = world.broker.views.export(renter.party, job).model_dump_json().encode()
    return data, sorted(envelope.payloadType for envelope in parse_export(data).receipts)


def old_agent(world: World, name: str) -> AgentDouble:
    agent = world.agent(name)
    agent.broker_reads = ONLY_V1
    return agent


def test_a_job_that_moves_from_an_old_agent_to_a_new_one_has_both_in_its_export() -> None:
    world = World()
    old = old_agent(world, "alice")
    renter = world.renter()
    job = renter.run()
    new = world.agent("bob")
    run = old.the_run
    world.pass_ms(60_000)
    old.durable(run, 100)
    old.receipt(run)
    world.pass_ms(10_000)
    old.withdraw()
    old.exit(run, Reason.RECLAIMED, 75)
    world.settle_down()
    again = new.the_run
    assert again.lease.start_step == 100
    world.pass_ms(40_000)
    new.receipt(again)
    new.succeed(again)
    world.settle_down()
    assert renter.view(job).state is JobState.SUCCEEDED
    world.audit()
    data, types = exported(world, renter, job)
    assert set(types) == {V1, V2}
    verdict = verify_export(data, broker=world.key.party)
    assert (verdict.problems, verdict.receipts, verdict.leases) == ([], len(types), 2)
    assert verdict.charged_ucr == renter.view(job).charged_ucr > 0


def test_a_chain_goes_on_in_the_newer_version_once_the_broker_reads_it() -> None:
    world = World()
    agent = old_agent(world, "alice")
    renter = world.renter()
    job = renter.run()
    run = agent.the_run
    world.pass_ms(40_000)
    agent.receipt(run)
    world.restart_broker()
    agent.join()
    agent.broker_reads = None
    world.pass_ms(40_000)
    agent.durable(run, 100)
    agent.receipt(run)
    agent.succeed(run)
    world.settle_down()
    world.audit()
    data, types = exported(world, renter, job)
    assert set(types) == {V1, V2}
    verdict = verify_export(data, broker=world.key.party)
    assert (verdict.problems, verdict.receipts, verdict.leases) == ([], len(types), 1)


def test_two_versions_of_one_receipt_contradict_each_other() -> None:
    world = World()
    agent = old_agent(world, "alice")
    renter = world.renter()
    job = renter.run()
    run = agent.the_run
    world.pass_ms(40_000)
    first = agent.make_receipt(run)
    agent.broker_reads = None
    second = agent.make_receipt(run)
    assert first.id != second.id
    for signed in (first, second):
        agent.send(ReceiptIssued(receipt=signed.envelope))
    world.settle_down()
    assert renter.view(job).runs[0].reason is Reason.EVIDENCE_OF_FRAUD
