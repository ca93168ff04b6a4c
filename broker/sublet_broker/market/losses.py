"""How often this market loses a machine under a lease: what agents choose checkpoint intervals by.

Rules:
- A loss is an end that came without notice, so that what was not durable is gone, and that was the
  machine's: an owner who takes it back in order lets the job save first, and what a job does to
  itself says nothing of machines.
- The time is that of all leases that were signed, from then to their end; a machine with several
  leases counts for each, and is lost to each.
- A market that has seen little is taken to lose one machine a day: as much as one day and one loss
  are added to what was counted.
- It is a hint. Nothing is paid by it, and agents bound it.
"""

from sublet_broker.market.facts import LeaseFact
from sublet_contracts.reasons import Reason

SUPPOSED_MS = 86_400_000
WITHOUT_NOTICE = frozenset(
    {
        Reason.PROVIDER_LOST,
        Reason.RUN_KILLED,
        Reason.RUN_VANISHED,
        Reason.RUN_QUARANTINED,
        Reason.DEVICE_FAILED,
        Reason.ENGINE_STOPPED,
        Reason.PROVIDER_DISK_FULL,
    }
)


def machine_ms(lease: LeaseFact) -> int:
    """Return for how long a closed lease had its machine."""
    if lease.active_ms is None or lease.closed_ms is None:
        return 0
    return max(0, lease.closed_ms - lease.active_ms)


def losses(lease: LeaseFact) -> int:
    """Return 1 for a closed lease whose machine was lost without notice, else 0."""
    return int(lease.active_ms is not None and lease.reason in WITHOUT_NOTICE)


def loss_every_ms(all_machine_ms: int, all_losses: int) -> int:
    """Return how long a machine lasts on average, by all leases that were closed."""
    return (max(0, all_machine_ms) + SUPPOSED_MS) // (max(0, all_losses) + 1)
