"""The blobs on a disk that forgets: every place to die, every fsync that fails, every order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, permutations

import pytest

from sublet_broker.market.facts import ContentFact
from sublet_broker.service.ports import BlobMissing, StorageFull
from sublet_contracts.digests import digest_of, hex_of
from tests.simulation.disk import SimBlobs, SimDisk
from tests.simulation.engine import Crashed
from tests.simulation.market import Market, Plan


def _named() -> dict[str, bytes]:
    """Return three contents by name: two in one folder, and one in the folder beside it."""
    seen: dict[str, bytes] = {}
    for number in count():
        data = f"content {number}".encode()
        digest = digest_of(data)
        in_one = {name: hex_of(name) for name in seen if hex_of(name)[:2] == hex_of(digest)[:2]}
        twin = next((n for n in in_one if in_one[n][:4] == hex_of(digest)[:4]), None)
        beside = next((n for n in in_one if in_one[n][:4] != hex_of(digest)[:4]), None)
        if twin is not None and beside is not None:
            return {name: seen[name] for name in (twin, beside)} | {digest: data}
        seen[digest] = data
    raise AssertionError


NAMED = _named()


@pytest.fixture(scope="module")
def market() -> Market:
    return Market(1, Plan(faults=frozenset()))


def started(disk: SimDisk) -> SimBlobs:
    disk.boot()
    blobs = SimBlobs(disk)
    blobs.prepare()
    return blobs


def dies(market: Market, disk: SimDisk, name: str, crash_in: int) -> bool:
    """Put it in a process of its own; say whether that died."""
    market.engine.steps += 1
    disk.doom.countdown = crash_in
    try:
        started(disk).put(name, NAMED[name])
    except Crashed:
        disk.died()
        return True
    disk.died()
    return False


def deaths(market: Market, name: str) -> Iterator[SimDisk]:
    """Yield the disks that a process leaves which dies at one of the crash points of a put."""
    for crash_in in count(1):
        disk = SimDisk(market)
        if not dies(market, disk, name, crash_in):
            return
        yield disk


def crash_points(market: Market, name: str) -> int:
    return sum(1 for _ in deaths(market, name))


def test_what_was_taken_survives_whatever_came_before(market: Market) -> None:
    """One process is killed at each crash point; in the next one each fsync fails once, and what
    failed is done again. Whatever was taken in the end would survive a power cut."""
    for first in NAMED:
        for crash_in in range(1, crash_points(market, first) + 1):
            for order in permutations(NAMED):
                for fails_in in range(1, 9):
                    disk = SimDisk(market)
                    assert dies(market, disk, first, crash_in)
                    disk.fsync_fails_in = fails_in
                    try:
                        blobs = started(disk)
                    except OSError:
                        blobs = started(disk)
                    taken: set[str] = set()
                    for name in (*order, *order):
                        try:
                            blobs.put(name, NAMED[name])
                        except OSError:
                            continue
                        taken.add(name)
                        for one in taken:
                            assert disk.survives(one), (first, crash_in, order, fails_in)
                    assert taken == set(NAMED)


def test_a_power_cut_at_each_crash_point_leaves_it_whole_or_is_noticed(market: Market) -> None:
    one, two, _ = NAMED
    torn = 0
    for crash_in in range(1, crash_points(market, two) + 1):
        for _ in range(20):
            disk = SimDisk(market)
            started(disk).put(one, NAMED[one])
            if not dies(market, disk, two, crash_in):
                break
            disk.cut_power()
            blobs = started(disk)
            assert blobs.get(one) == NAMED[one]
            try:
                assert blobs.get(two) == NAMED[two]
            except BlobMissing:
                torn += 1
            blobs.put(two, NAMED[two])
            disk.cut_power()
            assert started(disk).get(two) == NAMED[two]
    assert torn


def test_the_disk_itself_forgets(market: Market) -> None:
    """Without an fsync of the file it comes back whole, short or otherwise; without one of its
    folder, or not at all."""
    name, data = next(iter(NAMED.items()))
    found: set[bytes | None] = set()
    for _ in range(200):
        disk = SimDisk(market)
        blobs = started(disk)
        blobs.put(name, data)
        digits = hex_of(name)
        file = disk._file(f"/data/blobs/blake3/{digits[:2]}/{digits[2:4]}/{digits}")
        assert file is not None
        file.kept, file.clean = None, False
        assert not disk.survives(name)
        assert disk.whole(name) == data
        disk.cut_power()
        found.add(file.data)
    assert {b"", data} < found
    assert any(len(rest) < len(data) for rest in found if rest)
    assert any(len(rest) == len(data) != rest for rest in found if rest)


def test_a_full_disk_keeps_nothing_and_breaks_nothing(market: Market) -> None:
    one, two, _ = NAMED
    for _ in range(200):
        disk = SimDisk(market)
        blobs = started(disk)
        blobs.put(one, NAMED[one])
        market.broker.store.full_until_ms = 1
        with pytest.raises(StorageFull):
            blobs.put(two, NAMED[two])
        market.broker.store.full_until_ms = 0
        assert not blobs.has(two)
        assert disk.listdir("/data/blobs/tmp") == []
        blobs.put(two, NAMED[two])
        disk.cut_power()
        assert started(disk).get(one) == NAMED[one]
        assert blobs.get(two) == NAMED[two]


PACK = "ab" * 32
CONTENT = ContentFact(digest_of(b"in it"), 5, PACK, 3)


def pack_deaths(market: Market) -> Iterator[SimDisk]:
    """Yield the disks that a process leaves which dies at one of the crash points of a pack."""
    for crash_in in count(1):
        disk = SimDisk(market)
        market.engine.steps += 1
        disk.doom.countdown = crash_in
        try:
            started(disk).put_pack(PACK, [b"abc", b"in it"])
        except Crashed:
            disk.died()
            yield disk
            continue
        disk.died()
        return


def test_a_pack_is_whole_or_absent_at_each_crash_point(market: Market) -> None:
    whole = absent = 0
    for disk in pack_deaths(market):
        blobs = started(disk)
        if blobs.has_pack(PACK):
            assert blobs.read_pack(PACK, 0, 100) == b"abcin it"
            whole += 1
        else:
            assert list(blobs.packs()) == []
            absent += 1
    assert whole
    assert absent


def test_a_pack_that_was_taken_survives_a_power_cut(market: Market) -> None:
    """One process is killed at each crash point; in the next one each fsync fails once."""
    for dead in range(sum(1 for _ in pack_deaths(market))):
        for fails_in in range(1, 9):
            disk = next(disk for number, disk in enumerate(pack_deaths(market)) if number == dead)
            blobs = started(disk)
            disk.fsync_fails_in = fails_in
            taken: list[str] = []
            for pack in (PACK[::-1], "ab" + "1" * 62, "ab" + "2" * 62, "ab" + "3" * 62):
                try:
                    blobs.put_pack(pack, [b"abc", b"in it"])
                except OSError:
                    assert not blobs.has_pack(pack)
                    continue
                taken.append(pack)
                market.broker.store._tables[ContentFact].facts[(CONTENT.digest,)] = replace(
                    CONTENT, pack=pack
                )
                assert disk.survives(CONTENT.digest), (dead, fails_in)
            disk.fsync_fails_in = 0
            disk.cut_power()
            blobs = started(disk)
            assert len(taken) >= 3
            assert all(blobs.read_pack(pack, 3, 5) == b"in it" for pack in taken)
            market.broker.store._tables[ContentFact].facts.clear()


def test_a_torn_pack_is_noticed(market: Market) -> None:
    torn = 0
    for _ in range(100):
        disk = SimDisk(market)
        blobs = started(disk)
        blobs.put_pack(PACK, [b"abc", b"in it"])
        market.broker.store._tables[ContentFact].facts[(CONTENT.digest,)] = CONTENT
        file = disk._file(f"/data/blobs/packs/ab/{PACK}")
        assert file is not None
        file.kept, file.clean = None, False
        assert not disk.survives(CONTENT.digest)
        disk.cut_power()
        torn += disk.whole(CONTENT.digest) is None
        market.broker.store._tables[ContentFact].facts.clear()
    assert torn
