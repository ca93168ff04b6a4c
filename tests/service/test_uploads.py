"""Content moves past the broker: nothing counts before it was read where it lies; a crash at any
point, a lie, a late or repeated request leave all of it or nothing, and no file for ever."""

from __future__ import annotations

import base64
import contextlib
import hashlib

import pytest

from sublet_broker.market.facts import PackFact, UploadFact
from sublet_broker.service.broker import Settings
from sublet_broker.service.content.uploads import MAX_OPEN
from sublet_broker.service.errors import Refusal
from sublet_broker.service.ports import BlobsAway, StoreAway
from sublet_contracts.addresses import UploadAddress, read_runs, read_upload
from sublet_contracts.digests import digest_of
from sublet_contracts.packs import PackTable
from sublet_contracts.problems import ProblemCode
from sublet_contracts.reasons import Reason
from tests.service.test_packs import damage, get, let_days_pass, missing, stored, tree_of
from tests.service.world import AgentDouble, RenterDouble, RunDouble, World

URL = "https://broker.example"
HOUR_MS = 3_600_000
CHUNKS = (b"one", b"two", b"three")

Scope = tuple[str, str, int | None]


def own(renter: RenterDouble) -> Scope:
    return (renter.party, renter.party, None)


def held(agent: AgentDouble, run: RunDouble) -> Scope:
    return (agent.party, run.job_id, run.lease.epoch)


def table_of(*chunks: bytes) -> PackTable:
    return PackTable(tuple((digest_of(chunk), len(chunk)) for chunk in chunks))


def ask(world: World, scope: Scope, *chunks: bytes, sha256: str = "") -> UploadAddress:
    table = table_of(*chunks)
    sha256 = sha256 or hashlib.sha256(b"".join(chunks)).hexdigest()
    text = base64.b64encode(table.to_bytes()).decode()
    answer = world.broker.uploads.address(*scope, table.name, text, sha256)
    return read_upload(answer, broker=world.broker.party, broker_url=URL, name=table.name)


def put(world: World, address: UploadAddress, *chunks: bytes) -> int:
    return world.store_by_address.put(address.url, b"".join(chunks), world.clock.ms)


def commit(world: World, scope: Scope, address: UploadAddress) -> None:
    world.broker.uploads.commit(*scope, address.name, address.pack)


def send(world: World, scope: Scope, *chunks: bytes) -> UploadAddress:
    address = ask(world, scope, *chunks)
    assert put(world, address, *chunks) in (200, 412)
    commit(world, scope, address)
    return address


def refused(code: ProblemCode) -> pytest.RaisesExc[Refusal]:
    return pytest.RaisesExc(Refusal, check=lambda error: error.code == code)


def uploads(world: World) -> list[UploadFact]:
    with world.store.snapshot() as tx:
        return tx.find(UploadFact)


def let_it_expire(world: World) -> None:
    world.clock.ms += HOUR_MS + 1
    while world.broker.uploads.sweep():
        pass


@pytest.fixture
def world() -> World:
    return World(by_address=True)


def test_what_was_put_and_committed_is_there(world: World) -> None:
    renter = world.renter()
    view = world.broker.blobs.missing(*own(renter), [digest_of(chunk) for chunk in CHUNKS])
    assert view.by_address
    send(world, own(renter), *CHUNKS)
    assert missing(renter, *CHUNKS, b"four") == [b"four"]
    assert [get(renter, chunk) for chunk in CHUNKS] == list(CHUNKS)
    assert uploads(world) == []
    world.audit()


def test_nothing_counts_before_the_commit(world: World) -> None:
    renter = world.renter()
    address = ask(world, own(renter), *CHUNKS)
    assert missing(renter, *CHUNKS) == list(CHUNKS)
    put(world, address, *CHUNKS)
    assert missing(renter, *CHUNKS) == list(CHUNKS)
    with refused(ProblemCode.NOT_FOUND):
        get(renter, b"one")


def test_a_commit_of_what_is_not_there_is_refused_and_may_come_later(world: World) -> None:
    renter = world.renter()
    address = ask(world, own(renter), *CHUNKS)
    with refused(ProblemCode.NOT_FOUND):
        commit(world, own(renter), address)
    assert missing(renter, *CHUNKS) == list(CHUNKS)
    put(world, address, *CHUNKS)
    commit(world, own(renter), address)
    assert missing(renter, *CHUNKS) == []


@pytest.mark.parametrize(
    "data", [b"onetwothreX", b"onetwothree!", b"onetwothre", b"oneXwothree"],
    ids=["last", "longer", "shorter", "second"],
)  # fmt: skip
def test_what_is_wrong_in_the_store_never_counts_and_goes(world: World, data: bytes) -> None:
    """A store that takes other bytes than the address is for, or an agent that lies about them."""
    renter = world.renter()
    address = ask(world, own(renter), *CHUNKS, sha256=hashlib.sha256(data).hexdigest())
    world.blobs.put_pack(address.pack, [data])
    with refused(ProblemCode.HASH_MISMATCH):
        commit(world, own(renter), address)
    assert missing(renter, *CHUNKS) == list(CHUNKS)
    assert list(world.blobs.packs()) == []
    assert uploads(world) == []
    send(world, own(renter), *CHUNKS)
    assert missing(renter, *CHUNKS) == []


def test_a_commit_is_done_once_however_often_it_is_asked(world: World) -> None:
    renter = world.renter()
    address = send(world, own(renter), *CHUNKS)
    for _ in range(2):
        commit(world, own(renter), address)
    assert len(list(world.blobs.packs())) == 1
    assert put(world, address, *CHUNKS) == 412
    world.audit()


def test_asked_again_it_is_the_same_upload(world: World) -> None:
    renter = world.renter()
    first = ask(world, own(renter), *CHUNKS)
    put(world, first, *CHUNKS)
    world.clock.ms += 30 * 60_000  # the address has expired, the upload has not
    again = ask(world, own(renter), *CHUNKS)
    assert again.pack == first.pack
    assert put(world, again, *CHUNKS) == 412
    commit(world, own(renter), again)
    assert missing(renter, *CHUNKS) == []
    other = ask(world, own(renter), *CHUNKS)
    assert other.pack != first.pack


def test_an_address_that_expired_takes_nothing_and_another_is_given(world: World) -> None:
    renter = world.renter()
    late = ask(world, own(renter), *CHUNKS)
    world.clock.ms += 20 * 60_000
    assert put(world, late, *CHUNKS) == 403
    send(world, own(renter), *CHUNKS)
    assert missing(renter, *CHUNKS) == []


def test_an_upload_of_somebody_else_is_nobodys_to_commit(world: World) -> None:
    renter, other = world.renter(), world.renter("other")
    address = ask(world, own(renter), *CHUNKS)
    put(world, address, *CHUNKS)
    with refused(ProblemCode.NOT_FOUND):
        commit(world, own(other), address)
    with refused(ProblemCode.NOT_FOUND):
        world.broker.uploads.commit(*own(renter), table_of(b"x").name, address.pack)
    with refused(ProblemCode.NOT_FOUND):
        world.broker.uploads.commit(*own(renter), address.name, "f" * 64)
    assert missing(other, *CHUNKS) == list(CHUNKS)
    commit(world, own(renter), address)


def test_an_epoch_that_is_over_gets_no_address_and_commits_nothing(world: World) -> None:
    alice, renter = world.agent("alice"), world.renter()
    renter.run()
    before = held(alice, alice.the_run)
    address = ask(world, before, *CHUNKS)
    put(world, address, *CHUNKS)
    alice.exit(alice.the_run, Reason.RECLAIMED, 75)
    world.settle_down()
    for act in (
        lambda: ask(world, before, b"more"),
        lambda: commit(world, before, address),
    ):
        with refused(ProblemCode.STALE_EPOCH):
            act()
    let_it_expire(world)
    assert list(world.blobs.packs()) == []


def test_a_job_runs_and_resumes_by_address(world: World) -> None:
    alice, renter = world.agent("alice"), world.renter()
    job = renter.run()
    for step in (1, 2):
        content = {"base": b"frozen", "model": b"%d" % step}
        index, chunks = tree_of(content)
        lacks = world.broker.blobs.missing(*held(alice, alice.the_run), chunks).missing
        send(world, held(alice, alice.the_run), *(chunks[name] for name in lacks))
        raw = index.to_bytes()
        world.broker.blobs.put(*held(alice, alice.the_run), digest_of(raw), raw)
        alice.durable(alice.the_run, step, content=content)
    assert stored(world).count(b"frozen") == 1
    alice.exit(alice.the_run, Reason.RECLAIMED, 75)
    world.settle_down()
    run = alice.the_run
    assert run.lease.start_step == 2
    names = [digest_of(chunk) for chunk in (b"frozen", b"2", b"frozen")]
    answer = world.broker.uploads.read_addresses(alice.party, job, run.lease.epoch, names)
    runs = read_runs(answer, broker=world.broker.party, broker_url=URL, sizes=[6, 1, 6])
    read = [
        world.store_by_address.get(r.url, r.offset_bytes, r.size_bytes, world.clock.ms)
        for r in runs
    ]
    assert read == [b"frozen", b"2", b"frozen"]
    with refused(ProblemCode.BY_ADDRESS):
        world.broker.uploads.refuse_bytes()
    world.audit()


def test_an_address_is_good_for_ones_own_chunks_and_not_for_what_lies_beside_them(
    world: World,
) -> None:
    renter, other = world.renter(), world.renter("other")
    send(world, own(renter), b"shared")
    # Where it came last it lies between what is nobody else's.
    send(world, own(other), b"secret before", b"shared", b"secret behind")
    names = [digest_of(b"shared")]
    answer = world.broker.uploads.read_addresses(*own(renter), names)
    (read,) = read_runs(answer, broker=world.broker.party, broker_url=URL, sizes=[6])
    store, now_ms = world.store_by_address, world.clock.ms
    assert store.get(read.url, read.offset_bytes, read.size_bytes, now_ms) == b"shared"
    for offset_bytes, size_bytes in ((0, 32), (read.offset_bytes, 20), (0, read.size_bytes)):
        with pytest.raises(AssertionError, match="nothing else"):
            store.get(read.url, offset_bytes, size_bytes, now_ms)


def test_who_may_not_read_gets_no_address(world: World) -> None:
    renter, other = world.renter(), world.renter("other")
    send(world, own(renter), *CHUNKS)
    for who in (other, renter):
        with refused(ProblemCode.NOT_FOUND):
            world.broker.uploads.read_addresses(*own(who), [digest_of(b"never sent")])
    with refused(ProblemCode.NOT_FOUND):
        world.broker.uploads.read_addresses(*own(other), [digest_of(b"one")])


# -- what nobody commits -------------------------------------------------------------------------


@pytest.mark.parametrize("was_put", [False, True], ids=["before the put", "after the put"])
def test_who_dies_in_between_leaves_nothing_for_ever(world: World, was_put: bool) -> None:
    renter = world.renter()
    address = ask(world, own(renter), *CHUNKS)
    if was_put:
        put(world, address, *CHUNKS)
    world.restart_broker()
    let_days_pass(world, 0)
    assert len(list(world.blobs.packs())) == was_put, "the look at all files took what is awaited"
    let_it_expire(world)
    assert list(world.blobs.packs()) == []
    assert uploads(world) == []
    with refused(ProblemCode.NOT_FOUND):
        commit(world, own(renter), address)


def test_what_comes_after_its_upload_is_over_is_swept(world: World) -> None:
    """A put that began in time and ended late, or an address that is used once more."""
    renter = world.renter()
    address = ask(world, own(renter), *CHUNKS)
    let_it_expire(world)
    world.blobs.put_pack(address.pack, [b"".join(CHUNKS)])
    with refused(ProblemCode.NOT_FOUND):
        commit(world, own(renter), address)
    let_days_pass(world, 1.1)
    assert list(world.blobs.packs()) == []


def test_a_pack_that_went_and_is_put_again_is_swept(world: World) -> None:
    renter = world.renter()
    address = send(world, own(renter), *CHUNKS)
    let_days_pass(world, 30)
    assert list(world.blobs.packs()) == []
    world.blobs.put_pack(address.pack, [b"".join(CHUNKS)])
    with refused(ProblemCode.NOT_FOUND):
        commit(world, own(renter), address)
    let_days_pass(world, 1.1)
    assert list(world.blobs.packs()) == []


def test_uploads_under_way_are_bounded_per_party(world: World) -> None:
    renter, other = world.renter(), world.renter("other")
    for number in range(MAX_OPEN):
        ask(world, own(renter), b"%d" % number)
    with refused(ProblemCode.TOO_MANY):
        ask(world, own(renter), b"one more")
    ask(world, own(other), b"one more")
    let_it_expire(world)
    ask(world, own(renter), b"one more")


def test_what_is_under_way_counts_against_the_room() -> None:
    world = World(Settings(max_renter_bytes=3 * 65536), by_address=True)
    renter = world.renter()
    large = b"x" * 60_000
    send(world, own(renter), large + b"1")
    ask(world, own(renter), large + b"2")
    with refused(ProblemCode.TOO_MUCH_STORED):
        ask(world, own(renter), large + b"4", large + b"5")


@pytest.mark.parametrize("text", ["", "!", "AAAA", base64.b64encode(b"x" * 100).decode()])
def test_a_table_that_is_none_is_refused(world: World, text: str) -> None:
    renter = world.renter()
    name = table_of(*CHUNKS).name
    with refused(ProblemCode.MALFORMED):
        world.broker.uploads.address(*own(renter), name, text, "0" * 64)
    assert uploads(world) == []


def test_a_broker_that_carries_content_gives_no_addresses() -> None:
    world = World()
    renter = world.renter()
    assert not world.broker.blobs.missing(*own(renter), []).by_address
    world.broker.uploads.refuse_bytes()
    with refused(ProblemCode.NO_SUCH_ADDRESS):
        ask(world, own(renter), *CHUNKS)


# -- troubles of the store and the database ------------------------------------------------------


def test_a_store_that_is_away_at_the_commit_loses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    renter = world.renter()
    address = ask(world, own(renter), *CHUNKS)
    put(world, address, *CHUNKS)

    def away(*_: object) -> bytes:
        raise BlobsAway("it does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(world.blobs, "read_pack", away)
        with pytest.raises(BlobsAway):
            commit(world, own(renter), address)
    assert len(uploads(world)) == 1
    commit(world, own(renter), address)
    assert missing(renter, *CHUNKS) == []


def test_a_commit_whose_outcome_is_not_known_is_asked_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    renter = world.renter()
    address = ask(world, own(renter), *CHUNKS)
    put(world, address, *CHUNKS)
    notes = world.broker.packs.note

    def lost(*given: object) -> None:
        notes(*given)  # type: ignore[arg-type]
        raise StoreAway("it went")

    with monkeypatch.context() as patch:
        patch.setattr(world.broker.packs, "note", lost)
        with pytest.raises(StoreAway):
            commit(world, own(renter), address)
    world.broker.uploads.sweep()
    commit(world, own(renter), address)
    assert [get(renter, chunk) for chunk in CHUNKS] == list(CHUNKS)


def test_the_sweeper_leaves_what_is_being_committed(world: World) -> None:
    renter = world.renter()
    address = ask(world, own(renter), *CHUNKS)
    put(world, address, *CHUNKS)
    world.clock.ms += HOUR_MS + 1
    with world.broker.context.pins.hold((address.pack,)):
        world.broker.uploads.sweep()
        assert list(world.blobs.packs()) == [address.pack]
    world.broker.uploads.sweep()
    assert list(world.blobs.packs()) == []


def test_a_bit_that_flips_later_is_found_by_the_scrub(world: World) -> None:
    renter = world.renter()
    send(world, own(renter), *CHUNKS)
    damage(world, b"two")
    world.clock.ms += 31 * 24 * HOUR_MS
    assert world.broker.packs.scrub()
    assert missing(renter, *CHUNKS) == [b"two"]
    with world.store.snapshot() as tx:
        packs = {fact.id for fact in tx.find(PackFact)}
    assert set(world.blobs.packs()) == packs


@pytest.mark.parametrize("call", ["read_pack", "put_pack", "delete_pack"])
def test_a_store_that_is_away_in_the_middle_of_the_brokers_own_work_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Scrubbing, and writing anew a pack that is half empty."""
    world = World(Settings(scrub_every_ms=HOUR_MS), by_address=True)
    renter = world.renter()
    large, small = b"large" * 1000, b"small"
    send(world, own(renter), large, small)
    send(world, own(renter), large)  # so that most of the first pack isn't needed there

    def away(*_: object) -> bytes:
        raise BlobsAway("it does not answer")

    world.clock.ms += 2 * HOUR_MS
    other = [b"more" * 1000, b"less"]
    send(world, own(renter), *other)
    with monkeypatch.context() as patch:
        patch.setattr(world.blobs, call, away)
        for work in (
            lambda: send(world, own(renter), other[0]),
            world.broker.packs.scrub,
            lambda: let_days_pass(world, 0),
        ):
            with contextlib.suppress(BlobsAway):
                work()
    everything = [large, small, *other]
    assert missing(renter, *everything) in ([], [other[0]])
    send(world, own(renter), other[0])
    assert [get(renter, chunk) for chunk in everything] == everything
    let_days_pass(world, 1.1)
    let_it_expire(world)
    let_days_pass(world, 1.1)
    with world.store.snapshot() as tx:
        packs = {fact.id for fact in tx.find(PackFact)}
    assert set(world.blobs.packs()) == packs
    assert [get(renter, chunk) for chunk in everything] == everything
    world.audit()
