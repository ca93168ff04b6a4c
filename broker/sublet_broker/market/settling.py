"""Settling: what a lease costs once it has ended, who gets it, and who had accepted it.

Rules:
- It rests on the newest receipt of the chain: cumulative time, within what the broker's clock saw.
- Durable progress (contracts' rules.py): where provider or broker is at fault, time after the
  newest durable checkpoint costs nothing.
- The charge never exceeds the lease's hold. The fee comes out of it.
- It is accepted by the renter's own signature on that receipt, or else by the bounds in the job.
- Transfers have ids made from the lease and their purpose: a settlement made twice is made once.

A case is made of plain values, so that batches can be decided anywhere; the decision is the same.
"""

from dataclasses import dataclass
from typing import Literal

from sublet_broker.market import ledger
from sublet_contracts.documents import Transfer
from sublet_contracts.reasons import Reason
from sublet_contracts.rules import charge_ucr, fee_ucr, payable_device_ms


@dataclass(frozen=True)
class SettlementCase:
    """What decides a settlement."""

    lease: str
    job: str
    provider: str
    price_ucr_per_device_hour: int
    fee_bps: int
    hold_ucr: int
    reason: Reason
    receipt: str | None = None
    """The newest receipt's id, with its figures; None: nothing was ever claimed."""
    most_device_ms: int = 0
    """What can have been used until it came, by the broker's stopwatch (metering)."""
    cum_device_ms: int = 0
    durable_device_ms: int = 0
    countersigned: bool = False


@dataclass(frozen=True)
class SettlementDecision:
    """What is paid."""

    lease: str
    reason: Reason
    cum_device_ms: int
    payable_device_ms: int
    lost_device_ms: int
    charged_ucr: int
    fee_ucr: int
    provider_ucr: int
    accepted_by: Literal["renter", "job", "none"]
    transfers: tuple[Transfer, ...]


def decide(case: SettlementCase) -> SettlementDecision:
    """Return what the lease costs."""
    cum = min(case.cum_device_ms, case.most_device_ms) if case.receipt is not None else 0
    payable = payable_device_ms(case.reason, cum, case.durable_device_ms)
    charged = min(charge_ucr(case.price_ucr_per_device_hour, payable), case.hold_ucr)
    fee = fee_ucr(charged, case.fee_bps)
    accepted_by: Literal["renter", "job", "none"] = "none"
    if charged:
        accepted_by = "renter" if case.countersigned else "job"
    return SettlementDecision(
        lease=case.lease,
        reason=case.reason,
        cum_device_ms=cum,
        payable_device_ms=payable,
        lost_device_ms=cum - payable,
        charged_ucr=charged,
        fee_ucr=fee,
        provider_ucr=charged - fee,
        accepted_by=accepted_by,
        transfers=_transfers(case, charged - fee, fee),
    )


def _transfers(case: SettlementCase, provider_ucr: int, fee: int) -> tuple[Transfer, ...]:
    held = ledger.held(case.job)
    parts = (
        ("earn", ledger.earned(case.provider), provider_ucr),
        ("fee", ledger.FEES, fee),
    )
    return tuple(
        Transfer(
            id=ledger.transfer_id(purpose, case.lease),
            debit=held,
            credit=account,
            amount_ucr=amount,
        )
        for purpose, account, amount in parts
        if amount
    )
