"""The log with kept hashes gives what the definition of RFC 6962 gives."""

from __future__ import annotations

import hashlib

from sublet_contracts.merkle import MerkleLog, inclusion_proof, root


def test_growing_logs_agree_with_the_definition() -> None:
    ids = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(40)]
    grown = MerkleLog()
    for size in range(len(ids) + 1):
        whole = MerkleLog(ids[:size])
        assert whole.root() == grown.root() == root(ids[:size])
        for position in range(size):
            proof = inclusion_proof(ids[:size], position)
            assert whole.inclusion_proof(position) == grown.inclusion_proof(position) == proof
        grown = grown.grown(ids[size : size + 1])


def test_a_log_grown_by_many_agrees_too() -> None:
    ids = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(37)]
    for cut in (0, 1, 7, 8, 9, 30):
        assert MerkleLog(ids[:cut]).grown(ids[cut:]).root() == root(ids)
