"""Keeping: whose content is here, and how long it stays.

Content has a row for each scope that may use it. Rows come with uploads and with inputs that a job
links, and go when nothing needs them; with the last one goes the content (claims.py, packs.py).

Rules:
- A file is deleted after a look that has seen that no row is left. Whoever adds a row for a new
  file pins it first (pins.py), and what is pinned isn't deleted: so no row ever stands without its
  file.
- Uploading claims content, and so does being told that it is here already. What was claimed after
  the checkpoint it belonged to is not pruned with it: an upload in progress counts on it.
- A job keeps its inputs, its newest checkpoints, its outputs and its newest partial outputs while
  it lives. Once ended it keeps all but the inputs for `keep_ended_ms`.
- What a renter uploaded stays for `keep_inputs_ms` after it was last claimed, and as long as a
  live job of his uses it.
- Small files count as COUNTED_BYTES, so that rows are bounded by bytes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice

from sublet_broker.market.accepted import accepted
from sublet_broker.market.checkpointing import needed, superseded
from sublet_broker.market.facts import BlobFact, CheckpointFact, ContentFact, JobFact, PackFact
from sublet_broker.service.content.claims import claimed, release_all
from sublet_broker.service.content.packs import Packs
from sublet_broker.service.ports import BlobMissing
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.documents import Job
from sublet_contracts.tree import TreeRefused, parse_index

LOOK_AGAIN_MS = 6 * 3_600_000
FILES_EVERY_MS = 24 * 3_600_000
ROWS_AT_ONCE = 500
NAMES_AT_ONCE = 2_000


class Retention:
    """What lets go of content."""

    def __init__(self, context: Context, packs: Packs) -> None:
        self._context = context
        self._packs = packs
        self._names: Iterator[tuple[str, bool]] | None = None
        """Names of files, and whether each is a pack."""
        self._files_due_ms = 0

    def prune(self, job: str) -> None:
        """Let go of the content of a job's older checkpoints and partial outputs, except what newer
        things share."""
        settings = self._context.settings
        with self._context.read() as snapshot:
            everything = snapshot.find(CheckpointFact, {"job": job})
            fact = snapshot.must(JobFact, job)
        old = superseded(everything, settings.keep_checkpoints)
        if not old:
            return
        gone = {c.id for c in old}
        _, trees = needed(
            fact,
            accepted(fact.envelope, Job),
            [c for c in everything if c.id not in gone],
            now_ms=snapshot.now_ms,
            keep_ended_ms=settings.keep_ended_ms,
        )
        shared = self._content(trees)
        unneeded: dict[str, int] = {}
        for checkpoint in old:
            for digest in self._content([checkpoint.index_digest]) - shared:
                unneeded[digest] = max(checkpoint.created_ms, unneeded.get(digest, 0))
        with self._context.work() as work:
            for checkpoint in old:
                work.put(replace(work.must(CheckpointFact, checkpoint.id), kept=False))
            known = claimed(work, job, sorted(unneeded))
            dropped = release_all(
                work, [c for c in known.values() if c.claimed_ms <= unneeded[c.digest]]
            )
        self._packs.let_go(dropped)

    def sweep(self) -> int:
        """Ask of the content that is due whether anything needs it still, and let go of what
        nothing does. Return how much was looked at; less than ROWS_AT_ONCE: that was all."""
        with self._context.read() as snapshot:
            rows = snapshot.find(
                BlobFact,
                before=("look_ms", snapshot.now_ms + 1),
                order_by="look_ms",
                limit=ROWS_AT_ONCE,
            )
        by_scope: dict[str, list[BlobFact]] = {}
        for row in rows:
            by_scope.setdefault(row.scope, []).append(row)
        for scope, due in by_scope.items():
            self._packs.let_go(self._sweep_scope(scope, due))
        return len(rows)

    def _sweep_scope(self, scope: str, due: list[BlobFact]) -> list[ContentFact]:
        with self._context.read() as snapshot:
            job = snapshot.get(JobFact, scope)
            checkpoints = snapshot.find(CheckpointFact, {"job": scope}) if job else []
        keep, trees = self._needs(job, checkpoints, snapshot.now_ms) if job else ([], [])
        shared = self._content(trees)
        unclaimed: list[BlobFact] = []
        with self._context.work() as work:
            for row in due:
                blob = work.get(BlobFact, scope, row.digest)
                if blob is None or blob.look_ms > work.now_ms:
                    continue
                if job is None:
                    until_ms = self._renter_needs_until_ms(work, blob)
                elif blob.digest in shared:
                    until_ms = work.now_ms + LOOK_AGAIN_MS
                else:
                    # A checkpoint that has come in since names what was claimed just now.
                    until_ms = blob.claimed_ms + self._context.settings.upload_grace_ms
                if until_ms > work.now_ms:
                    work.put(replace(blob, look_ms=until_ms), before=blob)
                else:
                    unclaimed.append(blob)
            dropped = release_all(work, unclaimed)
            if job is not None and job.ended_ms is not None:
                self._mark_gone(work, checkpoints, {c.id for c in keep})
        return dropped

    def _needs(
        self, job: JobFact, checkpoints: list[CheckpointFact], now_ms: int
    ) -> tuple[list[CheckpointFact], list[str]]:
        document = accepted(job.envelope, Job)
        keep_ms = self._context.settings.keep_ended_ms
        return needed(job, document, checkpoints, now_ms=now_ms, keep_ended_ms=keep_ms)

    def _mark_gone(
        self, work: UnitOfWork, checkpoints: list[CheckpointFact], keep: set[str]
    ) -> None:
        for checkpoint in checkpoints:
            if checkpoint.kept and checkpoint.id not in keep:
                work.put(replace(work.must(CheckpointFact, checkpoint.id), kept=False))

    def _renter_needs_until_ms(self, work: UnitOfWork, blob: BlobFact) -> int:
        until_ms = blob.claimed_ms + self._context.settings.keep_inputs_ms
        if until_ms > work.now_ms:
            return until_ms
        for other in work.find(BlobFact, {"digest": blob.digest}):
            job = work.get(JobFact, other.scope)
            if job is not None and job.renter == blob.scope and job.ended_ms is None:
                return work.now_ms + LOOK_AGAIN_MS
        return until_ms

    def begin_files(self) -> None:
        """Have the next rounds of sweep_files look at all files, from the first on."""
        blobs = self._context.ports.blobs
        self._names = chain(
            ((name, False) for name in blobs.names()), ((pack, True) for pack in blobs.packs())
        )

    def sweep_files(self) -> int:
        """Look at some more of the files, once a day at all of them, and delete what no scope has:
        what a broker left that was killed between two steps. Return how many were looked at."""
        if self._names is None:
            if self._context.ports.clock.now_ms() < self._files_due_ms:
                return 0
            self.begin_files()
            assert self._names is not None
        names = list(islice(self._names, NAMES_AT_ONCE))
        if not names:
            self._names = None
            self._files_due_ms = self._context.ports.clock.now_ms() + FILES_EVERY_MS
            return 0
        alone = tuple(name for name, is_pack in names if not is_pack)
        packs = tuple(name for name, is_pack in names if is_pack)
        with self._context.read() as snapshot:
            used = {c.digest for c in snapshot.find(ContentFact, {"digest": alone, "pack": ""})}
            known = {pack.id for pack in snapshot.find(PackFact, {"id": packs})}
        self._packs.delete_files(name for name in alone if name not in used)
        self._packs.delete_unknown(pack for pack in packs if pack not in known)
        self._packs.tidy(pack for pack in packs if pack in known)
        return len(names)

    def _content(self, indexes: Iterable[str]) -> set[str]:
        """Return the hashes of these trees' indexes and of all their chunks."""
        found: set[str] = set()
        for digest in indexes:
            found.add(digest)
            try:
                found.update(parse_index(self._packs.read(digest)).chunks())
            except (BlobMissing, TreeRefused):
                continue  # What has no readable index can't be restored and keeps nothing alive.
        return found
