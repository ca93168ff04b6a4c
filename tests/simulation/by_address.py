"""Content that moves past the broker: a store that others put into, what goes wrong there, and how
a provider's machine goes about it, by the rules of the real one (sublet_contracts/moves.py)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

from sublet_broker.service.errors import Refusal
from sublet_contracts import moves
from sublet_contracts.addresses import Run, UploadAddress, read_runs, read_upload
from sublet_contracts.packs import PackRefused, PackTable, cut_read, in_reads
from sublet_contracts.problems import ProblemCode
from sublet_contracts.tree import Chunk
from tests.simulation.models import never
from tests.simulation.store_by_address import StoreByAddress

if TYPE_CHECKING:
    from tests.simulation.broker import BrokerHost
    from tests.simulation.market import Market

BROKER_URL = "https://broker.example"
SOME = 0.4
"""Of the markets have their content in such a store."""
MOODS = ("lost", "unanswered", "spoilt", "again", "expired", "swept")
LATE_MS = 10_800_000
OVERDUE_MS = 120_000


def chosen(seed: int) -> bool:
    """Say whether the content of a seed's market moves by address."""
    return Random(f"by address {seed}").random() < SOME


class Puts:
    """What becomes of what is put into the store. Its next `troubles` puts go wrong."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self.troubles = 0

    def put(self, store: StoreByAddress, address: UploadAddress, data: bytes) -> int:
        """Return the store's status; 0: nothing came back."""
        with self._market.broker.disk.of_a_store():
            return self._put(store, address, data)

    def _put(self, store: StoreByAddress, address: UploadAddress, data: bytes) -> int:
        market, engine = self._market, self._market.engine
        now_ms = market.broker.now_ms()
        mood = ""
        if self.troubles:
            self.troubles -= 1
            mood = engine.random.choice(MOODS)
            engine.say(f"a put is {mood}")
        if mood == "lost":
            return engine.random.choice((0, 500, 503, 507))
        if mood == "expired":
            return store.put(address.url, data, now_ms + LATE_MS)
        if mood == "spoilt":
            # It was right on the way: what is kept is not.
            spoilt = bytes([data[0] ^ 1]) + data[1:]
            return store.keep(address.url, spoilt)
        if mood == "again":
            # Another one that began in time comes later: after the commit, or after the end of all.
            engine.after(engine.draw_ms(1, LATE_MS), lambda: self._late(store, address, data))
        status = store.put(address.url, data, now_ms)
        if mood == "swept":
            # The look at all files comes at the next one's look at a pack: while it is committed.
            market.broker.blobs.sweeps_in = 1
        return 0 if mood == "unanswered" else status

    def _late(self, store: StoreByAddress, address: UploadAddress, data: bytes) -> None:
        from tests.simulation.broker import BrokerAway
        from tests.simulation.store import UNKEPT

        broker = self._market.broker
        with suppress(BrokerAway, OSError, *UNKEPT), broker.disk.of_a_store():
            broker.call(store.keep, address.url, data)


def put_pack(
    host: BrokerHost, party: str, job: str, epoch: int, table: PackTable, chunks: Sequence[bytes]
) -> None:
    """Put a pack where the broker says, and commit it. Raises Refusal, NotMoved."""
    uploads = host.broker.uploads
    said = moves.announcement(table, chunks)
    random = host.engine.random

    def ask() -> UploadAddress:
        answer = uploads.address(party, job, epoch, table.name, said["table"], said["body_sha256"])
        address = read_upload(
            answer, broker=host.broker.party, broker_url=BROKER_URL, name=table.name
        )
        if host.puts.troubles and random.random() < 0.3:
            # One who commits what isn't there, or not yet.
            committed = commit(address.pack)
            there = host.disk.has_pack(address.pack)
            never(committed and not there, "an upload was committed that nobody has put")
        return address

    def commit(pack: str) -> bool:
        try:
            uploads.commit(party, job, epoch, table.name, pack)
        except Refusal as refusal:
            if refusal.code in (ProblemCode.NOT_FOUND, ProblemCode.HASH_MISMATCH):
                assert moves.keeps_to(table, chunks)
                return False
            raise
        return True

    data = b"".join(chunks)
    moves.upload(
        ask,
        lambda address: host.puts.put(host.addressed, address, data),
        commit,
        pause=lambda seconds: None,
        attempts=1,
    )


def read_chunks(
    host: BrokerHost, party: str, job: str, epoch: int | None, chunks: Sequence[Chunk]
) -> list[bytes]:
    """Return chunks as an agent reads them. Raises Refusal."""
    found: list[bytes] = []
    for part in in_reads(chunks):
        names = [chunk.digest for chunk in part]
        sizes = [chunk.size_bytes for chunk in part]

        def ask(names: list[str] = names, sizes: list[int] = sizes) -> list[Run]:
            answer = host.broker.uploads.read_addresses(party, job, epoch, names)
            return read_runs(answer, broker=host.broker.party, broker_url=BROKER_URL, sizes=sizes)

        def get(run: Run) -> bytes | None:
            return host.addressed.get(run.url, run.offset_bytes, run.size_bytes, host.now_ms())

        try:
            found += cut_read(moves.read(ask, get, lambda seconds: None), part)
        except (moves.NotMoved, PackRefused):
            found += [host.broker.blobs.get(party, job, epoch, name) for name in names]
        except Refusal as refusal:
            if refusal.code != ProblemCode.TOO_LARGE:
                raise
            found += [host.broker.blobs.get(party, job, epoch, name) for name in names]
    return found


class Awaited:
    """The auditor's model of uploads that have an address."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self.expires_ms: dict[str, int] = {}

    def changed(self, old: object, new: object) -> None:
        """An upload has an address, or another one, or is over."""
        if new is None:
            self.expires_ms.pop(old.id, None)  # type: ignore[attr-defined]
            return
        if new.id not in self.expires_ms:  # type: ignore[attr-defined]
            there = self._market.broker.disk.has_pack(new.id)  # type: ignore[attr-defined]
            never(there, "an address was given for a pack that is there")
        self.expires_ms[new.id] = new.expires_ms  # type: ignore[attr-defined]

    def at_the_end(self) -> None:
        """Nothing is awaited for ever, and nothing lies there that nobody will look for."""
        now_ms = self._market.broker.now_ms()
        late = [id for id, until in self.expires_ms.items() if until + OVERDUE_MS < now_ms]
        never(bool(late), "an upload that nobody committed is awaited long after its time")
