"""Uploads past the broker: an address is asked for, the content is put there, and it is committed.

Rules:
- An upload has a row before its address is known to anybody, with a pack's id that nobody else has
  had. While the row stands what lies there is left alone, and counts against its scope's room.
- Nothing that was put there counts before all of it was read and hashed in the store (PackWork):
  the broker hasn't seen it. What is wrong goes, and the row with it.
- The commit takes the row away, notes where each piece lies and claims it, in one transaction. So
  it is done once, whoever asks for it how often.
- A row that nobody commits goes after `upload_open_ms`, and then what lies there. What comes even
  later no row names: it is swept with other such files (retention.py).
- A read's address is good for the chunks that were asked for and for no byte beside them: what lies
  in the same pack may be another renter's, since what comes twice lies where it came last.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import replace

from sublet_broker.market.facts import ContentFact, PackFact, UploadFact
from sublet_broker.service.content.blobs import Blobs
from sublet_broker.service.content.claims import claim_all, claimed, lies, refuse_beyond
from sublet_broker.service.content.packs import Packs
from sublet_broker.service.errors import Refusal, not_found
from sublet_broker.service.ports import Addresses
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.tallies import counted_bytes
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.addresses import MAX_READS, ReadAddress, ReadAddresses, UploadAddress, signed
from sublet_contracts.packs import PackRefused, PackTable, parse_table
from sublet_contracts.problems import ProblemCode

MAX_OPEN = 64
"""Uploads of one party that have an address and aren't committed."""
ENDED_AT_ONCE = 64


class Uploads:
    """Content that moves by address."""

    def __init__(self, context: Context, blobs: Blobs, packs: Packs) -> None:
        self._context = context
        self._blobs = blobs
        self._packs = packs

    @property
    def by_address(self) -> bool:
        """Whether content moves so here."""
        return self._context.ports.addresses is not None

    # -- up ----------------------------------------------------------------------------------------

    def address(
        self,
        caller: str,
        scope: str,
        epoch: int | None,
        name: str,
        table_text: str,
        body_sha256: str,
    ) -> bytes:
        """Return a signed answer: where this pack's chunks are to be put. Asked for again, it is
        another address for the same upload."""
        addresses = self._addresses()
        table = _table_of(table_text, name)
        with self._context.work() as work:
            key = self._blobs.may_write(work, caller, scope, epoch)
            mine = work.find(UploadFact, {"party": caller})
            upload = _same(mine, key, name, body_sha256)
            if upload is None:
                self._refuse_too_much(work, caller, key, table, mine)
                upload = UploadFact(
                    id=self._packs.new_id(),
                    party=caller,
                    scope=key,
                    name=name,
                    body_sha256=body_sha256,
                    table=table_text,
                    size_bytes=table.chunk_bytes,
                    expires_ms=0,
                )
            expires_ms = work.now_ms + self._context.settings.upload_open_ms
            work.put(replace(upload, expires_ms=expires_ms))
            now_ms = work.now_ms
        url, headers = addresses.upload(upload.id, upload.size_bytes, body_sha256, now_ms)
        said = UploadAddress(name=name, pack=upload.id, url=url, headers=headers)
        return signed(said, self._context.ports.key)

    def commit(self, caller: str, scope: str, epoch: int | None, name: str, pack: str) -> None:
        """Take over what was put at an address, once it is known to be what was announced."""
        with self._context.read() as snapshot:
            key = self._blobs.may_write(snapshot, caller, scope, epoch)
            upload = snapshot.get(UploadFact, pack)
            done = snapshot.get(PackFact, pack) is not None
        if upload is None:
            if done:
                return
            raise not_found("upload", pack)
        if (upload.party, upload.scope, upload.name) != (caller, key, name):
            raise not_found("upload", pack)
        table = _table_of(upload.table, name)
        verdict = self._packs.work.check(pack, name, table.to_bytes(), upload.size_bytes)
        if not verdict.there:
            raise not_found("upload", pack)
        if verdict.wrong:
            self._drop(upload)
            raise Refusal(
                ProblemCode.HASH_MISMATCH, verdict.wrong, field="body", digest=verdict.chunk
            )
        try:
            before = self._take(caller, scope, epoch, upload, table)
        except Refusal:
            self._drop(upload)
            raise
        self._packs.let_go(before)

    def _take(
        self, caller: str, scope: str, epoch: int | None, upload: UploadFact, table: PackTable
    ) -> list[ContentFact]:
        """Note and claim what lies in the pack; return where it lay before."""
        sizes, offsets = dict(table.chunks), table.offsets()
        contents = [ContentFact(name, sizes[name], upload.id, offsets[name]) for name in sizes]
        with self._context.pins.hold((upload.id,)), self._context.work() as work:
            key = self._blobs.may_write(work, caller, scope, epoch)
            if work.get(UploadFact, upload.id) is None:
                if work.get(PackFact, upload.id) is not None:
                    return []  # Somebody was first with the same.
                raise not_found("upload", upload.id)
            before = lies(work, sizes)
            self._packs.note(work, upload.id, table.chunk_bytes, contents)
            claim_all(self._context, work, key, sizes, self._blobs.room(caller, key))
            work.delete(upload)
        return list(before.values())

    def sweep(self) -> int:
        """Let go of uploads that nobody has committed in time. Return how many."""
        if not self.by_address:
            return 0
        with self._context.read() as snapshot:
            due = snapshot.find(
                UploadFact,
                before=("expires_ms", snapshot.now_ms + 1),
                order_by="expires_ms",
                limit=ENDED_AT_ONCE,
            )
        for upload in due:
            self._drop(upload)
        return len(due)

    def _drop(self, upload: UploadFact) -> None:
        """Forget an upload, and then delete what lies there: not if it is being committed, or was
        given a new address since."""
        with self._context.pins.deleting((upload.id,)) as unpinned:
            if not unpinned:
                return
            with self._context.work() as work:
                if work.get(UploadFact, upload.id) != upload:
                    return
                work.delete(upload)
            self._context.ports.blobs.delete_pack(upload.id)

    def _refuse_too_much(
        self, work: UnitOfWork, caller: str, key: str, table: PackTable, mine: list[UploadFact]
    ) -> None:
        if len(mine) >= MAX_OPEN:
            raise Refusal(
                ProblemCode.TOO_MANY,
                f"{len(mine)} uploads have an address and have not been committed",
                what="uploads",
                limit=MAX_OPEN,
            )
        sizes = dict(table.chunks)
        known = claimed(work, key, sizes)
        under_way = sum(upload.size_bytes for upload in work.find(UploadFact, {"scope": key}))
        new = sum(counted_bytes(size) for name, size in sizes.items() if name not in known)
        refuse_beyond(self._context, work, key, new + under_way, self._blobs.room(caller, key))

    # -- down --------------------------------------------------------------------------------------

    def read_addresses(
        self, caller: str, scope: str, epoch: int | None, hashes: list[str]
    ) -> bytes:
        """Return a signed answer: where these are to be had, for whoever may read them."""
        addresses = self._addresses()
        contents = self._blobs.places(caller, scope, epoch, hashes)
        now_ms = self._context.ports.clock.now_ms()
        rows = list(_in_rows(contents))
        if len(rows) > MAX_READS:
            raise Refusal(
                ProblemCode.TOO_LARGE,
                f"they lie in {len(rows)} places; ask for fewer at once",
                limit_bytes=0,
            )
        reads = [
            ReadAddress(
                url=self._read_address(addresses, row, now_ms),
                offset_bytes=row[0].offset_bytes,
                chunks=len(row),
            )
            for row in rows
        ]
        return signed(ReadAddresses(reads=tuple(reads)), self._context.ports.key)

    def _read_address(self, addresses: Addresses, row: list[ContentFact], now_ms: int) -> str:
        first, size_bytes = row[0], sum(content.size_bytes for content in row)
        if not first.pack:
            return addresses.read_blob(first.digest, size_bytes, now_ms)
        return addresses.read_pack(first.pack, first.offset_bytes, size_bytes, now_ms)

    def refuse_bytes(self) -> None:
        """Raise Refusal where chunks are read by address only."""
        if self.by_address:
            raise Refusal(ProblemCode.BY_ADDRESS, "this broker's content is read by address")

    def _addresses(self) -> Addresses:
        addresses = self._context.ports.addresses
        if addresses is None:
            raise Refusal(ProblemCode.NO_SUCH_ADDRESS, "content moves through this broker")
        return addresses


def _in_rows(contents: Sequence[ContentFact]) -> Iterator[list[ContentFact]]:
    """Cut content into what lies behind each other in the same pack, in the order given."""
    row: list[ContentFact] = []
    for content in contents:
        last = row[-1] if row else None
        follows = (
            last is not None
            and last.pack == content.pack != ""
            and last.offset_bytes + last.size_bytes == content.offset_bytes
        )
        if row and not follows:
            yield row
            row = []
        row.append(content)
    if row:
        yield row


def _table_of(text: str, name: str) -> PackTable:
    try:
        return parse_table(base64.b64decode(text, validate=True), name)
    except (PackRefused, binascii.Error, ValueError) as error:
        raise Refusal(ProblemCode.MALFORMED, f"the table: {error}", field="table") from error


def _same(mine: list[UploadFact], key: str, name: str, body_sha256: str) -> UploadFact | None:
    wanted = (key, name, body_sha256)
    found = (u for u in mine if (u.scope, u.name, u.body_sha256) == wanted)
    return next(found, None)
