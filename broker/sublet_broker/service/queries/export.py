"""Exporting: a job's documents, each with its place in the log, under a fresh tree head."""

from sublet_broker.market.facts import (
    AmendmentFact,
    ChainFact,
    CheckpointFact,
    JobFact,
    LeaseFact,
    LogEntryFact,
    OfferFact,
    ReceiptFact,
    SettlementFact,
)
from sublet_broker.service.unit_of_work.context import Core
from sublet_broker.service.unit_of_work.unit_of_work import Work
from sublet_contracts.api import LogView
from sublet_contracts.documents import TreeHead, sign_document
from sublet_contracts.envelope import Envelope
from sublet_contracts.export import Export, LogProof
from sublet_contracts.merkle import MerkleLog


def chain_receipts(look: Work, lease: str) -> list[ReceiptFact]:
    """Return the receipts that count, in order: the chain without contradicted ones."""
    chain = look.get(ChainFact, lease)
    if chain is None:
        return []
    return [
        receipt
        for receipt in look.find(ReceiptFact, {"lease": lease}, order_by="sequence")
        if receipt.sequence <= chain.sequence and receipt.id not in chain.evidence
    ]


class Exporter:
    """Makes exports; keeps the log's hashes in memory, since the log only grows."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._log = MerkleLog()

    def export(self, look: Work, job: JobFact) -> Export:
        """Return the job's evidence as it stands now."""
        leases = [
            lease
            for lease in look.find(LeaseFact, {"job": job.id}, order_by="epoch")
            if lease.active_ms is not None
        ]
        offers = {lease.offer: look.must(OfferFact, lease.offer).envelope for lease in leases}
        amendments = look.find(AmendmentFact, {"job": job.id})
        checkpoints = look.find(CheckpointFact, {"job": job.id}, order_by="created_ms")
        receipts = [r for lease in leases for r in chain_receipts(look, lease.id)]
        settlements = look.find(SettlementFact, {"job": job.id}, order_by="settled_ms")
        parts: dict[str, tuple[Envelope, ...]] = {
            "amendments": tuple(fact.envelope for fact in amendments),
            "offers": tuple(offers[id] for id in sorted(offers)),
            "leases": tuple(lease.envelope for lease in leases),
            "checkpoints": tuple(fact.envelope for fact in checkpoints),
            "receipts": tuple(fact.envelope for fact in receipts),
            "settlements": tuple(fact.envelope for fact in settlements),
        }
        documents = [job.id]
        for part in parts.values():
            documents += [envelope.id for envelope in part]
        head, proofs = self._prove(look, documents)
        return Export.model_validate(
            {
                "broker": self._core.party,
                "job": job.envelope,
                "tree_head": head,
                "proofs": proofs,
                **parts,
            }
        )

    def _prove(self, look: Work, documents: list[str]) -> tuple[Envelope, dict[str, LogProof]]:
        log = self._grown(look)
        positions = {
            entry.document: entry.id
            for entry in look.find(LogEntryFact, {"document": tuple(documents)})
        }
        proofs = {
            id: LogProof(position=positions[id], path=tuple(log.inclusion_proof(positions[id])))
            for id in documents
        }
        return self._head(look, log), proofs

    def since(self, look: Work, size: int) -> LogView:
        """Return the log's head, and the proof that its first `size` entries are what they were."""
        log = self._grown(look)
        proof = log.consistency_proof(size) if size <= log.size else ()
        return LogView(tree_head=self._head(look, log), consistency=tuple(proof))

    def _head(self, look: Work, log: MerkleLog) -> Envelope:
        head = TreeHead(
            broker=self._core.party, size=log.size, root_sha256=log.root(), issued_ms=look.now_ms
        )
        return sign_document(head, look.key).envelope

    def _grown(self, look: Work) -> MerkleLog:
        """Return the log as this look sees it: a copy that shares what hasn't changed."""
        known = self._log
        added = look.find(LogEntryFact, after=("id", known.size - 1), order_by="id")
        if added:
            known = known.grown([entry.document for entry in added])
            self._log = known
        return known
