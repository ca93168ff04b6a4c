"""The auditor's rules about images: one job, one image, from its first run to its last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.simulation.models import LeaseModel, never

if TYPE_CHECKING:
    from tests.simulation.auditor import Auditor

TROUBLES = frozenset(["image_unknown", "pull_failed", "image_not_allowed"])


class Images:
    """Follows them by what truly ran, and by what the signed documents say of it."""

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor
        self._ran: dict[str, str] = {}
        """By lease: the image that its container was made of."""

    def began(self, id: str, lease: LeaseModel | None, image: str) -> None:
        """A container was made of an image."""
        self._ran[id] = image
        if lease is None:
            return
        document = lease.document
        named = document["image"]
        never(named not in ("", image), f"a run has image {image}, its lease names {named}")
        start = self._auditor.checkpoints.get(document["start_checkpoint"] or "")
        if start is not None:
            before = self._ran.get(start.document["lease"], image)
            never(before != image, f"a job goes on with {image} what {before} began")

    def leased(self, document: dict[str, Any], start: dict[str, Any]) -> None:
        """A lease is to go on from a checkpoint."""
        made = start["image"]
        never(
            made not in ("", document["image"]),
            f"a lease names image {document['image']}, its checkpoint was made with {made}",
        )

    def checkpoint(self, document: dict[str, Any]) -> None:
        """A checkpoint was taken up."""
        honest = self._auditor.market.agents_by_party[document["provider"]].honest
        expected = self.of(document["lease"])
        never(
            honest and document["image"] != expected,
            f"a checkpoint says that {document['image']} made it, it was {expected}",
        )

    def of(self, lease: str) -> str:
        """Return what a checkpoint of a lease has to say that it was made with."""
        document = self._auditor.leases[lease].document
        tagged = "@sha256:" not in self._auditor.jobs[document["job"]].document["image"]
        return self._ran.get(lease, "") if tagged else ""

    def refused(self, id: str, lease: LeaseModel) -> bool:
        """Say whether a lease was refused because its image can't be had; that must be true."""
        if lease.signed or lease.reason not in TROUBLES:
            return False
        agent = self._auditor.market.agents_by_party[lease.document["provider"]]
        had = self._auditor.truth.had_trouble(id, lease.reason)
        never(agent.honest and not had, f"a lease is refused as {lease.reason}, which wasn't so")
        return True
