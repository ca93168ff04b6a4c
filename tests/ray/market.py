"""Offers and jobs as facts, for tests of the engine."""

from __future__ import annotations

from sublet_broker.market.facts import AgentFact, JobFact, OfferFact
from sublet_broker.market.offers import pool_of
from sublet_broker.service.ports import Transaction
from sublet_contracts.documents import Device, Job, Offer, Resources, sign_document
from sublet_contracts.keys import SigningKey
from sublet_contracts.states import JobState

BROKER = SigningKey.from_seed(b"b" * 32)
RENTER = SigningKey.from_seed(b"r" * 32)
NOW_MS = 1_800_000_000_000
FOREVER_MS = NOW_MS + 10**12
GIB = 1024**3


def provider(number: int) -> SigningKey:
    """A provider's key."""
    return SigningKey.from_seed(bytes([number]) * 32)


def offer(number: int, *, region: str = "here", price: int = 400_000) -> OfferFact:
    """An open offer of provider `number`: one GPU in `region`."""
    key = provider(number)
    device = Device(
        id=f"GPU-{number}", kind="gpu", name="T4", memory_bytes=16 * GIB, hardware_class="t4"
    )
    document = Offer(
        provider=key.party,
        broker=BROKER.party,
        sequence=1,
        name=f"machine {number}",
        devices=(device,),
        price_ucr_per_device_hour=price,
        cpu_millis=4000,
        memory_bytes=16 * GIB,
        disk_bytes=100 * GIB,
        region=region,
        runner="docker",
        image_policy="any",
        egress=False,
        accepts=(),
        grace_ms=30_000,
        issued_ms=NOW_MS,
        expires_ms=FOREVER_MS,
    )
    signed = sign_document(document, key)
    return OfferFact(
        id=signed.id,
        provider=key.party,
        sequence=1,
        pool=pool_of(document),
        open=True,
        expires_ms=FOREVER_MS,
        envelope=signed.envelope,
    )


def job(number: int, *, region: str = "") -> JobFact:
    """A queued job that wants one GPU."""
    document = Job(
        renter=RENTER.party,
        broker=BROKER.party,
        nonce=f"{number:016x}",
        name=f"job {number}",
        image="python:3",
        command=("true",),
        env={},
        resources=Resources(
            devices=1, device_kind="gpu", memory_bytes=GIB, disk_bytes=GIB, region=region
        ),
        max_price_ucr_per_device_hour=500_000,
        budget_ucr=5_000_000,
        checkpoint_interval_ms=60_000,
        patience_ms=20_000,
        inputs=(),
        accept_receipts_up_to_ucr=5_000_000,
        issued_ms=NOW_MS,
        expires_ms=FOREVER_MS,
    )
    signed = sign_document(document, RENTER)
    return JobFact(
        id=signed.id,
        renter=RENTER.party,
        name=document.name,
        state=JobState.QUEUED,
        envelope=signed.envelope,
        budget_ucr=5_000_000,
        accept_ucr=5_000_000,
        submitted_ms=NOW_MS + number,
    )


def open_market(tx: Transaction, offers: list[OfferFact], jobs: list[JobFact]) -> None:
    """Write offers of connected agents, and jobs, as the use-cases would."""
    for fact in offers:
        tx.put(fact)
        tx.put(
            AgentFact(
                fact.provider,
                "instance",
                connected=True,
                last_seen_ms=NOW_MS,
                offer=fact.id,
                offer_sequence=1,
            )
        )
    for queued in jobs:
        tx.put(queued)
