"""What a run uses: from what is measured to what the heartbeat tells."""

from sublet_agent.core import effects, events
from sublet_agent.core.exit_reasons import ExitEvidence
from sublet_agent.core.runner_port import Measure
from sublet_agent.core.supply import DeviceSeen
from sublet_agent.core.usage import (
    UsageOfRun,
    cpu_millis_between,
    devices_measured,
    disk_limit_text,
    memory_limit_text,
)
from sublet_contracts.documents import Device
from sublet_contracts.encoding import MAX_INTEGER
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import DeviceUsage, Heartbeat, RunUsage
from tests.agent.test_core import GPU, NOW, World, wanted

LIMITS = {"memory_limit_bytes": 1_000, "disk_limit_bytes": 2_000}


def told(usage: UsageOfRun, now_ms: int, *seen: DeviceSeen) -> RunUsage | None:
    devices = devices_measured(seen, NOW)
    return usage.told(now_ms, **LIMITS, device_ids=(GPU.id, "gpu-1"), devices=devices)


def test_nothing_is_told_before_anything_was_measured() -> None:
    assert told(UsageOfRun(), NOW) is None


def test_figures_come_with_their_age_and_what_is_not_known_is_left_out() -> None:
    usage = UsageOfRun()
    usage.measured(Measure(NOW, cpu_ns=5_000_000_000, memory_bytes=700))
    first = told(usage, NOW + 400)
    assert first == RunUsage(age_ms=400, memory_bytes=700, peak_memory_bytes=700, **LIMITS)
    # 1.5 core seconds within one second.
    usage.measured(Measure(NOW + 1_000, cpu_ns=6_500_000_000, memory_bytes=300))
    usage.disk_used(55, NOW + 900)
    busy = DeviceSeen(GPU, used_bytes=9, utilization_percent=97)
    spare = DeviceSeen(GPU.model_copy(update={"id": "gpu-9"}))
    again = told(usage, NOW + 1_500, busy, spare)
    assert again == RunUsage(
        age_ms=1_500,  # of the oldest: the look at the GPU
        cpu_millis=1_500,
        memory_bytes=300,
        peak_memory_bytes=700,
        disk_bytes=55,
        devices=(
            DeviceUsage(
                id=GPU.id,
                utilization_percent=97,
                memory_used_bytes=9,
                memory_bytes=GPU.memory_bytes,
            ),
        ),
        **LIMITS,
    )


def test_odd_figures_stay_within_what_a_message_takes() -> None:
    usage = UsageOfRun()
    usage.measured(Measure(NOW, cpu_ns=2**70, memory_bytes=-5, peak_memory_bytes=2**70))
    odd = DeviceSeen(GPU, used_bytes=2**70, utilization_percent=400)
    found = told(usage, NOW - 60_000, odd)  # the clock was set back
    assert found is not None
    assert (found.age_ms, found.memory_bytes, found.peak_memory_bytes) == (0, 0, MAX_INTEGER)
    assert found.devices[0].utilization_percent == 100
    assert found.devices[0].memory_used_bytes == MAX_INTEGER


def test_cores_are_told_between_two_measures_only() -> None:
    then = Measure(NOW, cpu_ns=5_000)
    assert cpu_millis_between(None, then) is None
    for now in (Measure(NOW, 6_000), Measure(NOW + 10, 4_000), Measure(NOW + 10, None)):
        assert cpu_millis_between(then, now) is None
    assert cpu_millis_between(then, Measure(NOW + 1_000, 5_000 + 250_000_000)) == 250


def test_a_cpu_is_no_gpu() -> None:
    cpu = Device(id="cpu", kind="cpu", name="x", memory_bytes=1, hardware_class="cpu")
    assert devices_measured([DeviceSeen(cpu)], NOW) == {}


def test_the_heartbeat_carries_them_and_they_end_nothing() -> None:
    world = World()
    lease_id = world.running()
    step = world.do(events.Measured(lease_id, Measure(world.now, memory_bytes=10**15)))
    assert step.save.empty
    assert not step.effects
    beat = world.core.heartbeat(world.now + 70)
    assert isinstance(beat, Heartbeat)
    [report] = beat.runs
    assert report.usage is not None
    assert (report.usage.age_ms, report.usage.memory_bytes) == (70, 10**15)
    assert report.usage.disk_limit_bytes == 1000


def test_what_went_beyond_its_memory_or_disk_is_told_with_the_figures() -> None:
    assert memory_limit_text(502_900_000, 500_000_000) == (
        "502.9 MB were in use at the peak, 500 MB asked for"
    )
    # A kernel that kills has seen the limit reached, whatever a look had seen before.
    assert memory_limit_text(None, 500_000_000).startswith("500 MB were in use")
    assert disk_limit_text(108_000_000, 100_000_000) == (
        "108 MB were on disk, 100 MB were asked for"
    )
    world = World()
    lease_id = world.running()
    world.do(events.Measured(lease_id, Measure(world.now, memory_bytes=7)))
    end = ExitEvidence(137, out_of_memory=True)
    seen = events.Observed(
        lease_id, running=False, started_ms=NOW, ran_ms=1, end=end, detail="more than 1 bytes"
    )
    world.do(seen)
    assert world.core.saved.runs[lease_id].reason is Reason.OUT_OF_MEMORY
    assert world.core.saved.runs[lease_id].detail == "7 B were in use at the peak, 1 B asked for"
    assert wanted(world.steps[-1], effects.Unexpected) == []
