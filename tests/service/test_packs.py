"""Content moves in packs: all of one or nothing; nobody learns what others have; room is made, and
damage is found."""

from __future__ import annotations

import pytest

from sublet_broker.adapters.memory.blobs import MemoryBlobs
from sublet_broker.service.broker import Settings
from sublet_broker.service.errors import Refusal
from sublet_broker.service.ports import BlobMissing, StorageFull, StoreAway
from sublet_contracts.digests import digest_of
from sublet_contracts.documents import Input
from sublet_contracts.packs import Pack, PackTable, in_packs
from sublet_contracts.problems import ProblemCode
from sublet_contracts.reasons import Reason
from sublet_contracts.states import CheckpointState, JobState
from tests.service.world import AgentDouble, RenterDouble, RunDouble, World, tree_of

DAY_MS = 86_400_000
HOUR_MS = 3_600_000


def pack_of(*chunks: bytes) -> Pack:
    table = PackTable(tuple((digest_of(chunk), len(chunk)) for chunk in chunks))
    return Pack(table, (b"".join(chunks),))


def put(party: RenterDouble, *chunks: bytes) -> None:
    party.world.broker.blobs.put_pack(party.party, party.party, None, pack_of(*chunks))


def missing(party: RenterDouble, *chunks: bytes) -> list[bytes]:
    blobs = party.world.broker.blobs
    named = {digest_of(chunk): chunk for chunk in chunks}
    return [named[name] for name in blobs.missing(party.party, party.party, None, named).missing]


def get(party: RenterDouble, chunk: bytes) -> bytes:
    return party.world.broker.blobs.get(party.party, party.party, None, digest_of(chunk))


def upload(agent: AgentDouble, run: RunDouble, content: dict[str, bytes]) -> None:
    """As an agent does: what is missing, in one pack, then the index."""
    index, chunks = tree_of(content)
    raw = index.to_bytes()
    blobs = agent.world.broker.blobs
    scope = (agent.party, run.job_id, run.lease.epoch)
    for table in in_packs(blobs.missing(*scope, chunks).missing, index.chunks()):
        blobs.put_pack(*scope, pack_of(*(chunks[name] for name, _ in table.chunks)))
    blobs.put(*scope, digest_of(raw), raw)


def save(agent: AgentDouble, run: RunDouble, step: int, content: dict[str, bytes]) -> None:
    upload(agent, run, content)
    agent.durable(run, step, content=content)


def let_days_pass(world: World, days: float) -> None:
    """Only the sweeper runs meanwhile."""
    world.clock.ms += int(days * DAY_MS)
    while world.broker.retention.sweep():
        pass
    while world.broker.retention.sweep_files():
        pass


def damage(world: World, chunk: bytes) -> None:
    """Flip a bit of what lies there, wherever it does."""
    for pack in world.blobs.packs():
        at = world.blobs.read_pack(pack, 0, 10**9).find(chunk)
        if at >= 0:
            world.blobs.damage_pack(pack, at)
            return
    raise LookupError(chunk)


def stored(world: World) -> bytes:
    return b"|".join(world.blobs.read_pack(pack, 0, 10**9) for pack in world.blobs.packs())


def states(world: World, renter: RenterDouble, job: str) -> dict[int, CheckpointState]:
    page = world.broker.views.checkpoints(renter.party, job)
    return {checkpoint.step: checkpoint.state for checkpoint in page.checkpoints}


def test_a_pack_is_one_file_and_each_chunk_comes_back() -> None:
    world = World()
    renter = world.renter()
    put(renter, b"one", b"two", b"three")
    assert len(list(world.blobs.packs())) == 1
    assert list(world.blobs.names()) == []
    assert [get(renter, chunk) for chunk in (b"three", b"one", b"two")] == [
        b"three",
        b"one",
        b"two",
    ]
    assert missing(renter, b"one", b"four", b"three") == [b"four"]


def test_a_job_runs_and_resumes_from_packs() -> None:
    world = World()
    alice = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    save(alice, alice.the_run, 1, {"base": b"frozen", "model": b"1"})
    save(alice, alice.the_run, 2, {"base": b"frozen", "model": b"2"})
    assert states(world, renter, job) == {1: CheckpointState.DURABLE, 2: CheckpointState.DURABLE}
    assert stored(world).count(b"frozen") == 1
    alice.exit(alice.the_run, Reason.RECLAIMED, 75)
    world.settle_down()
    run = alice.the_run
    assert run.lease.start_step == 2
    blobs = world.broker.blobs
    assert blobs.get(alice.party, job, run.lease.epoch, digest_of(b"frozen")) == b"frozen"
    world.audit()


def test_the_same_pack_again_changes_nothing_and_leaves_nothing() -> None:
    world = World()
    renter = world.renter()
    for _ in range(3):
        put(renter, b"one", b"two")
    assert len(list(world.blobs.packs())) == 1
    assert get(renter, b"one") == b"one"


def test_many_are_read_at_once_in_the_order_asked_for() -> None:
    world = World()
    alice = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = alice.the_run
    save(alice, run, 1, {"a": b"one", "b": b"two"})
    save(alice, run, 2, {"a": b"one", "b": b"three"})
    scope = (alice.party, job, run.lease.epoch)
    blobs = world.broker.blobs
    asked = [b"three", b"one", b"two", b"one"]
    assert blobs.get_many(*scope, [digest_of(data) for data in asked]) == asked
    damage(world, b"two")
    with pytest.raises(Refusal) as caught:
        blobs.get_many(*scope, [digest_of(data) for data in asked])
    assert caught.value.code is ProblemCode.DAMAGED
    assert caught.value.facts == {"digest": digest_of(b"two")}
    assert blobs.get_many(*scope, [digest_of(b"three"), digest_of(b"one")]) == [b"three", b"one"]
    with pytest.raises(Refusal) as caught:
        blobs.get_many(*scope, [digest_of(b"one"), digest_of(b"of somebody else")])
    assert caught.value.code is ProblemCode.NOT_FOUND


def test_so_much_is_read_at_once_and_no_more() -> None:
    world = World(Settings(max_blob_bytes=10))
    alice = world.agent("alice")
    job = world.renter().run()
    scope = (alice.party, job, alice.the_run.lease.epoch)
    world.broker.blobs.put_pack(*scope, pack_of(b"five.", b"fife.", b"six..."))
    get_many = world.broker.blobs.get_many
    assert get_many(*scope, [digest_of(b"five."), digest_of(b"fife.")]) == [b"five.", b"fife."]
    with pytest.raises(Refusal) as caught:
        get_many(*scope, [digest_of(b"five."), digest_of(b"six...")])
    assert caught.value.code is ProblemCode.TOO_LARGE


def test_nobody_learns_what_others_have_sent() -> None:
    """Whoever sends a chunk sends all of it, hears the same, and gets nothing by its name."""
    world = World()
    first, second = world.renter("first"), world.renter("second")
    put(first, b"secret", b"mine")
    assert missing(second, b"secret") == [b"secret"]
    with pytest.raises(Refusal) as caught:
        get(second, b"secret")
    unknown = caught.value
    with pytest.raises(Refusal) as caught:
        get(second, b"never sent by anybody")
    assert (caught.value.code, caught.value.facts.keys()) == (unknown.code, unknown.facts.keys())
    put(second, b"secret")
    assert get(second, b"secret") == b"secret"
    assert get(first, b"secret") == b"secret"
    # Stored twice for a while, at the most: the earlier one goes with its pack's rest.
    assert missing(first, b"secret", b"mine") == []


def test_one_scope_letting_go_leaves_the_others_content() -> None:
    world = World()
    first, second = world.renter("first"), world.renter("second")
    put(first, b"shared", b"mine")
    let_days_pass(world, 6)
    put(second, b"shared")
    let_days_pass(world, 2)
    assert missing(first, b"shared", b"mine") == [b"shared", b"mine"]
    assert get(second, b"shared") == b"shared"
    assert b"mine" not in stored(world)
    let_days_pass(world, 8)
    assert stored(world) == b""


class FailingBlobs(MemoryBlobs):
    """No room, or the process ends when the file is there."""

    fails: BaseException | None = None

    def put_pack(self, pack: str, parts: object) -> None:
        if isinstance(self.fails, StorageFull):
            raise self.fails
        super().put_pack(pack, parts)  # type: ignore[arg-type]
        if self.fails is not None:
            raise self.fails


def failing_world() -> tuple[World, FailingBlobs]:
    world = World()
    world.blobs = failing = FailingBlobs()
    world.broker = world._compose()
    return world, failing


def test_of_a_pack_that_was_refused_nothing_is_kept() -> None:
    room = 3 * 65_536
    world = World(Settings(max_renter_bytes=room))
    renter = world.renter()
    put(renter, b"one", b"two")
    with pytest.raises(Refusal) as caught:
        put(renter, b"three", b"four")
    assert caught.value.code is ProblemCode.TOO_MUCH_STORED
    assert missing(renter, b"one", b"two", b"three", b"four") == [b"three", b"four"]
    assert len(list(world.blobs.packs())) == 1
    put(renter, b"one", b"two", b"three")  # two of them are here already
    assert get(renter, b"three") == b"three"


def test_a_pack_that_finds_no_room_is_refused_and_comes_again() -> None:
    world, failing = failing_world()
    renter = world.renter()
    failing.fails = StorageFull("full")
    with pytest.raises(Refusal) as caught:
        put(renter, b"one")
    assert caught.value.code is ProblemCode.STORAGE_FULL
    failing.fails = None
    put(renter, b"one")
    assert get(renter, b"one") == b"one"


def test_a_pack_whose_broker_died_before_its_rows_is_swept() -> None:
    world, failing = failing_world()
    renter = world.renter()
    put(renter, b"kept")
    failing.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        put(renter, b"orphan")
    failing.fails = None
    world.broker = world._compose()  # another process, on the same disk and database
    assert missing(renter, b"orphan", b"kept") == [b"orphan"]
    assert b"orphan" in stored(world)
    while world.broker.retention.sweep_files():
        pass
    assert stored(world) == b"kept"
    assert get(renter, b"kept") == b"kept"


class RacingBlobs(MemoryBlobs):
    """The sweeper comes between a pack's file and its rows, each time."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def put_pack(self, pack: str, parts: object) -> None:
        super().put_pack(pack, parts)  # type: ignore[arg-type]
        self._world.clock.ms += 2 * DAY_MS
        self._world.broker.retention.begin_files()
        while self._world.broker.retention.sweep_files():
            pass


def test_a_pack_survives_the_sweeper_that_comes_before_its_rows() -> None:
    world = World()
    world.blobs = RacingBlobs(world)
    world.broker = world._compose()
    renter = world.renter()
    put(renter, b"one", b"two")
    assert get(renter, b"two") == b"two"


def test_a_half_dead_pack_is_written_anew_with_what_lives() -> None:
    world = World()
    alice = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = alice.the_run
    base = b"a base that stays"
    save(alice, run, 1, {"base": base, "model": b"model of step 1 " * 10})
    for step in range(2, 7):
        world.pass_ms(1_000)
        save(alice, run, step, {"base": base, "model": f"model of step {step} ".encode() * 10})
    held = stored(world)
    assert held.count(base) == 1
    assert b"model of step 1 " not in held
    assert held.count(b"model of step 6 ") == 10
    blobs = world.broker.blobs
    assert blobs.get(alice.party, job, run.lease.epoch, digest_of(base)) == base
    world.audit()


def test_a_pack_that_is_mostly_needed_stays_as_it_is() -> None:
    world = World()
    alice = world.agent("alice")
    renter = world.renter()
    renter.run()
    run = alice.the_run
    base = b"a base that stays " * 10
    save(alice, run, 1, {"base": base, "model": b"model 1"})
    (before,) = world.blobs.packs()
    for step in range(2, 7):
        world.pass_ms(1_000)
        save(alice, run, step, {"base": base, "model": f"model {step}".encode()})
    assert before in world.blobs.packs()


def test_compaction_waits_where_there_is_no_room() -> None:
    world, failing = failing_world()
    first, second = world.renter("first"), world.renter("second")
    put(first, b"large and gone soon", b"s")
    let_days_pass(world, 6)
    put(second, b"s", b"t" * 100)
    put(first, b"u", b"much larger than that, and gone soon")
    # `u` alone is used again: its pack is half empty in a while.
    let_days_pass(world, 5)
    assert missing(first, b"u") == []
    failing.fails = StorageFull("full")
    let_days_pass(world, 3)
    assert get(first, b"u") == b"u"
    assert b"and gone soon" in stored(world)
    failing.fails = None
    let_days_pass(world, 1)
    assert get(first, b"u") == b"u"
    assert b"and gone soon" not in stored(world)


def three_saved() -> tuple[World, AgentDouble, RenterDouble, str]:
    world = World()
    alice = world.agent("alice", expires_ms=world.now_ms + 100 * DAY_MS)
    renter = world.renter()
    job = renter.run(expires_ms=world.now_ms + 100 * DAY_MS)
    for step in (1, 2, 3):
        world.pass_ms(1_000)
        save(alice, alice.the_run, step, {"model": f"model {step}".encode(), "base": b"base"})
    return world, alice, renter, job


def test_damage_is_found_on_restore_and_the_one_before_is_used() -> None:
    world, alice, renter, job = three_saved()
    damage(world, b"model 3")
    alice.exit(alice.the_run, Reason.RECLAIMED, 75)
    world.settle_down()
    run = alice.the_run
    assert run.lease.start_step == 3
    blobs = world.broker.blobs
    with pytest.raises(Refusal) as caught:
        blobs.get(alice.party, job, run.lease.epoch, digest_of(b"model 3"))
    assert caught.value.code is ProblemCode.DAMAGED
    alice.exit(run, Reason.RESTORE_FAILED)
    world.settle_down()
    world.pass_ms(5_000)
    assert states(world, renter, job)[3] is CheckpointState.QUARANTINED
    assert alice.the_run.lease.start_step == 2
    epoch = alice.the_run.lease.epoch
    assert blobs.get(alice.party, job, epoch, digest_of(b"base")) == b"base"
    world.audit()


def test_damage_is_found_by_the_scrub_before_anybody_restores() -> None:
    world, _, renter, job = three_saved()
    damage(world, b"model 3")
    assert world.broker.packs.scrub() == 0  # not due yet
    world.clock.ms += world.settings.scrub_every_ms + HOUR_MS
    assert world.broker.packs.scrub()
    world.broker.supervision.verdicts()
    found = states(world, renter, job)
    assert found[3] is CheckpointState.QUARANTINED
    assert found[2] is CheckpointState.DURABLE
    assert b"model 2" in stored(world)


def test_what_is_whole_moves_out_of_a_damaged_pack() -> None:
    world, alice, renter, job = three_saved()
    packs = set(world.blobs.packs())
    damage(world, b"model 1")
    world.clock.ms += world.settings.scrub_every_ms + HOUR_MS
    world.broker.packs.scrub()
    world.broker.supervision.verdicts()
    found = states(world, renter, job)
    assert found[1] is CheckpointState.QUARANTINED
    assert {found[2], found[3]} == {CheckpointState.DURABLE}
    assert len(packs - set(world.blobs.packs())) == 1
    scope = (alice.party, job, alice.the_run.lease.epoch)
    assert world.broker.blobs.get(*scope, digest_of(b"base")) == b"base"
    # And what was lost is asked for again, and heals.
    upload(alice, alice.the_run, {"model": b"model 1", "base": b"base"})
    assert world.broker.blobs.get(*scope, digest_of(b"model 1")) == b"model 1"


class AsideBlobs(MemoryBlobs):
    """Notes which packs were set aside."""

    def __init__(self) -> None:
        super().__init__()
        self.aside: list[bytes] = []

    def set_pack_aside(self, pack: str) -> None:
        self.aside.append(self.read_pack(pack, 0, 10**9))
        super().set_pack_aside(pack)


@pytest.mark.parametrize("alone", [False, True])
def test_a_damaged_pack_is_set_aside_also_if_nothing_else_lies_in_it(alone: bool) -> None:
    world = World()
    world.blobs = aside = AsideBlobs()
    world.broker = world._compose()
    renter = world.renter()
    put(renter, b"gone") if alone else put(renter, b"gone", b"kept")
    damage(world, b"gone")
    with pytest.raises(Refusal, match="no longer readable"):
        get(renter, b"gone")
    assert missing(renter, b"gone") == [b"gone"]
    world.broker.packs.scrub()
    assert [len(data) for data in aside.aside] == [4 if alone else 8]
    assert stored(world) == (b"" if alone else b"kept")
    put(renter, b"gone")
    assert get(renter, b"gone") == b"gone"


def test_a_sound_pack_is_read_once_in_so_long() -> None:
    world, *_ = three_saved()
    every_ms = world.settings.scrub_every_ms
    world.clock.ms += every_ms + HOUR_MS
    assert world.broker.packs.scrub() == len(list(world.blobs.packs()))
    assert world.broker.packs.scrub() == 0
    world.clock.ms += every_ms // 2
    assert world.broker.packs.scrub() == 0
    world.clock.ms += every_ms
    assert world.broker.packs.scrub()


def test_a_pack_whose_file_went_away_is_damage() -> None:
    world, alice, renter, job = three_saved()
    for pack in list(world.blobs.packs()):
        if b"model 3" in world.blobs.read_pack(pack, 0, 1_000):
            world.blobs.delete_pack(pack)
    blobs = world.broker.blobs
    scope = (alice.party, job, alice.the_run.lease.epoch)
    hashes = [digest_of(b"model 3"), digest_of(b"model 2")]
    assert blobs.missing(*scope, hashes).missing == (hashes[0],)
    world.clock.ms += world.settings.scrub_every_ms + HOUR_MS
    world.broker.packs.scrub()
    world.broker.supervision.verdicts()
    assert states(world, renter, job)[3] is CheckpointState.QUARANTINED


def test_a_checkpoint_without_one_of_its_chunks_does_not_count() -> None:
    world = World()
    alice = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = alice.the_run
    index, _ = tree_of({"base": b"base", "model": b"model"})
    blobs = world.broker.blobs
    scope = (alice.party, run.job_id, run.lease.epoch)
    blobs.put_pack(*scope, pack_of(b"base"))
    blobs.put(*scope, digest_of(index.to_bytes()), index.to_bytes())
    alice.checkpoint(run, 1, content={"base": b"base", "model": b"model"}, upload=False)
    world.settle_down()
    assert states(world, renter, job) == {1: CheckpointState.REJECTED}
    assert digest_of(b"model")[:10] in run.verdicts[-1].detail


def test_an_index_that_lies_about_a_size_does_not_count() -> None:
    """It is the size that limits are checked against."""
    world = World()
    alice = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = alice.the_run
    index, _ = tree_of({"model": b"model" * 100})
    (file,) = index.files
    (chunk,) = file.chunks
    small = file.model_copy(
        update={"size_bytes": 1, "chunks": (chunk.model_copy(update={"size_bytes": 1}),)}
    )
    raw = index.model_copy(update={"files": (small,)}).to_bytes()
    blobs = world.broker.blobs
    scope = (alice.party, run.job_id, run.lease.epoch)
    blobs.put_pack(*scope, pack_of(b"model" * 100))
    blobs.put(*scope, digest_of(raw), raw)
    alice.checkpoint(run, 1, uploaded=(digest_of(raw), 1))
    world.settle_down()
    assert states(world, renter, job) == {1: CheckpointState.REJECTED}
    assert "500 bytes" in run.verdicts[-1].detail


def test_a_zombie_puts_no_pack() -> None:
    world = World()
    alice, bob = world.agent("alice"), world.agent("bob")
    renter = world.renter()
    renter.run()
    run = alice.the_run if alice.runs else bob.the_run
    holder = alice if alice.runs else bob
    holder.exit(run, Reason.RECLAIMED, 75)
    world.settle_down()
    with pytest.raises(Refusal) as caught:
        world.broker.blobs.put_pack(
            holder.party, run.job_id, run.lease.epoch, pack_of(b"from the past")
        )
    assert caught.value.code in (ProblemCode.STALE_EPOCH, ProblemCode.NOT_FOUND)
    assert b"from the past" not in stored(world)


def test_an_input_comes_in_packs() -> None:
    world = World()
    world.agent("alice")
    renter = world.renter()
    index, chunks = tree_of({"a": b"rows a", "b": b"rows b"})
    raw = index.to_bytes()
    put(renter, *chunks.values())
    world.broker.blobs.put(renter.party, renter.party, None, digest_of(raw), raw)
    entry = Input(
        destination="/data",
        kind="folder",
        index_digest=digest_of(raw),
        total_bytes=index.total_bytes,
    )
    job = renter.run(inputs=(entry,))
    assert renter.view(job).state is JobState.RUNNING
    assert world.broker.blobs.get(renter.party, job, None, digest_of(b"rows b")) == b"rows b"


def test_a_doubtful_commit_keeps_the_pack() -> None:
    """The connection broke over the commit: nobody knows whether it was made."""
    world = World()
    renter = world.renter()
    real = world.broker.context.work
    broke: list[object] = []

    class Breaks:
        def __enter__(self) -> object:
            self.unit = real()
            return self.unit.__enter__()

        def __exit__(self, *how: object) -> None:
            self.unit.__exit__(*how)  # type: ignore[arg-type]
            if not broke:
                broke.append(how)
                raise StoreAway("gone over the commit")

    world.broker.context.work = Breaks  # type: ignore[assignment,method-assign]
    with pytest.raises(StoreAway):
        put(renter, b"one")
    while world.broker.retention.sweep_files():
        pass
    assert get(renter, b"one") == b"one"


def test_content_that_is_nowhere_is_missing() -> None:
    world = World()
    with pytest.raises(BlobMissing):
        world.broker.packs.read("blake3:" + "0" * 64)
