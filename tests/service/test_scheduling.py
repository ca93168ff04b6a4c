"""What the match engine holds, and the scheduler's part in it."""

from __future__ import annotations

from sublet_contracts.states import JobState
from tests.service.world import World


def test_an_offer_that_the_engine_read_by_itself_and_that_is_gone_holds_nobody_up() -> None:
    """A shard that is rebuilt reads the database ahead of what it is told. An offer that came and
    went in between was never told of, and so nobody said that it had gone: it was the cheapest,
    and every job that it fitted was proposed for it again and again."""
    world = World()
    ghost = world.agent("alice", price_ucr_per_device_hour=100_000)
    world.broker.context.ports.matcher.rebuild()
    ghost.withdraw()
    world.agent("bob", price_ucr_per_device_hour=900_000)
    renter = world.renter()
    job = renter.run()
    assert renter.view(job).state is JobState.RUNNING
