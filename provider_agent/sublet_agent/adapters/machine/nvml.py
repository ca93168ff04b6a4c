"""What GPUs this machine has and how they are, as NVIDIA's own library tells it.

Every single fact may be missing: a field that the driver does not tell is None, a GPU that can't be
read is listed with a reason, and a machine without the library has no GPUs, with a reason. A call
may hang on a GPU that is lost: only `gpu_helper.py` calls this while an agent runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

from sublet_agent.adapters.machine.host import gpu_class
from sublet_agent.core.device_faults import says_of_xid

T = TypeVar("T")

DOUBTFUL_MS = 60_000
"""for so long a GPU may give no clear answer before what runs on it is held to have lost it"""
_LOST = frozenset(
    {
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_RESET_REQUIRED,
        pynvml.NVML_ERROR_GPU_NOT_FOUND,
    }
)
"""The driver's word that this very GPU is gone."""
_UNUSABLE = _LOST | {
    pynvml.NVML_ERROR_UNINITIALIZED,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_IRQ_ISSUE,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    pynvml.NVML_ERROR_UNKNOWN,
}
"""Answers to any question after which a GPU is not to be offered; the others mean only that this
one fact can't be had."""
_SERVES_ON = frozenset(
    {
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)
"""Troubles of the library, such as after an upgrade: what runs may well go on."""
_MOST_EVENTS = 256
_REINIT_S = 300.0
"""so often the library is set up anew: it doesn't see GPUs that came since"""
_REINIT_IN_TROUBLE_S = 10.0
_NO_INSTANCE = 0xFFFFFFFF
_RECOVERY = {1: "a reset", 2: "a reboot", 4: "a reset", 6: "a reset", 7: "a reboot"}


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG instance of a GPU in that mode (then `parent_uuid` is the GPU's)."""

    uuid: str
    name: str
    hardware_class: str
    memory_bytes: int | None  # None: it has none of its own, and uses the machine's
    compute_capability: str | None  # "major.minor"
    driver: str | None
    ecc: bool | None
    mig: bool | None
    pcie_generation: int | None
    pcie_lanes: int | None
    power_limit_mw: int | None
    parent_uuid: str | None = None
    index: int = 0  # NVML's, of the whole GPU: what `--devices N` means
    instance: int | None = None  # NVML's number of the MIG instance
    used_bytes: int = 0  # of its memory, by anybody
    utilization_percent: int | None = None  # of a GPU as a whole; of a MIG instance it isn't told

    @property
    def number(self) -> str:
        """What the owner may call it."""
        return str(self.index) if self.instance is None else f"{self.index}:{self.instance}"


@dataclass(frozen=True)
class Unreadable:
    """A GPU that is listed and can't be offered. `certain_after_ms`: as in core/supply.py."""

    index: int
    uuid: str | None
    says: str
    certain_after_ms: int | None


@dataclass(frozen=True)
class Fault:
    """What the driver recorded of a GPU, or MIG instance, since the look before."""

    uuid: str
    says: str


@dataclass(frozen=True)
class GpuProbe:
    """What was found, and a line for each thing that could not be read."""

    gpus: tuple[Gpu, ...]
    reasons: tuple[str, ...]
    unreadable: tuple[Unreadable, ...] = ()
    faults: tuple[Fault, ...] = ()
    count: int = 0
    trouble: str = ""
    """why nothing at all can be said; '' if something can"""
    certain_after_ms: int | None = None


def probe() -> GpuProbe:
    """Ask the driver once. Never raises for a machine without GPUs, driver or library."""
    reader = Reader()
    try:
        return reader.look()
    finally:
        reader.close()


class Reader:
    """Looks again and again. The library stays set up in between: that costs a second for each GPU
    where nothing else holds the driver, and fault records are kept only for who has asked."""

    def __init__(self) -> None:
        self._set_up_s: float | None = None
        self._events: Any = None
        self._uncorrected: dict[str, int] = {}
        self._uuids: dict[int | None, str] = {}
        """by the library's handle: a GPU that is lost no longer says who it is"""
        self._in_trouble = False

    def look(self) -> GpuProbe:
        """Say what there is now."""
        limit_s = _REINIT_IN_TROUBLE_S if self._in_trouble else _REINIT_S
        if self._set_up_s is not None and time.monotonic() - self._set_up_s > limit_s:
            self.close()
        try:
            if self._set_up_s is None:
                pynvml.nvmlInit()
                self._set_up_s = time.monotonic()
                self._events = None
            found = self._probe()
        except pynvml.NVMLError as error:
            self.close()
            says = f"no NVIDIA GPU: {error}"
            after_ms = None if error.value in _SERVES_ON else DOUBTFUL_MS
            return GpuProbe((), (says,), trouble=str(error), certain_after_ms=after_ms)
        self._in_trouble = bool(found.unreadable)
        return found

    def close(self) -> None:
        """Let go of the library."""
        if self._set_up_s is not None:
            self._set_up_s = self._events = None
            self._uuids.clear()
            with contextlib.suppress(pynvml.NVMLError):  # it is of no use any more
                pynvml.nvmlShutdown()

    def _probe(self) -> GpuProbe:
        gpus: list[Gpu] = []
        reasons: list[str] = []
        unreadable: list[Unreadable] = []
        faults: list[Fault] = []
        driver = _ask(pynvml.nvmlSystemGetDriverVersion)
        count = pynvml.nvmlDeviceGetCount()
        for index in range(count):
            uuid = None
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                uuid = str(pynvml.nvmlDeviceGetUUID(handle))  # without it a GPU can't be leased
                self._register(handle, uuid)
                gpu = _read(handle, uuid, index, driver)
                found = _instances(handle, gpu) if gpu.mig else [gpu]
                ill = _illness(handle)
                faults += self._new_errors(handle, uuid, found)
            except pynvml.NVMLError as error:
                reasons.append(f"GPU {index} can't be read: {error}")
                after_ms = 0 if error.value in _LOST else DOUBTFUL_MS
                unreadable.append(Unreadable(index, uuid, str(error), after_ms))
                continue
            if ill:
                reasons.append(f"GPU {index} is not offered: {ill}")
                unreadable += [Unreadable(index, one.uuid, ill, None) for one in found]
                continue
            gpus += found
            if not found:
                reasons.append(
                    f"GPU {index} is in MIG mode and has no instance: make one with nvidia-smi"
                )
        faults += self._new_events(gpus)
        return GpuProbe(tuple(gpus), tuple(reasons), tuple(unreadable), tuple(faults), int(count))

    def _new_errors(self, handle: object, uuid: str, parts: list[Gpu]) -> list[Fault]:
        """Return a fault if memory errors that can't be corrected have been added since."""
        counted = _ask(
            lambda: int(
                pynvml.nvmlDeviceGetTotalEccErrors(
                    handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
                )
            )
        )
        before = self._uncorrected.get(uuid)
        if counted is not None:
            self._uncorrected[uuid] = counted
        if counted is None or before is None or counted <= before:
            return []
        says = f"its memory has {counted - before} more errors that can't be corrected"
        return [Fault(part.uuid, says) for part in parts]

    def _new_events(self, gpus: list[Gpu]) -> list[Fault]:
        """Return what the driver recorded since the look before, where it tells."""
        found: list[Fault] = []
        for _ in range(_MOST_EVENTS if self._events is not None else 0):
            try:
                event = pynvml.nvmlEventSetWait_v2(self._events, 0)
            except pynvml.NVMLError:
                break  # there is none, or its GPU is lost, which is seen by itself
            says = (
                "its memory has an error that can't be corrected"
                if event.eventType == pynvml.nvmlEventTypeDoubleBitEccError
                else says_of_xid(int(event.eventData))
            )
            uuid = self._uuids.get(_address(event.device))
            if says and uuid:
                parts = [gpu.uuid for gpu in gpus if uuid in (gpu.uuid, gpu.parent_uuid)]
                found += [Fault(part, says) for part in parts or [uuid]]
        return found

    def _register(self, handle: object, uuid: str) -> None:
        """Have the driver keep its records of this GPU for us, once, where it can."""
        if _address(handle) in self._uuids:
            return
        self._uuids[_address(handle)] = uuid
        if self._events is None:
            self._events = _ask(pynvml.nvmlEventSetCreate)
        kinds = pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventTypeDoubleBitEccError
        kinds &= _ask(lambda: int(pynvml.nvmlDeviceGetSupportedEventTypes(handle))) or 0
        if kinds and self._events is not None:
            _ask(lambda: pynvml.nvmlDeviceRegisterEvents(handle, kinds, self._events))


def _address(handle: object) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value  # type: ignore[arg-type]


def _read(handle: object, uuid: str, index: int, driver: str | None) -> Gpu:
    name = _ask(lambda: str(pynvml.nvmlDeviceGetName(handle))) or "NVIDIA GPU"
    memory, used = _memory(handle)
    capability = _ask(lambda: pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    return Gpu(
        uuid=uuid,
        name=name,
        hardware_class=gpu_class(name, memory),
        memory_bytes=memory,
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        driver=driver,
        ecc=_ask(lambda: bool(pynvml.nvmlDeviceGetEccMode(handle)[0])),
        mig=_ask(lambda: bool(pynvml.nvmlDeviceGetMigMode(handle)[0])),
        pcie_generation=_ask(lambda: int(pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle))),
        pcie_lanes=_ask(lambda: int(pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle))),
        power_limit_mw=_ask(lambda: int(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle))),
        index=index,
        used_bytes=used,
        utilization_percent=_ask(lambda: int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
    )


def _memory(handle: object) -> tuple[int | None, int]:
    """Return all of a GPU's memory and what is used of it. What the driver keeps for itself counts
    as used only where it can't tell the two apart."""
    exact = _ask(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2))
    told = exact or _ask(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    return (None, 0) if told is None else (int(told.total), int(told.used))


def _instances(handle: object, gpu: Gpu) -> list[Gpu]:
    found = []
    for place in range(_ask(lambda: int(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle))) or 0):
        instance = _ask(lambda i=place: pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i))  # type: ignore[misc]
        if instance is None:
            continue  # not every place holds one
        uuid = _ask(lambda i=instance: str(pynvml.nvmlDeviceGetUUID(i)))  # type: ignore[misc]
        if uuid is None:
            continue
        memory, used = _memory(instance)
        name = _ask(lambda i=instance: str(pynvml.nvmlDeviceGetName(i))) or f"{gpu.name} MIG"  # type: ignore[misc]
        found.append(
            Gpu(
                uuid=uuid,
                name=name,
                hardware_class=gpu_class(name, memory),
                memory_bytes=memory,
                compute_capability=gpu.compute_capability,
                driver=gpu.driver,
                ecc=gpu.ecc,
                mig=True,
                pcie_generation=gpu.pcie_generation,
                pcie_lanes=gpu.pcie_lanes,
                power_limit_mw=None,
                parent_uuid=gpu.uuid,
                index=gpu.index,
                instance=place,
                used_bytes=used,
            )
        )
    return found


def _illness(handle: object) -> str:
    """Return why a GPU that answers is not fit to be offered, by the driver's own judgement."""
    action = _ask(lambda: _field(handle, pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION)) or 0
    if action in _RECOVERY:
        return f"the driver says that it needs {_RECOVERY[action]}"
    rows = _ask(lambda: pynvml.nvmlDeviceGetRemappedRows(handle))
    if rows is not None and rows[3]:
        return "the driver says that its memory is worn out (row remapping has failed)"
    return ""


def _field(handle: object, number: int) -> int | None:
    [value] = pynvml.nvmlDeviceGetFieldValues(handle, [number])
    return int(value.value.uiVal) if value.nvmlReturn == pynvml.NVML_SUCCESS else None


def _ask(question: Callable[[], T]) -> T | None:
    """Return the answer; None: this fact can't be had. Raises NVMLError where the GPU can't be used
    at all."""
    try:
        return question()
    except pynvml.NVMLError as error:  # not supported, no permission, function not in this driver
        if error.value in _UNUSABLE:
            raise
        return None
