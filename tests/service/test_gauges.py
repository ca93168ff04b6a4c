"""What /metrics shows: the same figures that adding everything up would give."""

from __future__ import annotations

from dataclasses import replace

from sublet_broker.market.facts import AccountFact
from sublet_contracts.reasons import Reason
from tests.service.world import World


def figures(world: World) -> dict[str, int]:
    return {
        " ".join([gauge.name, *(value for _, value in gauge.labels)]): gauge.value
        for gauge in world.broker.metrics.gauges()
    }


def test_figures_follow_a_job_and_its_recovery() -> None:
    world = World()
    alice = world.agent("alice")
    renter = world.renter(credits_ucr=50_000_000)
    renter.run(budget_ucr=10_000_000)
    found = figures(world)
    assert found["sublet_jobs starting"] + found["sublet_jobs running"] == 1
    assert found["sublet_ledger_ucr held"] == 10_000_000
    assert found["sublet_ledger_ucr world"] == -50_000_000
    world.pass_ms(10_000)
    alice.durable(alice.the_run, 1)
    world.pass_ms(5_000)
    alice.exit(alice.the_run, Reason.RUN_KILLED, 137)
    bob = world.agent("bob")
    alice.leave()
    world.pass_ms(10_000)
    bob.succeed(bob.the_run)
    world.settle_down()
    found = figures(world)
    assert found["sublet_jobs succeeded"] == 1
    assert found["sublet_jobs running"] == 0
    assert found["sublet_recoveries_total"] == 1
    assert found["sublet_lost_device_ms_total"] == 5_000
    assert found["sublet_settlements_total"] == 2
    assert found["sublet_ledger_discrepancy_ucr"] == 0
    assert sum(v for name, v in found.items() if name.startswith("sublet_ledger_ucr ")) == 0
    world.audit()


def test_an_account_that_was_changed_behind_the_ledgers_back_is_found() -> None:
    world = World()
    renter = world.renter()
    with world.store.transaction() as tx:
        account = tx.get(AccountFact, f"party:{renter.party}:available")
        assert account is not None
        tx.put(replace(account, credits_ucr=account.credits_ucr + 1))
    assert any(
        "the sum ledger:credits" in breach for breach in world.broker.ledger_audit.breaches()
    )
