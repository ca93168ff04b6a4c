"""What /metrics shows: the same figures that adding everything up would give."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import sublet_broker.service
from sublet_broker.market.facts import AccountFact
from sublet_broker.service.unit_of_work.tallies import CREDITS
from sublet_contracts.reasons import Reason
from tests.service.world import World


def figures(world: World) -> dict[str, float]:
    return {
        " ".join([sample.metric.name, *sample.labels]): sample.value
        for sample in world.broker.metrics.samples()
    }


def test_figures_follow_a_job_and_its_recovery() -> None:
    world = World()
    alice = world.agent("alice")
    renter = world.renter(credits_ucr=50_000_000)
    renter.run(budget_ucr=10_000_000)
    found = figures(world)
    assert found["sublet_jobs starting"] + found["sublet_jobs running"] == 1
    assert found["sublet_offers_open"] == found["sublet_agents_connected"] == 1
    assert found["sublet_leases_active"] == 1
    assert found["sublet_ledger_balance_microcredits held"] == 10_000_000
    assert found["sublet_ledger_balance_microcredits world"] == -50_000_000
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
    assert found["sublet_agents_connected"] == 1
    assert found["sublet_leases_active"] == 0
    assert found["sublet_recoveries_total"] == 1
    assert found["sublet_lost_device_seconds_total"] == 5
    assert found["sublet_settlements_total run_killed"] == 1
    assert found["sublet_settlements_total succeeded"] == 1
    assert found["sublet_ledger_discrepancy_microcredits"] == 0
    assert (
        sum(
            v for name, v in found.items() if name.startswith("sublet_ledger_balance_microcredits ")
        )
        == 0
    )
    world.audit()


def test_an_account_that_was_changed_behind_the_ledgers_back_is_found() -> None:
    world = World()
    renter = world.renter()
    with world.store.transaction() as tx:
        account = tx.get(AccountFact, f"party:{renter.party}:available")
        assert account is not None
        tx.put(replace(account, credits_ucr=account.credits_ucr + 1))
    assert any(
        f"the sum {CREDITS.name} " in breach for breach in world.broker.ledger_audit.breaches()
    )


def test_no_use_case_writes_around_the_unit_of_work() -> None:
    root = Path(sublet_broker.service.__file__).parent
    around = [
        f"{path.relative_to(root)}: {found}"
        for path in sorted(root.rglob("*.py"))
        if path.parent.name != "unit_of_work"
        for found in re.findall(r"tx\.(?:add|put|delete)\(.*", path.read_text())
    ]
    assert around == [], "tallies miss what is written like this: use work.add, put or delete"
