"""Our offers, and which lease they allow: the agent's one moment of choice.

A lease is signed only if every rule of `refusal` holds; afterwards no human is asked. Whether our
machine meets what the job requires is judged as the broker judges it (contracts' requirements.py),
by the job's and our own signed words, and by the very devices that the lease names.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sublet_agent.core.records import IssuedOffer, RunRecord
from sublet_contracts.documents import (
    Checkpoint,
    Device,
    DocumentRefused,
    Job,
    Lease,
    Offer,
    Signed,
    open_document,
)
from sublet_contracts.image_references import can_mean
from sublet_contracts.keys import short
from sublet_contracts.requirements import required_by, shortfalls
from sublet_contracts.wire import Assign

OFFER_LIFE_MS = 900_000
OFFER_REFRESH_MS = 300_000
KEEP_OFFERS = 8


@dataclass(frozen=True)
class Terms:
    """What the owner offers, as given on the command line and found on the machine."""

    name: str
    devices: tuple[Device, ...]
    price_ucr_per_device_hour: int
    cpu_millis: int
    """thousandths of a core that one device brings along"""
    memory_bytes: int
    disk_bytes: int
    region: str
    runner: str
    image_policy: str
    egress: bool
    accepts: tuple[str, ...]
    grace_ms: int
    users: bool = False
    """whether jobs may choose as whom they run"""
    asked_memory_bytes: int = 0
    """what the owner said may be offered in all; 0: most of what is there"""
    asked_disk_bytes: int = 0


@dataclass(frozen=True)
class Assigned:
    """An Assign whose documents have all been verified."""

    lease: Signed[Lease]
    job: Signed[Job]
    checkpoint: Signed[Checkpoint] | None


def make_offer(terms: Terms, *, provider: str, broker: str, sequence: int, now_ms: int) -> Offer:
    """Return the next offer."""
    return Offer.model_validate(
        {
            "provider": provider,
            "broker": broker,
            "sequence": sequence,
            "name": terms.name,
            "devices": terms.devices,
            "price_ucr_per_device_hour": terms.price_ucr_per_device_hour,
            "cpu_millis": terms.cpu_millis,
            "memory_bytes": terms.memory_bytes,
            "disk_bytes": terms.disk_bytes,
            "region": terms.region,
            "runner": terms.runner,
            "image_policy": terms.image_policy,
            "egress": terms.egress,
            "users": terms.users,
            "accepts": terms.accepts,
            "grace_ms": terms.grace_ms,
            "issued_ms": now_ms,
            "expires_ms": now_ms + OFFER_LIFE_MS,
        }
    )


def read_assign(assign: Assign, broker: str) -> Assigned:
    """Verify the documents of an Assign against each other. Raises DocumentRefused."""
    lease = open_document(assign.lease, Lease, signed_by=(broker,))
    job = open_document(assign.job, Job)
    checkpoint = None
    if assign.checkpoint is not None:
        checkpoint = open_document(assign.checkpoint, Checkpoint)
    document = lease.document
    if document.broker != broker or job.document.broker != broker:
        raise DocumentRefused("the lease or its job is meant for another broker", "broker")
    if document.job != job.id or document.renter != job.document.renter:
        raise DocumentRefused("the lease is for another job than the one that came along", "job")
    found = checkpoint.id if checkpoint else None
    if document.start_checkpoint != found:
        raise DocumentRefused("the lease starts from another checkpoint", "start_checkpoint")
    if checkpoint is not None:
        if checkpoint.document.job != job.id or checkpoint.document.kind != "checkpoint":
            raise DocumentRefused("the checkpoint belongs to another job", "checkpoint.job")
        if checkpoint.document.step != document.start_step:
            raise DocumentRefused("the checkpoint is of another step", "start_step")
    return Assigned(lease, job, checkpoint)


def lacking(assigned: Assigned, offer: Offer) -> str:
    """Return what the lease's devices and this machine, as an offer says them, lack for the job."""
    named = set(assigned.lease.document.device_ids)
    devices = [device for device in offer.devices if device.id in named]
    # Not with fewer cores than the lease says threads, or its bits would come too slowly.
    need = replace(
        required_by(assigned.job.document), pinned_threads=assigned.lease.document.threads
    )
    return "; ".join(map(str, shortfalls(need, offer, devices)))


def refusal(
    assigned: Assigned,
    *,
    provider: str,
    offers: Iterable[IssuedOffer],
    runs: Iterable[RunRecord],
    epochs: dict[str, int],
    now_ms: int,
    broker_now_ms: int,
) -> str:
    """Return why this lease isn't signed, in words; '' if it may be.

    `broker_now_ms`: what the broker's clock shows at the least. Its few seconds for an answer are
    counted there: by ours, which may be minutes off, every lease would seem to have passed.
    """
    lease, job = assigned.lease.document, assigned.job.document
    if lease.provider != provider:
        return "provider: the lease is another provider's"
    issued = next((offer for offer in offers if offer.id == lease.offer), None)
    if issued is None:
        return "offer: not one of my recent offers; use the newest"
    offer = open_document(issued.envelope, Offer).document
    if offer.expires_ms <= now_ms:
        return "offer: it has expired; use the newest"
    if lease.answer_by_ms <= broker_now_ms:
        return f"answer_by_ms: passed {broker_now_ms - lease.answer_by_ms} ms ago"
    if lease.price_ucr_per_device_hour < offer.price_ucr_per_device_hour:
        return f"price: below the offer's {offer.price_ucr_per_device_hour} ucr per device-hour"
    if lease.price_ucr_per_device_hour > job.max_price_ucr_per_device_hour:
        return "price: above what the job allows"
    if lease.epoch <= epochs.get(assigned.job.id, 0):
        return f"epoch: I have signed epoch {epochs[assigned.job.id]} of this job already"
    devices = {device.id: device for device in offer.devices}
    if unknown := [id for id in lease.device_ids if id not in devices]:
        return f"device_ids: {unknown[0]} is not in the offer"
    if len(set(lease.device_ids)) != len(lease.device_ids) or (
        len(lease.device_ids) != job.resources.devices
    ):
        return f"device_ids: the job asks for {job.resources.devices} different devices"
    if short_of := lacking(assigned, offer):
        return short_of
    for record in runs:
        taken = set(record.lease.device_ids) & set(lease.device_ids)
        if taken and not record.is_over:
            return f"device_ids: {min(taken)} is leased under {short(record.lease_id)}"
    if lease.image and not can_mean(job.image, lease.image):
        return f"image: {lease.image} is not what {job.image[:100]!a} can have meant"
    if lease.epoch == 1 and job.expires_ms <= now_ms:
        return "job: it has expired"
    return ""
