"""The renter's signature on receipts: given only to what adds up.

A receipt is signed if the lease it belongs to is this renter's own, bears the signatures of broker
and provider, and the receipt's figures follow from it. One that doesn't is left unsigned, and why is
said: the job's bounds then decide, and a dispute has its evidence.
"""

from dataclasses import dataclass

from sublet_contracts.api import ReceiptsPage
from sublet_contracts.documents import (
    DocumentRefused,
    Lease,
    Receipt,
    open_document,
    read_document,
)
from sublet_contracts.envelope import Envelope
from sublet_contracts.keys import SigningKey
from sublet_contracts.rules import charge_ucr


@dataclass(frozen=True)
class Cosigned:
    """What came of a page of receipts."""

    signed: tuple[Envelope, ...]
    refused: tuple[str, ...]


def cosign(page: ReceiptsPage, key: SigningKey, broker: str) -> Cosigned:
    """Return the page's receipts with the renter's signature, and what was refused, in words."""
    signed: list[Envelope] = []
    refused: list[str] = []
    for envelope in page.receipts:
        try:
            check_receipt(envelope, page.leases, key.party, broker)
        except DocumentRefused as error:
            refused.append(f"receipt {envelope.id[:10]} is not signed: {error}")
        else:
            signed.append(envelope.countersigned(key))
    return Cosigned(tuple(signed), tuple(refused))


def check_receipt(
    envelope: Envelope, leases: dict[str, Envelope], renter: str, broker: str
) -> None:
    """Check one receipt against its lease. Raises DocumentRefused, which says what is wrong."""
    receipt = open_document(envelope, Receipt).document
    held = leases.get(receipt.lease)
    if held is None or held.id != receipt.lease:
        raise DocumentRefused("its lease is missing", "lease")
    lease = read_document(held, Lease)
    if broker not in held.signers or lease.provider not in held.signers:
        raise DocumentRefused("its lease lacks the broker's or the provider's signature", "lease")
    if lease.provider != receipt.provider or lease.job != receipt.job:
        raise DocumentRefused("it is of another run than its lease", "lease")
    if lease.renter != renter or lease.epoch != receipt.epoch:
        raise DocumentRefused("its lease is somebody else's", "lease")
    expected = min(
        charge_ucr(lease.price_ucr_per_device_hour, receipt.cum_device_ms), lease.hold_ucr
    )
    if receipt.charge_ucr != expected:
        raise DocumentRefused(
            f"charge {receipt.charge_ucr}, the lease says {expected}", "charge_ucr"
        )
