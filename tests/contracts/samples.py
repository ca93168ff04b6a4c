"""One plain sample of every document, and parties from fixed seeds, for the contracts' tests."""

from sublet_contracts.documents import (
    Amendment,
    Checkpoint,
    Deposit,
    Device,
    Document,
    Input,
    Job,
    KeyDocument,
    Lease,
    Offer,
    Receipt,
    Resources,
    Settlement,
    Transfer,
    TreeHead,
)
from sublet_contracts.keys import SigningKey
from sublet_contracts.reasons import Fault, Reason
from sublet_contracts.session import SessionProof
from sublet_contracts.versions import ReceiptV1, without

NOW_MS = 1_767_225_600_000  # 2026-01-01, midnight UTC
HOUR_MS = 3_600_000

SEEDS = {name: bytes([number]) * 32 for number, name in enumerate(
    ("broker", "provider", "renter", "stranger"), start=1
)}  # fmt: skip
KEYS = {name: SigningKey.from_seed(seed) for name, seed in SEEDS.items()}
BROKER, PROVIDER, RENTER = (KEYS[name].party for name in ("broker", "provider", "renter"))

JOB_ID, OFFER_ID, LEASE_ID, CHECKPOINT_ID, RECEIPT_ID, ROOT = (digit * 64 for digit in "abcdef")
INDEX = "blake3:" + "f" * 64


def samples() -> list[tuple[Document, tuple[str, ...]]]:
    """Return a document of each kind, with the names of those who sign it, in order."""
    return [
        (
            KeyDocument(party=RENTER, broker=BROKER, name="Müller & 李", issued_ms=NOW_MS),
            ("renter",),
        ),
        (offer(), ("provider",)),
        (job(), ("renter",)),
        (
            Lease(
                broker=BROKER, provider=PROVIDER, renter=RENTER, job=JOB_ID, offer=OFFER_ID,
                epoch=2, device_ids=("GPU-1",), price_ucr_per_device_hour=400_000, fee_bps=500,
                hold_ucr=5_000_000, start_step=40, start_checkpoint=CHECKPOINT_ID,
                issued_ms=NOW_MS, answer_by_ms=NOW_MS + 10_000,
            ),
            ("broker", "provider"),
        ),
        (
            Checkpoint(
                provider=PROVIDER, job=JOB_ID, lease=LEASE_ID, epoch=2, kind="checkpoint", step=50,
                index_digest=INDEX, total_bytes=91_000_000, cum_device_ms=600_000, issued_ms=NOW_MS,
            ),
            ("provider",),
        ),
        (receipt(), ("provider", "renter")),
        (
            Settlement(
                broker=BROKER, job=JOB_ID, lease=LEASE_ID, epoch=2, receipt=RECEIPT_ID,
                reason=Reason.PROVIDER_LOST, fault=Fault.PROVIDER, accepted_by="renter",
                cum_device_ms=900_000, payable_device_ms=600_000, lost_device_ms=300_000,
                charged_ucr=66_666, fee_ucr=3_333, provider_ucr=63_333,
                transfers=(
                    Transfer(id="1" * 64, debit="job", credit="provider", amount_ucr=63_333),
                    Transfer(id="2" * 64, debit="job", credit="broker", amount_ucr=3_333),
                ),
                issued_ms=NOW_MS,
            ),
            ("broker",),
        ),
        (
            Deposit(broker=BROKER, party=RENTER, amount_ucr=10_000_000, memo="welcome",
                    nonce="0f" * 16, issued_ms=NOW_MS),
            ("broker",),
        ),
        (
            Amendment(renter=RENTER, broker=BROKER, job=JOB_ID, budget_ucr=7_000_000,
                      accept_receipts_up_to_ucr=7_000_000, issued_ms=NOW_MS),
            ("renter",),
        ),
        (TreeHead(broker=BROKER, size=3, root_sha256=ROOT, issued_ms=NOW_MS), ("broker",)),
        (
            SessionProof(party=PROVIDER, broker=BROKER, nonce="ab" * 16, instance="cd" * 8,
                         agent_version="0.1.0", issued_ms=NOW_MS),
            ("provider",),
        ),
    ]  # fmt: skip


def offer() -> Offer:
    """Return an offer of one GPU of which everything is known and one of which little is."""
    return Offer(
        provider=PROVIDER, broker=BROKER, sequence=7, name="lab-3",
        devices=(
            Device(
                id="GPU-1", kind="gpu", name="NVIDIA GeForce RTX 4090", memory_bytes=24 * 2**30,
                hardware_class="rtx-4090", compute_capability="8.9", driver="550.54", ecc=False,
                mig=False, pcie_generation=4, pcie_lanes=16, power_limit_mw=450_000,
            ),
            Device(id="GPU-2", kind="gpu", name="a GPU", memory_bytes=0, hardware_class="a-gpu"),
        ),
        price_ucr_per_device_hour=400_000, cpu_millis=8_000, memory_bytes=32 * 2**30,
        disk_bytes=100 * 2**30, region="eu", runner="docker", image_policy="digest", egress=False,
        accepts=(), grace_ms=60_000, issued_ms=NOW_MS, expires_ms=NOW_MS + HOUR_MS,
    )  # fmt: skip


def job() -> Job:
    """Return a job with an input, outputs and every kind of wish."""
    return Job(
        renter=RENTER, broker=BROKER, nonce="0123456789abcdef", name="ft",
        image="registry.example/ft@sha256:" + "9" * 64,
        command=("python", "train.py", "--note", "größer ≥ \"2\""), env={"SEED": "1"},
        resources=Resources(
            devices=1, device_kind="gpu", device_memory_bytes=24 * 10**9, memory_bytes=16 * 2**30,
            disk_bytes=20 * 2**30,
        ),
        max_price_ucr_per_device_hour=500_000, budget_ucr=5_000_000,
        checkpoint_interval_ms=120_000, patience_ms=20_000,
        inputs=(
            Input(destination="/data/data.csv", kind="file", index_digest=INDEX, total_bytes=9),
        ),
        outputs="/out", checkpoints=("ckpts", "/state"), accept_receipts_up_to_ucr=5_000_000,
        issued_ms=NOW_MS, expires_ms=NOW_MS + 24 * HOUR_MS,
    )  # fmt: skip


def older() -> list[tuple[Document, tuple[str, ...]]]:
    """Return a document of each older version that is still read, with those who sign it."""
    return [(receipt_v1(), ("provider", "renter"))]


def receipt_v1() -> ReceiptV1:
    """Return what `receipt` was before it named the step that was reached."""
    return ReceiptV1.model_validate(without(receipt(), "reached_step", "pull_device_ms"))


def receipt() -> Receipt:
    """Return the final receipt of a lease that lost five minutes."""
    return Receipt(
        provider=PROVIDER, job=JOB_ID, lease=LEASE_ID, epoch=2, sequence=3, previous=RECEIPT_ID,
        cum_device_ms=900_000, reached_step=60, durable_step=50, durable_checkpoint=CHECKPOINT_ID,
        durable_device_ms=600_000, charge_ucr=100_000, final=True, reason=Reason.PROVIDER_LOST,
        issued_ms=NOW_MS,
    )  # fmt: skip
