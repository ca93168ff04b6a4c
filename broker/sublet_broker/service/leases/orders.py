"""Orders to runs: recorded and sent together."""

from sublet_broker.market.facts import LeaseFact, RunFact
from sublet_broker.market.running import ordered
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.reasons import Reason
from sublet_contracts.states import Desired
from sublet_contracts.wire import Order


def give_order(
    work: UnitOfWork,
    lease: LeaseFact,
    run: RunFact,
    desired: Desired,
    reason: Reason,
    grace_ms: int,
) -> RunFact:
    """Order a run to drain or stop, unless that was ordered before. Return it as it is now."""
    after = ordered(run, desired, reason, grace_ms, work.now_ms)
    if after is None:
        return run
    work.send(
        lease.provider,
        Order(
            lease=lease.id,
            epoch=lease.epoch,
            desired="drain" if desired is Desired.DRAIN else "stop",
            reason=reason,
            grace_ms=grace_ms,
        ),
    )
    return work.put_run(run, after)
