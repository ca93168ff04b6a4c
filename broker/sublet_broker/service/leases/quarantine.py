"""Doubt about a checkpoint: it is verified again, or taken out of use."""

from sublet_broker.market.checkpointing import failed_twice, quarantined
from sublet_broker.market.facts import CheckpointFact, LeaseFact
from sublet_broker.service.ports import VerifyTask
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.states import CheckpointState


def quarantine(work: UnitOfWork, fact: CheckpointFact, detail: str) -> None:
    """Take a damaged checkpoint out of use."""
    work.put(quarantined(fact, detail))
    work.event(
        "checkpoint",
        fact.job,
        lease=fact.lease,
        epoch=fact.epoch,
        before=fact.state,
        after=CheckpointState.QUARANTINED,
        detail=detail,
    )


def distrust_start(context: Context, work: UnitOfWork, lease: LeaseFact) -> None:
    """After a lease couldn't restore its checkpoint: verify it again, or take it out of use."""
    fact = work.get(CheckpointFact, lease.start_checkpoint) if lease.start_checkpoint else None
    if fact is None or fact.state is not CheckpointState.DURABLE:
        return
    if failed_twice(fact.id, work.find(LeaseFact, {"job": lease.job})):
        quarantine(work, fact, "two leases in a row could not restore it")
        return
    task = VerifyTask(fact.id, fact.job, fact.index_digest, context.settings.max_checkpoint_bytes)
    work.tx.after_commit(lambda: context.ports.verifier.submit(task))
