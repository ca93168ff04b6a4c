"""A job's evidence in one file, and its verification offline, with public keys alone.

What `verify_export` proves: every signature; that leases belong to the job and to offers that
allowed them; that each receipt chain is unbroken and cumulative; that every charge follows from
its receipt by the rules (price, durable progress, hold, fee); that durable progress rests on a
signed checkpoint; that all charges fit the budget; that every document is in the broker's signed
log. The caller supplies the broker's id it trusts (pinned at first use), or sees it reported.
"""

from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sublet_contracts.documents import (
    Amendment,
    Checkpoint,
    DocumentRefused,
    Job,
    Lease,
    Offer,
    Receipt,
    Settlement,
    Signed,
    TreeHead,
    open_document,
    refused_by_validation,
)
from sublet_contracts.encoding import EncodingError, parse_json
from sublet_contracts.envelope import Envelope
from sublet_contracts.keys import short
from sublet_contracts.merkle import root_from_inclusion
from sublet_contracts.reasons import MEANINGS, Pays, Reason
from sublet_contracts.rules import (
    FREE_KILLS_A_JOB,
    charge_ucr,
    fee_ucr,
    most_pull_device_ms,
    payable_device_ms,
)

MAX_EXPORT_BYTES = 256 * 1024 * 1024


class LogProof(BaseModel):
    """Where a document stands in the log, and the path to the root."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    position: int = Field(ge=0)
    path: tuple[str, ...] = Field(max_length=64)


class Export(BaseModel):
    """All documents of one job. The order within each list does not matter."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: str = Field(default="sublet-export-1", pattern=r"^sublet-export-1$")
    broker: str
    job: Envelope
    amendments: tuple[Envelope, ...]
    offers: tuple[Envelope, ...]
    leases: tuple[Envelope, ...]
    checkpoints: tuple[Envelope, ...]
    receipts: tuple[Envelope, ...]
    settlements: tuple[Envelope, ...]
    tree_head: Envelope
    proofs: dict[str, LogProof] = Field(description="document id -> its place in the log")


@dataclass
class Verdict:
    """The result: `problems` is empty if everything holds."""

    job: str = ""
    broker: str = ""
    leases: int = 0
    receipts: int = 0
    charged_ucr: int = 0
    lost_device_ms: int = 0
    lost_work_charged_ucr: int = 0
    checks: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every check passed."""
        return not self.problems

    def check(self, condition: bool, problem: str) -> bool:
        """Count a check; keep `problem` if it failed."""
        self.checks += 1
        if not condition:
            self.problems.append(problem)
        return condition


def parse_export(data: bytes) -> Export:
    """Return the export in `data`. Raises DocumentRefused."""
    try:
        parse_json(data, max_bytes=MAX_EXPORT_BYTES)
        return Export.model_validate_json(data)
    except EncodingError as error:
        raise DocumentRefused(f"not an export: {error}") from error
    except ValidationError as error:
        raise refused_by_validation(error) from error


def verify_export(data: bytes, *, broker: str | None = None) -> Verdict:
    """Check an export file; see the top of this file. Never raises: what is wrong is reported."""
    verdict = Verdict()
    try:
        export = parse_export(data)
        _Verification(export, broker or export.broker, verdict).run()
    except DocumentRefused as error:
        verdict.check(False, str(error))
    return verdict


class _Verification:
    def __init__(self, export: Export, broker: str, verdict: Verdict) -> None:
        self.export = export
        self.broker = broker
        self.verdict = verdict
        self.free_kills = 0
        # Each envelope is verified and parsed once, here.
        self.offers = {s.id: s for s in (open_document(e, Offer) for e in export.offers)}
        self.receipts = [open_document(e, Receipt) for e in export.receipts]
        self.checkpoints = {
            s.id: s.document for s in (open_document(e, Checkpoint) for e in export.checkpoints)
        }

    def run(self) -> None:
        export, verdict = self.export, self.verdict
        verdict.broker = export.broker
        verdict.check(
            export.broker == self.broker,
            f"the export is of broker {short(export.broker)}, not of {short(self.broker)}",
        )
        job = open_document(export.job, Job)
        verdict.job = job.id
        verdict.check(job.document.broker == self.broker, "the job was signed for another broker")
        budget_ucr, accepted_ucr = self._bounds(job)
        settlements = self._settlements(job)
        total_ucr = 0
        epochs: set[int] = set()
        for envelope in export.leases:
            lease = self._lease(envelope, job)
            verdict.check(
                lease.document.epoch not in epochs,
                f"epoch {lease.document.epoch} was leased twice",
            )
            epochs.add(lease.document.epoch)
            chain = self._chain(lease)
            settlement = settlements.pop(lease.id, None)
            if settlement is not None:
                accepted_ucr = self._settlement(settlement, lease, chain, accepted_ucr)
                total_ucr += settlement.document.charged_ucr
            verdict.leases += 1
        verdict.check(not settlements, "a settlement closes a lease that the export lacks")
        verdict.check(
            total_ucr <= budget_ucr, f"charged {total_ucr} ucr of a budget of {budget_ucr}"
        )
        verdict.charged_ucr = total_ucr
        known = {e.id for e in export.leases}
        for receipt in self.receipts:
            of_job = receipt.document.lease in known
            verdict.check(of_job, f"receipt {short(receipt.id)} is of an unknown lease")
        for id, checkpoint in self.checkpoints.items():
            of_job = checkpoint.lease in known
            verdict.check(of_job, f"checkpoint {short(id)} is of an unknown lease")
        self._log()

    def _bounds(self, job: Signed[Job]) -> tuple[int, int]:
        budget, accepted = job.document.budget_ucr, job.document.accept_receipts_up_to_ucr
        for envelope in self.export.amendments:
            amendment = open_document(envelope, Amendment).document
            self.verdict.check(
                amendment.job == job.id and amendment.renter == job.document.renter,
                "an amendment is of another job",
            )
            budget = max(budget, amendment.budget_ucr)
            accepted = max(accepted, amendment.accept_receipts_up_to_ucr)
        return budget, accepted

    def _lease(self, envelope: Envelope, job: Signed[Job]) -> Signed[Lease]:
        # Every signature that the envelope claims is checked here.
        lease = open_document(envelope, Lease)
        document = lease.document
        name = f"lease {document.epoch}"
        check = self.verdict.check
        check(
            self.broker in envelope.signers and document.provider in envelope.signers,
            f"{name} is not signed by both broker and provider",
        )
        check(document.job == job.id, f"{name} is of another job")
        check(document.renter == job.document.renter, f"{name} names another renter")
        start = self.checkpoints.get(document.start_checkpoint or "")
        check(
            document.start_checkpoint is None
            or (start is not None and start.step == document.start_step),
            f"{name} starts from a checkpoint that is not in the export",
        )
        check(
            start is None or start.image in ("", document.image),
            f"{name} goes on with another image than the one that made its checkpoint",
        )
        made = {c.image for c in self.checkpoints.values() if c.lease == lease.id}
        check(
            len(made) <= 1 and (not document.image or made <= {document.image}),
            f"{name}: its checkpoints were made with another image than the job's",
        )
        offer = self.offers.get(document.offer)
        if not check(offer is not None, f"{name}: its offer is not in the export") or not offer:
            return lease
        price = document.price_ucr_per_device_hour
        check(
            offer.document.provider == document.provider, f"{name} is of another provider's offer"
        )
        check(
            price >= offer.document.price_ucr_per_device_hour
            and price <= job.document.max_price_ucr_per_device_hour,
            f"{name}: its price is outside of what offer and job allow",
        )
        offered = {device.id for device in offer.document.devices}
        check(set(document.device_ids) <= offered, f"{name}: a device that was not offered")
        return lease

    def _chain(self, lease: Signed[Lease]) -> list[Signed[Receipt]]:
        """Return the lease's receipts in order, having checked the chain."""
        check = self.verdict.check
        document = lease.document
        chain = [signed for signed in self.receipts if signed.document.lease == lease.id]
        chain.sort(key=lambda signed: signed.document.sequence)
        previous: Signed[Receipt] | None = None
        for position, signed in enumerate(chain, start=1):
            receipt = signed.document
            name = f"receipt {document.epoch}.{receipt.sequence}"
            check(receipt.sequence == position, f"{name}: the chain has a gap or a fork")
            check(
                receipt.previous == (previous.id if previous else None),
                f"{name} does not follow the receipt before it",
            )
            check(
                receipt.provider == document.provider
                and receipt.epoch == document.epoch
                and receipt.job == document.job,
                f"{name} is of another run",
            )
            if previous:
                before = previous.document
                check(
                    receipt.cum_device_ms >= before.cum_device_ms
                    and receipt.durable_device_ms >= before.durable_device_ms
                    and not before.final,
                    f"{name} goes back behind the one before it",
                )
            expected = min(
                charge_ucr(document.price_ucr_per_device_hour, receipt.cum_device_ms),
                document.hold_ucr,
            )
            check(receipt.charge_ucr == expected, f"{name}: its charge is not price x time")
            most_pull_ms = most_pull_device_ms(
                document.price_ucr_per_device_hour, document.hold_ucr
            )
            check(
                most_pull_ms is None or receipt.pull_device_ms <= most_pull_ms,
                f"{name}: more of the hold is charged for its pull than may be",
            )
            if receipt.durable_checkpoint is None:
                check(receipt.durable_device_ms == 0, f"{name}: durable time without a checkpoint")
            else:
                checkpoint = self.checkpoints.get(receipt.durable_checkpoint)
                check(
                    checkpoint is not None
                    and checkpoint.lease == lease.id
                    and checkpoint.cum_device_ms == receipt.durable_device_ms
                    and checkpoint.provider == receipt.provider
                    and checkpoint.kind == "checkpoint"
                    and checkpoint.step == receipt.durable_step,
                    f"{name}: its durable progress is not that of a signed checkpoint",
                )
            previous = signed
            self.verdict.receipts += 1
        return chain

    def _settlements(self, job: Signed[Job]) -> dict[str, Signed[Settlement]]:
        result: dict[str, Signed[Settlement]] = {}
        for envelope in self.export.settlements:
            signed = open_document(envelope, Settlement, signed_by=(self.broker,))
            self.verdict.check(
                signed.document.lease not in result, "a lease was settled twice"
            ) and self.verdict.check(signed.document.job == job.id, "a settlement of another job")
            result[signed.document.lease] = signed
        return result

    def _settlement(
        self,
        signed: Signed[Settlement],
        lease: Signed[Lease],
        chain: list[Signed[Receipt]],
        accepted_ucr: int,
    ) -> int:
        """Check one settlement; return what remains of the renter's advance acceptance."""
        settlement, terms = signed.document, lease.document
        name = f"settlement of lease {terms.epoch}"
        check = self.verdict.check
        last = chain[-1] if chain else None
        check(settlement.epoch == terms.epoch, f"{name} names another epoch")
        check(
            settlement.receipt == (last.id if last else None),
            f"{name} does not rest on the newest receipt",
        )
        claimed = last.document.cum_device_ms if last else 0
        durable = last.document.durable_device_ms if last else 0
        check(settlement.cum_device_ms <= claimed, f"{name}: more time than the receipt says")
        check(
            settlement.fault == MEANINGS[settlement.reason].fault,
            f"{name}: the fault is not that of its reason",
        )
        if settlement.reason is Reason.KILLED_UNATTRIBUTED:
            self.free_kills += 1
            check(
                self.free_kills <= FREE_KILLS_A_JOB,
                f"{name}: free by a kill that nobody owns to, which {FREE_KILLS_A_JOB} of a job's "
                "may be",
            )
        payable = payable_device_ms(settlement.reason, settlement.cum_device_ms, durable)
        check(
            settlement.payable_device_ms == payable,
            f"{name}: payable time breaks the durable-progress rule",
        )
        check(
            settlement.lost_device_ms == settlement.cum_device_ms - payable,
            f"{name}: lost time does not add up",
        )
        charged = min(charge_ucr(terms.price_ucr_per_device_hour, payable), terms.hold_ucr)
        check(
            settlement.charged_ucr == charged,
            f"{name}: charged {settlement.charged_ucr} ucr, the rule says {charged}",
        )
        check(
            settlement.fee_ucr == fee_ucr(settlement.charged_ucr, terms.fee_bps)
            and settlement.provider_ucr == settlement.charged_ucr - settlement.fee_ucr,
            f"{name}: the fee is not the lease's",
        )
        moved = sum(t.amount_ucr for t in settlement.transfers)
        check(moved == settlement.charged_ucr, f"{name}: its transfers move {moved} ucr")
        earned = f"party:{terms.provider}:earned"
        check(
            sum(t.amount_ucr for t in settlement.transfers if t.credit == earned)
            == settlement.provider_ucr
            and all(t.debit == f"job:{terms.job}:held" for t in settlement.transfers),
            f"{name}: its transfers don't pay the provider from the job's hold",
        )
        self.verdict.lost_device_ms += settlement.lost_device_ms
        if MEANINGS[settlement.reason].pays is Pays.DURABLE:
            durable_ucr = charge_ucr(terms.price_ucr_per_device_hour, durable)
            self.verdict.lost_work_charged_ucr += max(0, settlement.charged_ucr - durable_ucr)
        if settlement.charged_ucr == 0:
            return accepted_ucr
        countersigned = last is not None and terms.renter in last.envelope.signers
        if countersigned:
            return accepted_ucr
        check(
            settlement.accepted_by == "job" and settlement.charged_ucr <= accepted_ucr,
            f"{name}: not signed by the renter, and above what the job accepts in advance",
        )
        return accepted_ucr - settlement.charged_ucr

    def _log(self) -> None:
        check = self.verdict.check
        export = self.export
        head = open_document(export.tree_head, TreeHead, signed_by=(self.broker,)).document
        documents = (
            export.job, *export.amendments, *export.offers, *export.leases, *export.checkpoints,
            *export.receipts, *export.settlements,
        )  # fmt: skip
        for envelope in documents:
            proof = export.proofs.get(envelope.id)
            proven = proof is not None and head.root_sha256 == root_from_inclusion(
                envelope.id, proof.position, head.size, proof.path
            )
            check(proven, f"{short(envelope.id)} is not proven to be in the broker's log")
