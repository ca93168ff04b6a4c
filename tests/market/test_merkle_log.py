"""The log with kept hashes gives what the definition of RFC 6962 gives."""

from __future__ import annotations

import hashlib

from sublet_contracts.merkle import EMPTY_ROOT, MerkleLog, extends, inclusion_proof, root


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


def test_a_log_that_only_grew_proves_it_and_no_other_log_can() -> None:
    ids = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(34)]
    swapped = [*ids[:4], ids[5], ids[4], *ids[6:]]
    for newer in range(len(ids) + 1):
        log, other = MerkleLog(ids[:newer]), MerkleLog(swapped[:newer])
        for older in range(newer + 1):
            was = root(ids[:older])
            proof = log.consistency_proof(older)
            assert extends(older, was, newer, log.root(), proof)
            assert not extends(older, "0" * 64, newer, log.root(), proof)
            if proof:
                assert not extends(older, was, newer, log.root(), proof[:-1])
                assert not extends(older, was, newer, log.root(), [*proof, "0" * 64])
            # The same documents in another order; it differs from the fifth on.
            forged = other.consistency_proof(older)
            if newer >= 6:
                assert extends(older, was, newer, other.root(), forged) == (older < 5)
    assert not extends(5, root(ids[:5]), 4, root(ids[:4]), [])
    assert not extends(3, "not hex", 4, root(ids[:4]), ["zz"])
    assert not extends(0, "0" * 64, 4, root(ids[:4]), [])
    assert extends(0, EMPTY_ROOT, 0, EMPTY_ROOT, [])
