"""What GPUs this machine has, as NVIDIA's own library tells it.

Every single fact may be missing: a field that the driver does not tell is None, a GPU that can't be
read is left out with a reason, and a machine without the library has no GPUs, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pynvml

from sublet_agent.adapters.machine.host import gpu_class

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG instance of a GPU in that mode (then `parent_uuid` is the GPU's)."""

    uuid: str
    name: str
    hardware_class: str
    memory_bytes: int | None
    compute_capability: str | None  # "major.minor"
    driver: str | None
    ecc: bool | None
    mig: bool | None
    pcie_generation: int | None
    pcie_lanes: int | None
    power_limit_mw: int | None
    parent_uuid: str | None = None


@dataclass(frozen=True)
class GpuProbe:
    """What was found, and a line for each thing that could not be read."""

    gpus: tuple[Gpu, ...]
    reasons: tuple[str, ...]


def probe() -> GpuProbe:
    """Ask the driver. Never raises for a machine without GPUs, driver or library."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuProbe((), (f"no NVIDIA GPU: {error}",))
    try:
        return _probe()
    finally:
        pynvml.nvmlShutdown()


def _probe() -> GpuProbe:
    gpus: list[Gpu] = []
    reasons: list[str] = []
    driver = _ask(pynvml.nvmlSystemGetDriverVersion)
    try:
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return GpuProbe((), (f"the driver does not say how many GPUs there are: {error}",))
    for index in range(count):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            gpu = _read(handle, driver)
        except pynvml.NVMLError as error:
            reasons.append(f"GPU {index} can't be read: {error}")
            continue
        if not gpu.mig:
            gpus.append(gpu)
            continue
        instances = _instances(handle, gpu)
        gpus += instances
        if not instances:
            reasons.append(
                f"GPU {index} is in MIG mode and has no instance: make one with nvidia-smi"
            )
    return GpuProbe(tuple(gpus), tuple(reasons))


def _read(handle: object, driver: str | None) -> Gpu:
    name = _ask(lambda: str(pynvml.nvmlDeviceGetName(handle))) or "NVIDIA GPU"
    memory = _ask(lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
    capability = _ask(lambda: pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    return Gpu(
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),  # without it a GPU can't be leased
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
    )


def _instances(handle: object, gpu: Gpu) -> list[Gpu]:
    found = []
    for index in range(_ask(lambda: int(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle))) or 0):
        instance = _ask(lambda i=index: pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i))  # type: ignore[misc]
        if instance is None:
            continue  # not every place holds one
        uuid = _ask(lambda i=instance: str(pynvml.nvmlDeviceGetUUID(i)))  # type: ignore[misc]
        if uuid is None:
            continue
        memory = _ask(lambda i=instance: int(pynvml.nvmlDeviceGetMemoryInfo(i).total))  # type: ignore[misc]
        name = _ask(lambda i=instance: str(pynvml.nvmlDeviceGetName(i))) or f"{gpu.name} MIG"  # type: ignore[misc]
        found.append(
            Gpu(
                uuid,
                name,
                gpu_class(name, memory),
                memory,
                gpu.compute_capability,
                gpu.driver,
                gpu.ecc,
                True,
                gpu.pcie_generation,
                gpu.pcie_lanes,
                None,
                gpu.uuid,
            )
        )
    return found


def _ask(question: Callable[[], T]) -> T | None:
    try:
        return question()
    except pynvml.NVMLError:  # not supported, no permission, function not in this driver
        return None
