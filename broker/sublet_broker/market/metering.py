"""Metering: which receipts count.

Rules:
- Receipts of a lease form one chain: 1, 2, 3 ..., each naming the one before. Nothing depends on
  the order in which they arrive: one that comes before its predecessor (or before the checkpoint it
  names is verified) is not acknowledged, so its agent sends it again; one that was seen before
  changes nothing.
- Two receipts that can't stand in one chain (the same sequence, or another past) are equivocation:
  both are kept as evidence, the chain is disputed, and counts up to the last receipt on which both
  histories agree.
- A receipt is cumulative, priced as the lease says, and its durable progress is that of a
  checkpoint of this lease that the broker has verified. Outputs are none: what a finished run hands
  over is paid by its success, and from what an unfinished one calls so no job could go on. One that
  breaks this is dropped and the chain stays.
- The broker's own clock bounds what can be claimed: since the lease was made, until the receipt
  came, times devices, and a small tolerance. It is applied when the lease is settled. It is
  taken by the stopwatch, not by the clock, which may go slower for a while, because it was ahead.
- Time before a run's start is at most a part of the hold, and free as long as contracts' rules.py
  say. Who claims some says so in the receipt: then the free time has passed as well. Who claims it
  as time of the run is held to his own heartbeats: for as long as they said that it had not begun,
  it had not. Each counts for HEARD_MOST_MS at the most, so that heartbeats which the network held
  up, to deliver them all at once, prove no more than they did when they were sent.
"""

from dataclasses import dataclass
from enum import StrEnum

from sublet_broker.market.facts import ChainFact, CheckpointFact, LeaseFact, ReceiptFact
from sublet_contracts.documents import Receipt
from sublet_contracts.rules import (
    PULL_FREE_MS,
    charge_ucr,
    device_ms_before_start,
    most_pull_device_ms,
)
from sublet_contracts.states import CheckpointState

HEARD_MOST_MS = 3_000
HEARD_SLACK_MS = 10_000


class Admission(StrEnum):
    """What a receipt is to its chain."""

    NEW = "new"
    KNOWN = "known"
    EARLY = "early"
    FORK = "fork"
    WRONG = "wrong"


@dataclass(frozen=True)
class Judgement:
    """A receipt's admission; `detail` says why it is wrong, `agreed` where a fork begins."""

    admission: Admission
    detail: str = ""
    agreed: int = 0


def judge(
    receipt: Receipt,
    id: str,
    lease: LeaseFact,
    chain: ChainFact,
    at_sequence: ReceiptFact | None,
    head: Receipt | None,
    checkpoint: CheckpointFact | None,
) -> Judgement:
    """Judge a receipt of the lease's provider.

    `at_sequence`: the chain's receipt with this sequence; `head`: its newest; `checkpoint`: the one
    that the receipt names.
    """
    if receipt.epoch != lease.epoch or receipt.job != lease.job or receipt.lease != lease.id:
        return Judgement(Admission.WRONG, "it is of another lease")
    if at_sequence is not None:
        if at_sequence.id == id:
            return Judgement(Admission.KNOWN)
        return Judgement(Admission.FORK, "two receipts with one sequence", receipt.sequence - 1)
    if receipt.sequence > chain.sequence + 1:
        return Judgement(Admission.EARLY)
    if receipt.previous != chain.head:
        agreed = max(0, chain.sequence - 1)
        return Judgement(Admission.FORK, "it follows another receipt than the one we hold", agreed)
    wrong = _why_wrong(receipt, lease, head, checkpoint)
    if wrong == _NOT_VERIFIED:
        return Judgement(Admission.EARLY)
    return Judgement(Admission.WRONG, wrong) if wrong else Judgement(Admission.NEW)


_NOT_VERIFIED = "its checkpoint has not been verified yet"


def _why_wrong(
    receipt: Receipt, lease: LeaseFact, head: Receipt | None, checkpoint: CheckpointFact | None
) -> str:
    if head is not None:
        if head.final:
            return "the chain was final"
        if (
            receipt.cum_device_ms < head.cum_device_ms
            or receipt.durable_device_ms < head.durable_device_ms
        ):
            return "it goes back behind the receipt before it"
    expected = charge_ucr(lease.price_ucr_per_device_hour, receipt.cum_device_ms)
    if receipt.charge_ucr != min(expected, lease.hold_ucr):
        return "its charge is not price x time"
    most_pull_ms = most_pull_device_ms(lease.price_ucr_per_device_hour, lease.hold_ucr)
    if most_pull_ms is not None and receipt.pull_device_ms > most_pull_ms:
        return "more of the hold is charged for its pull than may be"
    if receipt.durable_checkpoint is None:
        return "durable time without a checkpoint" if receipt.durable_device_ms else ""
    if checkpoint is None or checkpoint.lease != lease.id:
        return "it names a checkpoint that this lease did not make"
    if checkpoint.kind != "checkpoint":
        return f"it names {checkpoint.kind.replace('-', ' ')} as its progress"
    if checkpoint.state is CheckpointState.UPLOADED:
        return _NOT_VERIFIED
    if checkpoint.state is CheckpointState.REJECTED:
        return "it names a checkpoint that was rejected"
    if checkpoint.cum_device_ms != receipt.durable_device_ms:
        return "its durable time is not its checkpoint's"
    if checkpoint.step != receipt.durable_step:
        return "its durable step is not its checkpoint's"
    return ""


def most_device_ms(
    lease: LeaseFact,
    *,
    stopwatch_ms: int,
    tolerance_ms: int,
    tolerance_ppm: int,
    pull_device_ms: int = 0,
    preparing_ms: int = 0,
) -> int:
    """Return the device time that can have been used until the broker's stopwatch showed this;
    `pull_device_ms` of it is said to come before the run's start, and for `preparing_ms` the run's
    heartbeats have said that it had not begun."""
    passed_ms = max(0, stopwatch_ms - lease.proposed_stopwatch_ms)
    tolerated_ms = tolerance_ms + passed_ms * tolerance_ppm // 1_000_000
    devices = len(lease.device_ids)
    price, hold = lease.price_ucr_per_device_hour, lease.hold_ucr
    not_begun_ms = max(0, preparing_ms - HEARD_SLACK_MS)
    paid_ms = device_ms_before_start(not_begun_ms, devices, price, hold) // devices
    free_ms = max(PULL_FREE_MS if pull_device_ms else 0, not_begun_ms - paid_ms)
    return (max(0, passed_ms - free_ms) + tolerated_ms) * devices


def heard_preparing_ms(before_ms: int, since_last_ms: int) -> int:
    """Return for how long heartbeats have said that a run had not begun, after one more did, so
    long after the one before it."""
    return before_ms + min(max(0, since_last_ms), HEARD_MOST_MS)
