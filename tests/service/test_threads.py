"""A job's threads of arithmetic: the machine's share at first, and once something is durable the
same on every machine, with at least as many cores. Another number gives other bits."""

from __future__ import annotations

from sublet_contracts.reasons import Reason
from tests.service.world import World

SHARE = {"cpu_millis": 0}


def test_a_job_without_a_wish_gets_the_machines_share_and_keeps_its_threads() -> None:
    world = World()
    first = world.agent("first", cpu_millis=4_500)
    renter = world.renter()
    job = renter.run(resources=SHARE)
    assert first.the_run.lease.threads == 4
    world.agent("small", cpu_millis=3_000, price_ucr_per_device_hour=1)
    large = world.agent("large", cpu_millis=16_000)
    first.durable(first.the_run, 10)
    first.withdraw()
    first.exit(first.the_run, Reason.RECLAIMED)
    world.settle_down()
    # Not where it is cheapest: that has fewer cores than what is durable was made with.
    assert (large.the_run.lease.start_step, large.the_run.lease.threads) == (10, 4)
    large.durable(large.the_run, 20)
    large.withdraw()
    large.exit(large.the_run, Reason.RECLAIMED)
    world.settle_down()
    assert renter.view(job).state == "recovering"
    back = world.agent("back", cpu_millis=4_000)
    world.settle_down()
    assert back.the_run.lease.threads == 4
    world.audit()


def test_what_has_nothing_durable_begins_anew_with_the_next_machines_share() -> None:
    """A first lease that came to nothing binds nobody to its machine's cores."""
    world = World()
    first = world.agent("first", cpu_millis=64_000)
    renter = world.renter()
    renter.run(resources=SHARE)
    assert first.the_run.lease.threads == 64
    small = world.agent("small", cpu_millis=500)
    first.withdraw()
    first.exit(first.the_run, Reason.START_FAILED)
    world.pass_ms(120_000)
    assert small.the_run.lease.threads == 1
    world.audit()


def test_a_job_that_names_its_cores_has_as_many_threads_everywhere() -> None:
    world = World()
    agent = world.agent("first", cpu_millis=64_000)
    renter = world.renter()
    renter.run(resources={"cpu_millis": 2_500})
    assert agent.the_run.lease.threads == 2
    agent.durable(agent.the_run, 10)
    agent.withdraw()
    agent.exit(agent.the_run, Reason.RECLAIMED)
    other = world.agent("other", cpu_millis=3_000)
    world.settle_down()
    assert other.the_run.lease.threads == 2
    world.audit()
