"""The lease's receipts: cumulative, chained by hash, signed by us."""

from sublet_agent.core.metering import charge_ucr
from sublet_agent.core.records import RunRecord
from sublet_contracts.documents import Receipt, sign_document
from sublet_contracts.envelope import Envelope
from sublet_contracts.keys import SigningKey
from sublet_contracts.reasons import Reason
from sublet_contracts.versions import Reads

RECEIPT_EVERY_MS = 30_000
"""of the run's own time: the machine's clock may be set back in the middle of it"""


def is_due(record: RunRecord) -> bool:
    """Say whether a running lease's next receipt should be written."""
    since_device_ms = record.cum_device_ms - max(0, record.last_receipt_cum_device_ms)
    return record.started_ms is not None and since_device_ms >= RECEIPT_EVERY_MS * record.devices


def write_receipt(
    record: RunRecord,
    key: SigningKey,
    broker_reads: Reads,
    now_ms: int,
    *,
    final: Reason | None = None,
) -> Envelope:
    """Return the next receipt of the chain, in the newest version that the broker reads, and
    advance `record`, which must be saved with it."""
    receipt = Receipt(
        provider=key.party,
        job=record.job_id,
        lease=record.lease_id,
        epoch=record.lease.epoch,
        sequence=record.last_receipt_sequence + 1,
        previous=record.last_receipt_id,
        cum_device_ms=record.cum_device_ms,
        pull_device_ms=min(record.pull_device_ms, record.cum_device_ms),
        reached_step=max([record.durable_step, *record.local_checkpoints]),
        durable_step=record.durable_step,
        durable_checkpoint=record.durable_checkpoint,
        durable_device_ms=min(record.durable_device_ms, record.cum_device_ms),
        charge_ucr=charge_ucr(record, record.cum_device_ms),
        final=final is not None,
        reason=final,
        issued_ms=now_ms,
    )
    envelope = sign_document(receipt, key, reads=broker_reads).envelope
    record.last_receipt_sequence = receipt.sequence
    record.last_receipt_id = envelope.id
    record.last_receipt_cum_device_ms = record.cum_device_ms
    return envelope
