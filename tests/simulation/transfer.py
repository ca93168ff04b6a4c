"""How a provider's machine moves content between its runs and the broker, as workspace/transfer.py
does over HTTP: what is not answered is asked for again later."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from sublet_agent.core import events
from sublet_agent.core.run_phases import RunPhase
from sublet_broker.service.errors import Refusal
from sublet_contracts.digests import digest_of
from sublet_contracts.documents import Checkpoint, DocumentRefused, Job, open_document
from sublet_contracts.moves import NotMoved
from sublet_contracts.packs import PackReader, in_packs
from sublet_contracts.reasons import Reason
from sublet_contracts.tree import TreeRefused, parse_index
from tests.simulation.broker import TROUBLES, BrokerAway
from tests.simulation.by_address import put_pack, read_chunks
from tests.simulation.jobs import Container, checkpoint_files, tree
from tests.simulation.saved_folders import unpacked
from tests.simulation.store import UNKEPT

if TYPE_CHECKING:
    from tests.simulation.agents import AgentHost


class Transfer:
    """Of one machine."""

    def __init__(self, host: AgentHost) -> None:
        self.host = host

    def _request(self, again: Callable[[], None], act: Callable[[], object]) -> object | None:
        """Ask the broker over HTTP; where there is no answer, `again` is tried later."""
        try:
            if not self.host.line.works(self.host.engine.now_ms):
                raise BrokerAway
            return self.host.market.broker.call(act)
        except (BrokerAway, NotMoved, OSError, *UNKEPT):
            self.host._later(self.host.engine.draw_ms(500, 8_000), again)
        except Refusal as refusal:
            if refusal.code not in TROUBLES:
                raise
            self.host._later(self.host.engine.draw_ms(500, 8_000), again)
        return None

    def _fetch(self, document: Checkpoint, epoch: int | None) -> tuple[int, str]:
        """Return the state in a checkpoint. Raises Refusal, TreeRefused, BrokerAway."""
        blobs = self.host.market.broker.broker.blobs
        index = parse_index(blobs.get(self.host.party, document.job, epoch, document.index_digest))
        order = [chunk for file in index.files for chunk in file.chunks]
        broker = self.host.market.broker
        if broker.broker.uploads.by_address:
            parts = iter(read_chunks(broker, self.host.party, document.job, epoch, order))
        else:
            mine = (self.host.party, document.job, epoch)
            parts = (blobs.get(*mine, chunk.digest) for chunk in order)
        files = {f.path: b"".join(next(parts) for _ in f.chunks) for f in index.files}
        for file in index.files:
            for chunk in file.chunks:
                if digest_of(files[file.path]) != chunk.digest:
                    raise TreeRefused(f"{file.path} is damaged")
        value = json.loads(files["state.json"])
        return int(value["step"]), str(value["state"])

    def restore(self, lease_id: str) -> None:
        record = self.host._record(lease_id)
        if record is None or record.phase is not RunPhase.RESTORING:
            return
        checkpoint = record.checkpoint
        if checkpoint is not None:
            try:
                found = self._request(
                    lambda: self.restore(lease_id),
                    lambda: self._fetch(checkpoint, record.lease.epoch),
                )
            except TreeRefused as error:
                self.host.fail(lease_id, Reason.RESTORE_FAILED, str(error))
                return
            except Refusal as error:
                if error.code == "stale_epoch":
                    self.host.post(events.UploadFailed(lease_id, "checkpoint", 0, str(error), True))
                else:
                    self.host.fail(lease_id, Reason.RESTORE_FAILED, str(error)[:200])
                return
            if found is None:
                return
            assert isinstance(found, tuple)
            self.host.restored[lease_id] = found
        self.host.post(events.Restored(lease_id))

    def upload(self, lease_id: str, kind: str, step: int) -> None:
        record = self.host._record(lease_id)
        if record is None or record.phase is RunPhase.DISCARDED:
            return
        uploading = record.uploading
        if uploading is None or (uploading.kind, uploading.step) != (kind, step):
            return
        container = self.host.containers.get(lease_id)
        content = container.steps.get(step) if container and kind == "checkpoint" else None
        if container is None or (kind == "checkpoint" and content is None):
            self.host.post(events.UploadFailed(lease_id, kind, step, "torn: DONE doesn't match"))  # type: ignore[arg-type]
            return
        found = kind != "checkpoint" and not record.job.outputs
        if (kind == "partial-outputs" or found) and self.host.engine.happens(0.5 if found else 0.1):
            self.host.post(events.UploadFailed(lease_id, kind, step, "", nothing=True))  # type: ignore[arg-type]
            return
        files = (
            self._checkpoint_files(container, record.job.nonce, step, content or b"")
            if kind == "checkpoint"
            else container.outputs
        )
        index, chunks, total = tree(files)
        try:
            sent = self._request(
                lambda: self.upload(lease_id, kind, step),
                lambda: self._put_all(record.job_id, record.lease.epoch, index, chunks),
            )
        except Refusal as error:
            stale = error.code == "stale_epoch"
            self.host.post(events.UploadFailed(lease_id, kind, step, str(error)[:200], stale))  # type: ignore[arg-type]
            return
        if sent is None:
            return
        if kind == "checkpoint" and container.folder is None:
            self.host.post(events.StallTold(lease_id, container.stall()))
        digest = digest_of(index)
        self.host.post(events.Uploaded(lease_id, kind, step, digest, total))  # type: ignore[arg-type]

    def _checkpoint_files(
        self, container: Container, nonce: str, step: int, content: bytes
    ) -> dict[str, bytes]:
        if container.folder is not None:
            step, state = unpacked(content)
            return checkpoint_files(nonce, step, state)
        return checkpoint_files(nonce, step, content.decode())

    def _put_all(self, job: str, epoch: int, index: bytes, chunks: dict[str, bytes]) -> bool:
        blobs = self.host.market.broker.broker.blobs
        view = blobs.missing(self.host.party, job, epoch, list(chunks))
        missing = view.missing
        # Small ones, so that some checkpoints come in several.
        sizes = {digest: len(data) for digest, data in chunks.items()}
        for table in in_packs(missing, sizes, pack_bytes=self.host.engine.draw_ms(1, 200)):
            if view.by_address:
                content = [chunks[digest] for digest, _ in table.chunks]
                put_pack(self.host.market.broker, self.host.party, job, epoch, table, content)
                continue
            parts = (table.to_bytes(), *(chunks[digest] for digest, _ in table.chunks))
            reader = PackReader(table.name)
            reader.feed(b"".join(parts))
            blobs.put_pack(self.host.party, job, epoch, reader.close())
        blobs.put(self.host.party, job, epoch, digest_of(index), index)
        return True

    def prepare(self, job: object, checkpoint: object) -> None:
        try:
            document = open_document(job, Job)  # type: ignore[arg-type]
            found = open_document(checkpoint, Checkpoint) if checkpoint else None  # type: ignore[arg-type]
        except DocumentRefused:
            return
        try:
            if found is not None:
                if not self.host.line.works(self.host.engine.now_ms):
                    return
                self.host.market.broker.call(self._fetch, found.document, None)
        except (BrokerAway, OSError, *UNKEPT):
            return
        except (Refusal, TreeRefused) as error:
            self.host.post(events.PrepareDone(document.id, False, str(error)[:200]))
            return
        self.host.post(events.PrepareDone(document.id, True))
