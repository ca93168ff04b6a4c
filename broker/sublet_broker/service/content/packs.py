"""Packs: how content lies in the store, how it is read, and how room is made in it.

What was uploaded together lies in one file, a pack; an index lies in a file of its own. Where each
piece lies the database says (ContentFact), from the same transaction on that claims it.

Rules:
- A pack is written once, under an id that nobody else has had. It counts from the commit on that
  names it (PackFact), and never again after the one that forgets it: then its file is deleted. A
  file that no row names is what was left by a broker that was killed in between; it is swept.
- What comes twice lies where it came last: bytes that were hashed just now, and who sent them sees
  no difference between content that was here and content that wasn't.
- A pack of which nothing is needed goes. One of which less than half is needed is written anew
  together with others (compaction).
- Content is hashed whenever it is read, and all of a pack now and then (scrub). What doesn't match
  is forgotten, so that it counts as missing and is sent again; what is whole in the same pack moves
  out of it, and the pack is set aside. The checkpoints that need what was lost are verified again.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from sublet_broker.market.facts import (
    BlobFact,
    CheckpointFact,
    ContentFact,
    PackFact,
    UploadFact,
)
from sublet_broker.service.content.pack_work import OwnPackWork
from sublet_broker.service.ports import BlobMissing, PackWork, StorageFull, VerifyTask
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.packs import in_packs
from sublet_contracts.states import CheckpointState

FILES_AT_ONCE = 64
REWRITES_AT_ONCE = 32
"""How many packs one call of `let_go` reads at the most; a daily look finds the rest."""
SCRUBS_AT_ONCE = 8
DAMAGED = 0
"""As a pack's `scrub_ms`: something in it was damaged, so the rest is looked at next."""
SCOPES_TOLD = 100
"""Of so many scopes that have lost a piece, checkpoints are verified again at once."""
_READS = 3


class Packs:
    """Where content lies."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._blobs = context.ports.blobs
        self._own = OwnPackWork(self._blobs)
        self.work: PackWork = context.ports.pack_work or self._own

    # -- reading ----------------------------------------------------------------------------------

    def read(self, digest: str) -> bytes:
        """Return content. Raises BlobMissing, also for what was found damaged."""
        for _ in range(_READS):
            with self._context.read() as snapshot:
                content = snapshot.get(ContentFact, digest)
            if content is None:
                break
            if content.pack:
                data = self._own.read(content)
                if data is not None:
                    return data
                # Or it has moved to another pack since: then the row is another one.
                self._forget_lost([content])
                continue
            try:
                return self._blobs.get(digest)
            except BlobMissing:
                with self._context.pins.deleting((digest,)) as unpinned:
                    # Who sends it again at this moment has it pinned, or has it there already.
                    if unpinned and not self._blobs.has(digest):
                        self._forget_lost([content])
        raise BlobMissing(f"{digest} is not here, or was damaged", digest)

    def read_many(self, contents: Sequence[ContentFact]) -> list[bytes]:
        """Return content that was seen to lie there just now. Raises BlobMissing."""
        found: list[bytes] = []
        for content in contents:
            data = self._own.read(content) if content.pack else None
            # What isn't as it should be may have moved since; else it is lost.
            found.append(data if data is not None else self.read(content.digest))
        return found

    def present(self, contents: Iterable[ContentFact]) -> set[str]:
        """Return the hashes of those whose files lie there; their content isn't read."""
        files: dict[str, bool] = {}
        found: set[str] = set()
        for content in contents:
            file = content.pack or content.digest
            if file not in files:
                look = self._blobs.has_pack if content.pack else self._blobs.has
                files[file] = look(file)
            if files[file]:
                found.add(content.digest)
        return found

    # -- writing ----------------------------------------------------------------------------------

    def new_id(self) -> str:
        """Return an id for a pack."""
        return self._context.ports.entropy.hex(32)

    def note(
        self, work: UnitOfWork, pack: str, size_bytes: int, contents: Sequence[ContentFact]
    ) -> None:
        """Note in the transaction what lies in a pack whose file is there."""
        scrub_ms = work.now_ms + self._context.settings.scrub_every_ms
        work.put(PackFact(pack, size_bytes, scrub_ms))
        work.put_all(contents)

    # -- making room ------------------------------------------------------------------------------

    def let_go(self, gone: Iterable[ContentFact]) -> None:
        """Make room after content was forgotten, or has come to lie elsewhere."""
        packs: dict[str, None] = {}
        alone: list[str] = []
        for content in gone:
            if content.pack:
                packs[content.pack] = None
            else:
                alone.append(content.digest)
        self.delete_files(alone)
        self.tidy(packs)

    def delete_files(self, hashes: Iterable[str]) -> None:
        """Delete the files of content that doesn't lie there, and that nobody is about to claim."""
        rest = iter(hashes)
        while batch := list(islice(rest, FILES_AT_ONCE)):
            with self._context.pins.deleting(batch) as unpinned:
                with self._context.read() as snapshot:
                    used = {
                        row.digest
                        for row in snapshot.find(
                            ContentFact, {"digest": tuple(unpinned), "pack": ""}
                        )
                    }
                for digest in unpinned:
                    if digest not in used:
                        self._blobs.delete(digest)

    def delete_unknown(self, packs: Iterable[str]) -> None:
        """Delete the files of packs that no row names, and that nobody is about to name."""
        with self._context.pins.deleting(packs) as unpinned:
            with self._context.read() as snapshot:
                ids = tuple(unpinned)
                known = {row.id for row in snapshot.find(PackFact, {"id": ids})}
                known |= {row.id for row in snapshot.find(UploadFact, {"id": ids})}
            for pack in unpinned:
                if pack not in known:
                    self._blobs.delete_pack(pack)

    def tidy(self, packs: Iterable[str]) -> None:
        """Delete the packs of which nothing is needed; write anew those that are half empty."""
        empty: list[str] = []
        half: list[str] = []
        contents: list[ContentFact] = []
        for pack in packs:
            with self._context.read() as snapshot:
                fact = snapshot.get(PackFact, pack)
                rows = snapshot.find(ContentFact, {"pack": pack})
            if fact is None:
                continue
            if not rows:
                empty.append(pack)
                continue
            living = sum(row.size_bytes for row in rows)
            if 2 * living < fact.size_bytes and len(half) < REWRITES_AT_ONCE:
                half.append(pack)
                contents += rows
        self._forget_empty(empty)
        where = {content.digest: content for content in contents}
        sizes = {content.digest: content.size_bytes for content in contents}
        try:
            for table in in_packs(where, sizes):
                self._move([where[digest] for digest, _ in table.chunks])
        except StorageFull:
            return  # There is no room to make some: they stay as they are, and are found again.
        self._forget_empty(half)

    def _forget_empty(self, packs: Sequence[str]) -> None:
        """Forget packs in which nothing lies, and delete their files, or set them aside."""
        if not packs:
            return
        with self._context.work() as work:
            gone = [
                fact
                for fact in work.find(PackFact, {"id": tuple(packs)})
                if not work.find(ContentFact, {"pack": fact.id}, limit=1)
            ]
            for fact in gone:
                work.delete(fact)
        for fact in gone:
            if fact.scrub_ms == DAMAGED:
                self._blobs.set_pack_aside(fact.id)
            else:
                self._blobs.delete_pack(fact.id)

    def _move(self, contents: Sequence[ContentFact]) -> None:
        """Write these into a new pack, each that is whole; the others are lost."""
        pack, at = self.new_id(), 0
        with self._context.pins.hold((pack,)):
            whole = self.work.move(contents, pack)
            lost = [content for content, good in zip(contents, whole, strict=True) if not good]
            moved: list[tuple[ContentFact, ContentFact]] = []
            for content in (c for c, good in zip(contents, whole, strict=True) if good):
                there = ContentFact(content.digest, content.size_bytes, pack, at)
                moved.append((content, there))
                at += content.size_bytes
            kept: list[ContentFact] = []
            if moved:
                with self._context.work() as work:
                    # What came anew meanwhile, or went, stays as it is.
                    kept = [to for was, to in moved if _stands(work, was)]
                    self.note(work, pack, at, kept)
        if moved and not kept:
            self._forget_empty([pack])
        self._forget_lost(lost)

    # -- damage -----------------------------------------------------------------------------------

    def scrub(self) -> int:
        """Read the packs that are due and hash what lies in them. Return how many were read."""
        with self._context.read() as snapshot:
            due = snapshot.find(
                PackFact,
                before=("scrub_ms", snapshot.now_ms + 1),
                order_by="scrub_ms",
                limit=SCRUBS_AT_ONCE,
            )
        for fact in due:
            self._scrub(fact)
        return len(due)

    def _scrub(self, fact: PackFact) -> None:
        with self._context.read() as snapshot:
            rows = snapshot.find(ContentFact, {"pack": fact.id})
        if fact.scrub_ms != DAMAGED and all(self.work.whole(rows)):
            with self._context.work() as work:
                if work.get(PackFact, fact.id) is not None:
                    scrub_ms = work.now_ms + self._context.settings.scrub_every_ms
                    work.put(PackFact(fact.id, fact.size_bytes, scrub_ms))
            self.tidy([fact.id])
        else:
            self._move(rows)
            self._forget_empty([fact.id])

    def _forget_lost(self, lost: Sequence[ContentFact]) -> None:
        """Forget content that doesn't lie where the row says, if the row still says so, and have
        everything looked at that may be hurt by it."""
        if not lost:
            return
        with self._context.work() as work:
            gone = [content for content in lost if _stands(work, content)]
            for content in gone:
                work.delete(content)
                pack = work.get(PackFact, content.pack) if content.pack else None
                if pack is not None:
                    work.put(PackFact(pack.id, pack.size_bytes, DAMAGED))
            self._doubt(work, gone)

    def _doubt(self, work: UnitOfWork, gone: Sequence[ContentFact]) -> None:
        verifier = self._context.ports.verifier
        most = self._context.settings.max_checkpoint_bytes
        hashes = tuple(content.digest for content in gone)
        claims = work.find(BlobFact, {"digest": hashes}, limit=SCOPES_TOLD) if hashes else []
        for scope in dict.fromkeys(claim.scope for claim in claims):
            # Of outputs the rest is worth having: who downloads them is told what is damaged.
            durable = {"job": scope, "kind": "checkpoint", "state": CheckpointState.DURABLE}
            for fact in work.find(CheckpointFact, durable):
                task = VerifyTask(fact.id, fact.job, fact.index_digest, most)
                work.tx.after_commit(lambda task=task: verifier.submit(task))  # type: ignore[misc]


def _stands(work: UnitOfWork, content: ContentFact) -> bool:
    """Whether the content still lies there, as far as the database says."""
    return work.get(ContentFact, content.digest) == content
