"""The renter's signature on receipts: given only to what adds up.

A receipt is signed if its lease is for this renter's own job, within the bounds that the renter
signed, bears the signatures of broker and provider, and the receipt's figures follow from it. One
that doesn't is left unsigned, and why is said: the job's bounds then decide, and a dispute has its
evidence.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sublet_contracts.api import ReceiptsPage
from sublet_contracts.documents import (
    DocumentRefused,
    Job,
    Lease,
    Receipt,
    Signed,
    open_document,
)
from sublet_contracts.envelope import Envelope, SignatureRefused
from sublet_contracts.keys import SigningKey
from sublet_contracts.rules import charge_ucr


@dataclass(frozen=True)
class Cosigned:
    """What came of a page of receipts."""

    signed: tuple[Envelope, ...]
    refused: tuple[str, ...]


def cosign(page: ReceiptsPage, key: SigningKey, broker: str, job: Envelope) -> Cosigned:
    """Return the page's receipts with the renter's signature, and what was refused, as text.

    `job`: the document that this renter signed. Raises DocumentRefused if it isn't.
    """
    own = open_document(job, Job, signed_by=(key.party,))
    if own.document.renter != key.party or own.document.broker != broker:
        raise DocumentRefused("the job is not this renter's at this broker", "job")
    signed: list[Envelope] = []
    refused: list[str] = []
    for envelope in page.receipts:
        try:
            check_receipt(envelope, page.leases, own, broker)
            signed.append(envelope.countersigned(key))
        except (DocumentRefused, SignatureRefused) as error:
            refused.append(f"receipt {envelope.id[:10]} is not signed: {error}")
    return Cosigned(tuple(signed), tuple(refused))


def check_receipt(
    envelope: Envelope, leases: Mapping[str, Envelope], job: Signed[Job], broker: str
) -> None:
    """Check one receipt against its lease and the job. Raises DocumentRefused: what is wrong."""
    receipt = open_document(envelope, Receipt).document
    held = leases.get(receipt.lease)
    if held is None or held.id != receipt.lease:
        raise DocumentRefused("its lease is missing", "lease")
    lease = open_document(held, Lease).document
    if not {broker, receipt.provider} <= set(held.signers) or lease.broker != broker:
        raise DocumentRefused("its lease lacks the broker's or the provider's signature", "lease")
    if (lease.provider, lease.job, lease.epoch) != (receipt.provider, receipt.job, receipt.epoch):
        raise DocumentRefused("it is of another run than its lease", "lease")
    if lease.job != job.id or lease.renter != job.document.renter:
        raise DocumentRefused("its lease is for another job", "lease")
    price = lease.price_ucr_per_device_hour
    if price > job.document.max_price_ucr_per_device_hour:
        raise DocumentRefused("its lease costs more than the job's highest price", "lease")
    if len(lease.device_ids) != job.document.resources.devices:
        raise DocumentRefused("its lease has another number of devices than the job asks", "lease")
    expected = min(charge_ucr(price, receipt.cum_device_ms), lease.hold_ucr)
    if receipt.charge_ucr != expected:
        raise DocumentRefused(
            f"it says {receipt.charge_ucr} ucr, its lease {expected}", "charge_ucr"
        )
