"""What a run uses of its machine, put together for the heartbeat. Pure. Rules:

1. Figures are told with their age, so that a reader's clock and ours needn't agree.
2. What can't be measured here is left out (None), never told as 0.
3. The peak is the highest that was seen: between two looks it may have been higher.
4. Nothing is decided by any of it: no money, no lease, no end of a run.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sublet_agent.core.runner_port import Measure
from sublet_agent.core.supply import DeviceSeen
from sublet_contracts.amounts import format_bytes
from sublet_contracts.encoding import MAX_INTEGER
from sublet_contracts.wire import MAX_UTILIZATION_PERCENT, DeviceUsage, RunUsage


@dataclass(frozen=True)
class DeviceMeasure:
    """How busy a GPU is, whoever keeps it so."""

    at_ms: int
    utilization_percent: int | None
    memory_used_bytes: int
    memory_bytes: int


def devices_measured(seen: Iterable[DeviceSeen], at_ms: int) -> dict[str, DeviceMeasure]:
    """Return what a look at the machine tells of each GPU, by its id."""
    return {
        one.device.id: DeviceMeasure(
            at_ms, one.utilization_percent, one.used_bytes, one.device.memory_bytes
        )
        for one in seen
        if one.device.kind == "gpu"
    }


def cpu_millis_between(before: Measure | None, now: Measure) -> int | None:
    """Return how many thousandths of a core it used on average from one measure to the next."""
    if before is None or before.cpu_ns is None or now.cpu_ns is None:
        return None
    span_ms = now.at_ms - before.at_ms
    # Less than before: its processes were counted another way, such as after a restart.
    if span_ms <= 0 or now.cpu_ns < before.cpu_ns:
        return None
    return _bounded((now.cpu_ns - before.cpu_ns) // (span_ms * 1000))


class UsageOfRun:
    """The newest figures of one run."""

    def __init__(self) -> None:
        self.peak_memory_bytes: int | None = None
        self._measure: Measure | None = None
        self._cpu_millis: int | None = None
        self._disk: tuple[int, int] | None = None
        """bytes, and when"""

    def measured(self, measure: Measure) -> None:
        """Take what the runner measured."""
        self._cpu_millis = cpu_millis_between(self._measure, measure)
        self._measure = measure
        for seen in (measure.memory_bytes, measure.peak_memory_bytes):
            if seen is not None:
                self.peak_memory_bytes = max(seen, self.peak_memory_bytes or 0)

    def disk_used(self, used_bytes: int, at_ms: int) -> None:
        """Take what its folders hold."""
        self._disk = (used_bytes, at_ms)

    def told(
        self,
        now_ms: int,
        *,
        memory_limit_bytes: int,
        disk_limit_bytes: int,
        device_ids: Iterable[str],
        devices: Mapping[str, DeviceMeasure],
    ) -> RunUsage | None:
        """Return the figures for the heartbeat; None where nothing was measured yet."""
        gpus = {id: devices[id] for id in device_ids if id in devices}
        seen_ms = [gpu.at_ms for gpu in gpus.values()]
        seen_ms += [self._measure.at_ms] if self._measure else []
        seen_ms += [self._disk[1]] if self._disk else []
        if not seen_ms:
            return None
        measure = self._measure or Measure(now_ms)
        return RunUsage(
            age_ms=_bounded(now_ms - min(seen_ms)),
            cpu_millis=self._cpu_millis,
            memory_bytes=_told(measure.memory_bytes),
            peak_memory_bytes=_told(self.peak_memory_bytes),
            memory_limit_bytes=_told(memory_limit_bytes),
            disk_bytes=_told(self._disk[0] if self._disk else None),
            disk_limit_bytes=_told(disk_limit_bytes),
            devices=tuple(
                DeviceUsage(
                    id=id,
                    utilization_percent=_percent(gpu.utilization_percent),
                    memory_used_bytes=_told(gpu.memory_used_bytes),
                    memory_bytes=_told(gpu.memory_bytes) or None,
                )
                for id, gpu in gpus.items()
            ),
        )


def disk_limit_text(used_bytes: int, limit_bytes: int) -> str:
    """Return what is said of a run that wrote more than it asked for."""
    return f"{format_bytes(used_bytes)} were on disk, {format_bytes(limit_bytes)} were asked for"


def memory_limit_text(peak_bytes: int | None, limit_bytes: int) -> str:
    """Return what is said of a run that was ended for want of memory: then all that it asked for
    was in use, whatever the last look had seen."""
    peak = max(peak_bytes or 0, limit_bytes)
    return f"{format_bytes(peak)} were in use at the peak, {format_bytes(limit_bytes)} asked for"


def _told(value: int | None) -> int | None:
    return None if value is None else _bounded(value)


def _bounded(value: int) -> int:
    return min(max(0, value), MAX_INTEGER)


def _percent(value: int | None) -> int | None:
    return None if value is None else min(max(0, value), MAX_UTILIZATION_PERCENT)
