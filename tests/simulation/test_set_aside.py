"""What the simulator found about machines that are set aside."""

from __future__ import annotations

from sublet_broker.adapters.ray.shards import Shard
from sublet_contracts.reasons import Reason
from tests.service.world import World


def test_a_shard_that_is_rebuilt_later_holds_nothing_against_a_machine() -> None:
    """Found by seed 25: a shard has no clock of the market's. Rebuilt, it took every machine that
    was ever set aside for one that still is, and nobody told it better."""
    world = World()
    machine = world.agent("only")
    machine.first_state = "pulling"
    renter = world.renter()
    first = renter.run()
    machine.exit(machine.the_run, Reason.START_FAILED)
    world.broker.jobs.cancel(renter.party, first)
    world.pass_ms(20_000)
    second = renter.submit()
    with world.store.snapshot() as tx:
        shard = Shard(tx, 0, 1, "rebuilt")
    assert [match.job for match in shard.propose([], world.now_ms).matches] == [second]
