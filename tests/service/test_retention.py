"""What content is kept, for how long, and that no upload loses a race against letting go."""

from __future__ import annotations

import threading

import pytest

from sublet_broker.adapters.memory.blobs import MemoryBlobs
from sublet_broker.service.broker import Settings
from sublet_broker.service.errors import Refusal
from sublet_broker.service.ports import StoreAway
from sublet_broker.service.unit_of_work.pins import Pins
from sublet_contracts.api import NextStep
from sublet_contracts.digests import digest_of
from sublet_contracts.documents import Input
from sublet_contracts.problems import ProblemCode
from sublet_contracts.states import CheckpointState, JobState
from tests.service.world import AgentDouble, RenterDouble, World, tree_of

DAY_MS = 86_400_000


def upload_input(renter: RenterDouble, content: bytes) -> Input:
    index, chunks = tree_of({"data.csv": content})
    raw = index.to_bytes()
    blobs = renter.world.broker.blobs
    for digest, data in [*chunks.items(), (digest_of(raw), raw)]:
        blobs.put(renter.party, renter.party, None, digest, data)
    return Input(
        destination="/data.csv",
        kind="file",
        index_digest=digest_of(raw),
        total_bytes=index.total_bytes,
    )


def let_days_pass(world: World, days: float) -> None:
    """Only the sweeper runs meanwhile."""
    world.clock.ms += int(days * DAY_MS)
    while world.broker.retention.sweep():
        pass
    while world.broker.retention.sweep_files():
        pass


class RacingBlobs(MemoryBlobs):
    """The sweeper comes between an upload's file and its row, each time."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self.swept = 0

    def _sweep(self) -> None:
        self._world.clock.ms += 2 * DAY_MS
        while self._world.broker.retention.sweep_files():
            self.swept += 1

    def put(self, digest: str, data: bytes) -> None:
        super().put(digest, data)
        self._sweep()

    def has(self, digest: str) -> bool:
        found = super().has(digest)
        self._sweep()
        return found


def test_an_upload_survives_the_deletion_of_the_same_content() -> None:
    world = World()
    world.blobs = racing = RacingBlobs(world)
    world.broker = world._compose()
    renter = world.renter()
    blobs, same = world.broker.blobs, digest_of(b"same")
    blobs.put(renter.party, renter.party, None, same, b"same")
    assert racing.swept
    assert blobs.get(renter.party, renter.party, None, same) == b"same"
    assert blobs.missing(renter.party, renter.party, None, [same]).missing == ()
    assert blobs.get(renter.party, renter.party, None, same) == b"same"


def test_who_wants_what_is_being_deleted_waits_until_it_is_gone() -> None:
    """And then writes it anew: it must not claim a file that is about to go."""
    pins, order = Pins(), []
    with pins.deleting(["one", "two"]) as taken:
        assert list(taken) == ["one", "two"]
        waiting = threading.Thread(target=lambda: _hold(pins, order))
        waiting.start()
        waiting.join(0.05)
        order.append("deleted")
    waiting.join(10)
    assert order == ["deleted", "held"]
    with pins.hold(["one"]), pins.hold(["one"]), pins.deleting(["one", "two"]) as taken:
        assert list(taken) == ["two"]
    with pins.deleting(["one"]) as taken:
        assert list(taken) == ["one"]


def _hold(pins: Pins, order: list[str]) -> None:
    with pins.hold(["one"]):
        order.append("held")


def test_content_of_a_doubtful_commit_stays() -> None:
    pins = Pins()
    with pytest.raises(StoreAway), pins.hold(["one"]):
        raise StoreAway
    with pytest.raises(Refusal), pins.hold(["two"]):
        raise Refusal(ProblemCode.UNKNOWN_PARTY, "x")
    with pins.deleting(["one", "two"]) as taken:
        assert list(taken) == ["two"]


def test_pruning_one_jobs_checkpoint_leaves_anothers_content() -> None:
    world = World()
    alice, bob = world.agent("alice"), world.agent("bob")
    renter = world.renter()
    renter.run(name="one")
    renter.run(name="two")
    one, two = alice.the_run, bob.the_run
    alice.durable(one, 1, content={"base": b"shared"})
    bob.durable(two, 1, content={"base": b"shared"})
    for step in range(2, 6):
        alice.durable(one, step)
    assert world.blobs.get(digest_of(b"shared")) == b"shared"
    for step in range(2, 6):
        bob.durable(two, step)
    assert digest_of(b"shared") not in world.blobs.names()


def test_what_an_upload_in_progress_counts_on_is_not_pruned() -> None:
    world = World()
    alice = world.agent("alice")
    renter = world.renter()
    renter.run()
    run = alice.the_run
    alice.durable(run, 1, content={"model": b"first"})
    for step in (2, 3):
        world.pass_ms(1_000)
        alice.durable(run, step)
    # Step 5 holds again what step 1 held, and its upload is told that it is here.
    again, _ = tree_of({"model": b"first"})
    hashes = [digest_of(b"first"), digest_of(again.to_bytes())]
    blobs = world.broker.blobs
    assert blobs.missing(alice.party, run.job_id, run.lease.epoch, hashes).missing == ()
    world.pass_ms(1_000)
    alice.durable(run, 4)  # prunes step 1
    signed = alice.checkpoint(run, 5, content={"model": b"first"}, upload=False)
    world.settle_down()
    assert next(v for v in run.verdicts if v.checkpoint == signed.id).durable


def finished() -> tuple[World, AgentDouble, RenterDouble, str]:
    world = World()
    alice = world.agent("alice", expires_ms=world.now_ms + 100 * DAY_MS)
    renter = world.renter()
    entry = upload_input(renter, b"rows")
    job = renter.run(inputs=(entry,), outputs="/out")
    for step in (1, 2, 3):
        alice.durable(alice.the_run, step, content={"model": f"step {step}".encode()})
    alice.succeed(alice.the_run, b"weights")
    world.settle_down()
    assert renter.view(job).state is JobState.SUCCEEDED
    return world, alice, renter, job


def test_an_ended_job_keeps_its_outputs_and_checkpoints_for_a_week() -> None:
    world, _, renter, job = finished()
    let_days_pass(world, 6)
    blobs = world.broker.blobs
    for content in (b"weights", b"step 1", b"step 2", b"step 3"):
        assert blobs.get(renter.party, job, None, digest_of(content)) == content
    assert renter.view(job).next_step is NextStep.DOWNLOAD_OUTPUTS
    week_ms = world.broker.context.settings.keep_ended_ms
    until_ms = (renter.view(job).ended_ms or 0) + week_ms
    page = world.broker.views.checkpoints(renter.party, job)
    assert {(c.kept, c.kept_until_ms) for c in page.checkpoints} == {(True, until_ms)}
    let_days_pass(world, 2)
    with pytest.raises(Refusal) as caught:
        blobs.get(renter.party, job, None, digest_of(b"weights"))
    assert caught.value.code == "no_longer_kept"
    view = renter.view(job)
    assert view.says == "finished; its outputs are no longer kept"
    assert view.next_step is NextStep.NONE
    let_days_pass(world, 7)
    assert world.blobs.names() == []
    page = world.broker.views.checkpoints(renter.party, job)
    assert all(c.state is CheckpointState.DURABLE and c.detail for c in page.checkpoints)


def test_an_input_stays_while_a_live_job_uses_it() -> None:
    world = World()
    world.agent("alice", expires_ms=world.now_ms + 100 * DAY_MS)
    renter = world.renter()
    entry = upload_input(renter, b"rows")
    job = renter.submit(inputs=(entry,), expires_ms=world.now_ms + 100 * DAY_MS)
    let_days_pass(world, 30)
    blobs = world.broker.blobs
    assert blobs.missing(renter.party, renter.party, None, [digest_of(b"rows")]).missing == ()
    world.broker.jobs.cancel(renter.party, job)
    let_days_pass(world, 8)
    let_days_pass(world, 1)
    assert world.blobs.names() == []


def test_a_file_that_nobody_has_a_right_to_is_swept() -> None:
    world = World()
    renter = world.renter()
    upload_input(renter, b"rows")
    world.blobs.put(digest_of(b"orphan"), b"orphan")  # its upload was killed before its row
    while world.broker.retention.sweep_files():
        pass
    assert digest_of(b"orphan") not in world.blobs.names()
    assert digest_of(b"rows") in world.blobs.names()


def test_a_renter_and_a_job_have_room_for_so_much() -> None:
    room = 5 * 65_536
    world = World(Settings(max_renter_bytes=room, max_job_bytes=room))
    alice = world.agent("alice")
    renter = world.renter()
    blobs = world.broker.blobs
    for number in range(5):
        data = str(number).encode()
        blobs.put(renter.party, renter.party, None, digest_of(data), data)
    with pytest.raises(Refusal) as caught:
        blobs.put(renter.party, renter.party, None, digest_of(b"one more"), b"one more")
    assert caught.value.code == "too_much_stored"
    blobs.put(renter.party, renter.party, None, digest_of(b"0"), b"0")  # it is here already
    let_days_pass(world, 8)
    blobs.put(renter.party, renter.party, None, digest_of(b"one more"), b"one more")
    alice.announce(expires_ms=world.now_ms + DAY_MS)
    job = renter.run()
    run = alice.the_run
    for number in range(5):
        data = str(number).encode()
        blobs.put(alice.party, job, run.lease.epoch, digest_of(data), data)
    with pytest.raises(Refusal) as caught:
        blobs.put(alice.party, job, run.lease.epoch, digest_of(b"more"), b"more")
    assert caught.value.code == "too_much_stored"
