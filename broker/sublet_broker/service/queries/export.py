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
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.api import LogView
from sublet_contracts.documents import TreeHead, sign_document
from sublet_contracts.envelope import Envelope
from sublet_contracts.export import Export, LogProof
from sublet_contracts.merkle import MerkleLog


def chain_receipts(snapshot: UnitOfWork, lease: str) -> list[ReceiptFact]:
    """Return the receipts that count, in order: the chain without contradicted ones."""
    chain = snapshot.get(ChainFact, lease)
    if chain is None:
        return []
    return [
        receipt
        for receipt in snapshot.find(ReceiptFact, {"lease": lease}, order_by="sequence")
        if receipt.sequence <= chain.sequence and receipt.id not in chain.evidence
    ]


class Exporter:
    """Makes exports; keeps the log's hashes in memory, since the log only grows."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._log = MerkleLog()

    def export(self, snapshot: UnitOfWork, job: JobFact) -> Export:
        """Return the job's evidence as it stands now."""
        leases = [
            lease
            for lease in snapshot.find(LeaseFact, {"job": job.id}, order_by="epoch")
            if lease.active_ms is not None
        ]
        offers = {lease.offer: snapshot.must(OfferFact, lease.offer).envelope for lease in leases}
        amendments = snapshot.find(AmendmentFact, {"job": job.id})
        checkpoints = snapshot.find(CheckpointFact, {"job": job.id}, order_by="created_ms")
        receipts = [r for lease in leases for r in chain_receipts(snapshot, lease.id)]
        settlements = snapshot.find(SettlementFact, {"job": job.id}, order_by="settled_ms")
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
        head, proofs = self._prove(snapshot, documents)
        return Export.model_validate(
            {
                "broker": self._context.party,
                "job": job.envelope,
                "tree_head": head,
                "proofs": proofs,
                **parts,
            }
        )

    def _prove(
        self, snapshot: UnitOfWork, documents: list[str]
    ) -> tuple[Envelope, dict[str, LogProof]]:
        log = self._grown(snapshot)
        positions = {
            entry.document: entry.id
            for entry in snapshot.find(LogEntryFact, {"document": tuple(documents)})
        }
        proofs = {
            id: LogProof(position=positions[id], path=tuple(log.inclusion_proof(positions[id])))
            for id in documents
        }
        return self._head(snapshot, log), proofs

    def since(self, snapshot: UnitOfWork, size: int) -> LogView:
        """Return the log's head, and the proof that its first `size` entries are what they were."""
        log = self._grown(snapshot)
        proof = log.consistency_proof(size) if size <= log.size else ()
        return LogView(tree_head=self._head(snapshot, log), consistency=tuple(proof))

    def _head(self, snapshot: UnitOfWork, log: MerkleLog) -> Envelope:
        head = TreeHead(
            broker=self._context.party,
            size=log.size,
            root_sha256=log.root(),
            issued_ms=snapshot.now_ms,
        )
        return sign_document(head, snapshot.key).envelope

    def _grown(self, snapshot: UnitOfWork) -> MerkleLog:
        """Return the log as this look sees it: a copy that shares what hasn't changed."""
        known = self._log
        added = snapshot.find(LogEntryFact, after=("id", known.size - 1), order_by="id")
        if added:
            known = known.grown([entry.document for entry in added])
            self._log = known
        return known
