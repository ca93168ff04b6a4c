"""Which version of a receipt an agent writes, and that a chain of several versions is one chain."""

from __future__ import annotations

from sublet_agent.core import events
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.receipts import RECEIPT_EVERY_MS
from sublet_contracts.documents import Receipt, read_document, versions_read
from sublet_contracts.envelope import Envelope
from sublet_contracts.versions import ReceiptV1
from sublet_contracts.wire import ReceiptIssued
from tests.agent.test_core import BROKER, NOW, PROVIDER, World, only, terms

V1, V2 = ReceiptV1.payload_type(), Receipt.payload_type()
OLD = {**versions_read(), "receipt": (1,)}
NEW = versions_read()
EVERY_MS = RECEIPT_EVERY_MS + 1_000


def issued_at(world: World, lease_id: str, ran_ms: int) -> Envelope:
    """Let the run go on; return the receipt that is due by then."""
    world.ran(lease_id, ran_ms)
    receipt: Envelope = only(world.do(events.Tick()), ReceiptIssued).receipt
    return receipt


def test_an_agent_writes_what_its_broker_reads() -> None:
    world = World()
    lease_id = world.running()
    issued = []
    # The broker is updated in mid-run, and later goes back to its older release.
    for number, (reads, payload_type) in enumerate([(OLD, V1), (NEW, V2), (OLD, V1)], start=1):
        world.do(events.Joined(BROKER.party, broker_reads=reads))
        receipt = issued_at(world, lease_id, number * EVERY_MS)
        assert receipt.payloadType == payload_type
        issued.append(receipt)
    chain = [read_document(envelope, Receipt) for envelope in issued]
    assert [receipt.sequence for receipt in chain] == [1, 2, 3]
    assert [receipt.previous for receipt in chain] == [None, issued[0].id, issued[1].id]


def test_a_receipt_names_the_step_that_was_reached_beside_the_durable_one() -> None:
    world = World()
    world.do(events.Joined(BROKER.party, broker_reads=NEW))
    lease_id = world.running()
    world.durable(lease_id, 5)
    world.do(events.CheckpointFound(lease_id, 9))
    receipt = read_document(issued_at(world, lease_id, 2 * EVERY_MS), Receipt)
    assert (receipt.reached_step, receipt.durable_step) == (9, 5)


def test_until_a_broker_has_said_what_it_reads_the_oldest_version_is_written() -> None:
    world = World()
    world.do(events.Joined(BROKER.party, broker_reads=NEW))
    lease_id = world.running()
    # The agent is started again, and has not met its broker yet.
    core = AgentCore(terms(), PROVIDER, world.core.saved)
    core.started([lease_id], NOW)
    ran = events.Observed(lease_id, running=True, started_ms=NOW, ran_ms=EVERY_MS)
    core.handle(ran, NOW + EVERY_MS)
    message = only(core.handle(events.Tick(), NOW + EVERY_MS), ReceiptIssued)
    assert message.receipt.payloadType == V1
