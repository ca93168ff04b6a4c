"""The broker's log as this party has seen it: it may only grow.

Everything that was signed stands in an append-only log, whose head the broker signs. Whoever keeps
a head can demand the proof that a later log begins with the one it saw (RFC 6962, 2.1.2). A broker
that drops, changes or reorders what it once logged can't give that proof, and the two heads, both
with its signature, show it to anybody.
"""

from pydantic import ValidationError

from sublet.errors import SubletError
from sublet_contracts.api import LogView, Problem
from sublet_contracts.documents import DocumentRefused, TreeHead, open_document
from sublet_contracts.envelope import Envelope
from sublet_contracts.export import Export
from sublet_contracts.merkle import extends


class LogRewritten(SubletError):
    """The broker's log doesn't begin with what was seen of it. `older` and `newer` prove it."""

    def __init__(self, older: Envelope, newer: Envelope | None, why: str) -> None:
        super().__init__(
            Problem(
                title="The broker's log was rewritten",
                status=502,
                code="log_rewritten",
                detail=f"the broker's log is not the one it signed before: {why}",
            ),
            "sign and pay nothing more there; export what you can, and ask the operator",
        )
        self.older = older
        self.newer = newer


def head_of(envelope: Envelope, broker: str) -> TreeHead:
    """Return the head that `broker` signed. Raises DocumentRefused."""
    return open_document(envelope, TreeHead, signed_by=(broker,)).document


def head_in(export: bytes) -> Envelope:
    """Return the head that an export rests on. Raises DocumentRefused."""
    try:
        return Export.model_validate_json(export).tree_head
    except ValidationError as error:
        raise DocumentRefused(f"it isn't an export: {error.errors()[0]['msg']}", "") from error


def proven_growth(view: LogView, older: Envelope, broker: str) -> Envelope:
    """Return the log's newer head, if it is proven to extend `older`. Raises LogRewritten."""
    was = head_of(older, broker)
    try:
        now = head_of(view.tree_head, broker)
    except DocumentRefused as error:
        raise LogRewritten(older, None, f"its head is no head: {error}") from error
    if now.size < was.size:
        why = f"it had {was.size} entries and has {now.size}"
        raise LogRewritten(older, view.tree_head, why)
    proof = view.consistency
    if not extends(was.size, was.root_sha256, now.size, now.root_sha256, proof):
        why = f"its first {was.size} entries are not what they were"
        raise LogRewritten(older, view.tree_head, why)
    return view.tree_head
