"""The append-only log: Merkle tree hashes and inclusion proofs (RFC 6962, section 2.1).

A leaf is a document id. Whoever keeps a signed tree head can check that a document is in the log
(inclusion) and that a later head only added to it (consistency).
"""

import hashlib
import re
from collections.abc import Sequence

EMPTY_ROOT = hashlib.sha256(b"").hexdigest()


def leaf_hash(document_id: str) -> bytes:
    """Return the hash of a leaf."""
    return hashlib.sha256(b"\x00" + bytes.fromhex(document_id)).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _split(size: int) -> int:
    """Return the largest power of two smaller than `size`."""
    return 1 << ((size - 1).bit_length() - 1)


def _root(leaves: Sequence[bytes]) -> bytes:
    if not leaves:
        return hashlib.sha256(b"").digest()
    # Level by level: a lone last node moves up as it is, which gives the same tree as the
    # recursive definition without its depth of calls.
    level = list(leaves)
    while len(level) > 1:
        paired = [_node(a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        if len(level) % 2:
            paired.append(level[-1])
        level = paired
    return level[0]


def root(document_ids: Sequence[str]) -> str:
    """Return the log's root over `document_ids`, 64 hex digits."""
    return _root([leaf_hash(d) for d in document_ids]).hex()


def inclusion_proof(document_ids: Sequence[str], position: int) -> list[str]:
    """Return the sibling hashes that lead from the leaf at `position` to the root."""
    leaves = [leaf_hash(d) for d in document_ids]
    if not 0 <= position < len(leaves):
        raise IndexError(f"the log has {len(leaves)} entries, none at {position}")

    def path(start: int, end: int, at: int) -> list[bytes]:
        if end - start == 1:
            return []
        middle = start + _split(end - start)
        if at < middle:
            return [*path(start, middle, at), _root(leaves[middle:end])]
        return [*path(middle, end, at), _root(leaves[start:middle])]

    return [h.hex() for h in path(0, len(leaves), position)]


def root_from_inclusion(
    document_id: str, position: int, size: int, proof: Sequence[str]
) -> str | None:
    """Return the root that `proof` leads to, or None if it can't be a proof of that form."""
    if not 0 <= position < size or len(proof) > 64:
        return None
    hashed = leaf_hash(document_id)
    at, last = position, size - 1
    for sibling_hex in proof:
        if last == 0 or not re.fullmatch(r"[0-9a-f]{64}", sibling_hex):
            return None
        sibling = bytes.fromhex(sibling_hex)
        if at % 2 or at == last:
            hashed = _node(sibling, hashed)
            while at and not at % 2:
                at //= 2
                last //= 2
        else:
            hashed = _node(hashed, sibling)
        at //= 2
        last //= 2
    return hashed.hex() if last == 0 else None


def extends(
    older_size: int, older_root: str, newer_size: int, newer_root: str, proof: Sequence[str]
) -> bool:
    """Say whether `proof` shows that the newer log begins with the older (RFC 9162, 2.1.4.2)."""
    if not 0 <= older_size <= newer_size or len(proof) > 128:
        return False
    if not all(re.fullmatch(r"[0-9a-f]{64}", node) for node in proof):
        return False
    if older_size == newer_size:
        return older_root == newer_root and not proof
    if older_size == 0:
        return older_root == EMPTY_ROOT and not proof
    path = [bytes.fromhex(node) for node in proof]
    if older_size & (older_size - 1) == 0:
        # The older log is a whole subtree: its root is known, so the proof doesn't repeat it.
        path.insert(0, bytes.fromhex(older_root))
    if not path:
        return False
    at, last = older_size - 1, newer_size - 1
    while at % 2:
        at //= 2
        last //= 2
    older = newer = path[0]
    for node in path[1:]:
        if last == 0:
            return False
        if at % 2 or at == last:
            older, newer = _node(node, older), _node(node, newer)
            while at and not at % 2:
                at //= 2
                last //= 2
        else:
            newer = _node(newer, node)
        at //= 2
        last //= 2
    return last == 0 and older.hex() == older_root and newer.hex() == newer_root


class MerkleLog:
    """A log with its hashes kept, level by level, so that a proof costs only its own length.

    Immutable: `grown` returns a longer log.
    """

    def __init__(self, document_ids: Sequence[str] = ()) -> None:
        self._levels: list[list[bytes]] = [[leaf_hash(d) for d in document_ids]]
        self._rebuild(0)

    @property
    def size(self) -> int:
        """How many documents the log has."""
        return len(self._levels[0])

    def grown(self, document_ids: Sequence[str]) -> "MerkleLog":
        """Return this log with `document_ids` appended."""
        longer = MerkleLog()
        longer._levels = [list(level) for level in self._levels]
        before = self.size
        longer._levels[0] += [leaf_hash(d) for d in document_ids]
        longer._rebuild(before)
        return longer

    def _rebuild(self, first_changed: int) -> None:
        """Compute every level above the leaves, from the first leaf that is new."""
        depth = 0
        while len(self._levels[depth]) > 1:
            below = self._levels[depth]
            # A lone last node had moved up as it was, so its parent changes too.
            first_changed = max(0, first_changed - 1) // 2
            if depth + 1 == len(self._levels):
                self._levels.append([])
                first_changed = 0
            above = self._levels[depth + 1]
            del above[first_changed:]
            for left in range(2 * first_changed, len(below), 2):
                pair = below[left : left + 2]
                above.append(_node(*pair) if len(pair) == 2 else pair[0])
            depth += 1

    def root(self) -> str:
        """Return the root, 64 hex digits."""
        return self._levels[-1][0].hex() if self.size else EMPTY_ROOT

    def inclusion_proof(self, position: int) -> list[str]:
        """Return the sibling hashes that lead from the leaf at `position` to the root."""
        if not 0 <= position < self.size:
            raise IndexError(f"the log has {self.size} entries, none at {position}")
        path: list[str] = []
        for level in self._levels[:-1]:
            sibling = position ^ 1
            if sibling < len(level):
                path.append(level[sibling].hex())
            position //= 2
        return path

    def consistency_proof(self, older_size: int) -> list[str]:
        """Return what leads from the log's first `older_size` entries to all of it."""
        if not 0 <= older_size <= self.size:
            raise IndexError(f"the log has {self.size} entries, and never had {older_size}")
        if older_size in (0, self.size):
            return []

        def path(start: int, end: int, whole: bool) -> list[bytes]:
            if end == older_size:
                return [] if whole else [self._subtree(start, end)]
            middle = start + _split(end - start)
            if older_size <= middle:
                return [*path(start, middle, whole), self._subtree(middle, end)]
            return [*path(middle, end, False), self._subtree(start, middle)]

        return [node.hex() for node in path(0, self.size, True)]

    def _subtree(self, start: int, end: int) -> bytes:
        """The root over a range as the tree has it: aligned, and whole or at the log's end."""
        depth = (end - start - 1).bit_length()
        return self._levels[depth][start >> depth]
