"""How far an upload is, as heartbeats tell it, and what is told of one that has arrived."""

from sublet_agent.core import events
from sublet_agent.core.uploads import MAX_LOOKS, SPEED_OVER_MS, Moved, UploadOfRun
from sublet_contracts.wire import CheckpointUploaded, RunUpload
from tests.agent.test_core import NOW, World, only
from tests.contracts.samples import INDEX

GB = 10**9


def told(world: World, lease_id: str) -> RunUpload | None:
    return world.core.runs[lease_id].report(world.now).upload


def speed(*looks: tuple[int, int]) -> int:
    upload = UploadOfRun("checkpoint", 1)
    for at_ms, sent_bytes in looks:
        upload.moved(Moved(100 * GB, sent_bytes, sent_bytes), NOW + at_ms)
    found = upload.told(NOW + looks[-1][0])
    assert found is not None
    return found.bytes_per_s


def test_the_speed_is_that_of_the_last_half_minute() -> None:
    assert speed((0, 0)) == 0
    assert speed((0, 0), (1_000, 500)) == 500
    fast_then_slow = [(second * 1_000, 1_000 * min(second, 20)) for second in range(51)]
    assert speed(*fast_then_slow[:21]) == 1_000
    assert speed(*fast_then_slow) == 0
    # However often it is looked: no more looks are kept than so many.
    often = [(ms, ms) for ms in range(0, SPEED_OVER_MS, 10)]
    assert len(often) > MAX_LOOKS
    assert speed(*often) == 1_000


def test_a_clock_that_is_set_back_makes_no_speed() -> None:
    assert speed((0, 0), (5_000, 5_000), (-60_000, 6_000)) == 0
    assert speed((0, 0), (5_000, 5_000), (-60_000, 6_000), (-59_000, 7_000)) == 1_000


def test_what_was_there_before_makes_no_speed() -> None:
    upload = UploadOfRun("checkpoint", 1)
    upload.moved(Moved(4 * GB, 0, 0), NOW)
    upload.moved(Moved(4 * GB, 3 * GB, 10), NOW + 1_000)
    found = upload.told(NOW + 3_000)
    assert found is not None
    assert (found.there_bytes, found.sent_bytes, found.bytes_per_s) == (3 * GB, 10, 10)
    assert found.age_ms == 2_000


def test_a_heartbeat_tells_what_is_on_its_way_until_it_has_arrived() -> None:
    world = World()
    lease_id = world.running()
    world.do(events.UploadMoved(lease_id, "checkpoint", 5, Moved(9, 9, 9)))
    assert told(world, lease_id) is None
    world.do(events.CheckpointFound(lease_id, 5))
    assert told(world, lease_id) is None
    world.do(events.UploadMoved(lease_id, "checkpoint", 5, Moved(4 * GB, GB, 0)))
    world.now += 1_000
    world.do(events.UploadMoved(lease_id, "checkpoint", 5, Moved(4 * GB, 2 * GB, GB)))
    found = told(world, lease_id)
    assert found is not None
    assert (found.kind, found.step, found.total_bytes) == ("checkpoint", 5, 4 * GB)
    assert (found.there_bytes, found.bytes_per_s) == (2 * GB, GB)
    world.do(events.Uploaded(lease_id, "checkpoint", 5, INDEX, 4 * GB, GB))
    assert told(world, lease_id) is None
    # One of another step is none of it.
    world.do(events.CheckpointFound(lease_id, 6))
    world.do(events.UploadMoved(lease_id, "checkpoint", 5, Moved(9, 9, 9)))
    assert told(world, lease_id) is None


def test_it_is_told_what_was_sent_and_how_long_it_took() -> None:
    world = World()
    lease_id = world.running()
    world.ran(lease_id, 60_000)
    world.do(events.CheckpointFound(lease_id, 5, age_ms=2_000))
    world.now += 3_000
    # Found while the other is under way: its time begins now, not with its upload.
    world.do(events.CheckpointFound(lease_id, 6))
    world.now += 4_000
    step = world.do(events.Uploaded(lease_id, "checkpoint", 5, INDEX, 4 * GB, GB, stall_ms=300))
    message = only(step, CheckpointUploaded)
    assert (message.sent_bytes, message.took_ms, message.stall_ms) == (GB, 9_000, 300)
    world.now += 1_000
    message = only(
        world.do(events.Uploaded(lease_id, "checkpoint", 6, INDEX, 10)),
        CheckpointUploaded,
    )
    assert (message.sent_bytes, message.took_ms, message.stall_ms) == (0, 5_000, None)


def test_no_save_held_its_loop_for_longer_than_it_has_run() -> None:
    world = World()
    lease_id = world.running()
    world.ran(lease_id, 2_000)
    world.do(events.CheckpointFound(lease_id, 5))
    step = world.do(events.Uploaded(lease_id, "checkpoint", 5, INDEX, 10, 10, 2**53 - 1))
    assert only(step, CheckpointUploaded).stall_ms == 2_000


def test_a_clock_that_is_set_back_meanwhile_makes_no_negative_time() -> None:
    world = World()
    lease_id = world.running()
    world.do(events.CheckpointFound(lease_id, 5))
    world.now -= 60_000
    step = world.do(events.Uploaded(lease_id, "checkpoint", 5, INDEX, 10))
    assert only(step, CheckpointUploaded).took_ms == 0


def test_a_job_that_saves_again_and_again_fills_no_record() -> None:
    world = World()
    lease_id = world.running()
    for step in range(1, 200):
        world.do(events.CheckpointFound(lease_id, step))
    record = world.core.saved.runs[lease_id]
    assert len(record.whole_ms) <= len(record.local_checkpoints) + 1 < 10
