"""Looks at this machine, again and again: which of the devices that the owner offers are there,
what they are, and what memory, disk and cores there are beside them. Every look ends in time.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from dataclasses import replace as with_changes

from sublet_agent.adapters.machine.gpu_helper import FIRST_LIMIT_S, GpuHelper
from sublet_agent.adapters.machine.host import HostFacts, read_host
from sublet_agent.adapters.machine.nvml import Fault, Gpu, GpuProbe
from sublet_agent.adapters.options import Options, UsageError
from sublet_agent.adapters.workspace.folders import usage
from sublet_agent.core.runner_port import CPU_DEVICE, Runner, RunnerError
from sublet_agent.core.supply import DeviceSeen, Facts, Missing, in_all
from sublet_contracts.amounts import format_bytes
from sublet_contracts.documents import Device

LIMIT_S = 2.0
"""for an answer of the driver, and of the engine"""
LOOKER_NAME = "sublet-agent-look"


@dataclass(frozen=True)
class Look:
    """What was seen, and what the driver recorded of devices since the look before."""

    facts: Facts
    faults: tuple[Fault, ...] = ()


@dataclass
class Chosen:
    """Which GPUs belong to the offer. A number stands for the GPU that bore it first: while the
    agent runs, numbers don't move on to another card when one is lost."""

    wanted: tuple[str, ...]
    """uuids, or numbers as NVML gives them: N for a GPU (in MIG mode: all its instances), N:M for
    one instance; or `all`"""
    _bound: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _known: dict[str, int] = field(default_factory=dict)
    """uuid -> index of every GPU that was ever seen"""

    def of(self, found: GpuProbe) -> list[Gpu]:
        """Return those that are there now."""
        self._known.update((gpu.uuid, gpu.index) for gpu in found.gpus)
        if self.wanted == ("all",):
            self._bound["all"] = tuple(self._known)
        for name in self.wanted:
            named = tuple(gpu.uuid for gpu in found.gpus if _is_called(gpu, name))
            if named and name not in self._bound:
                self._bound[name] = named
        belongs = {uuid for uuids in self._bound.values() for uuid in uuids}
        return [gpu for gpu in found.gpus if gpu.uuid in belongs]

    def missing(self, found: GpuProbe) -> tuple[Missing, ...]:
        """Return those that belong to the offer and are not there now, and why."""
        there = {gpu.uuid for gpu in found.gpus}
        belongs = dict.fromkeys(uuid for uuids in self._bound.values() for uuid in uuids)
        gone = [self._missing(uuid, found) for uuid in belongs if uuid not in there]
        if self.wanted == ("all",):
            known = {*self._known.values()}
            gone += [
                Missing(f"GPU {one.index}", one.says, None)
                for one in found.unreadable
                if one.index not in known
            ]
        else:
            gone += [
                Missing(name if "-" in name else f"GPU {name}", "it can't be read", None)
                for name in self.wanted
                if name not in self._bound
            ]
        return tuple({one.id: one for one in gone}.values())

    def _missing(self, uuid: str, found: GpuProbe) -> Missing:
        if found.trouble:
            return Missing(uuid, found.trouble, found.certain_after_ms)
        for one in found.unreadable:
            if one.uuid == uuid or (one.uuid is None and one.index == self._known.get(uuid)):
                return Missing(uuid, one.says, one.certain_after_ms)
        return Missing(uuid, "the driver no longer lists it")

    def check(self, found: GpuProbe) -> None:
        """Raise UsageError where something is named that can't be here, or nothing is there."""
        unreadable = {str(one.index) for one in found.unreadable}
        for name in self.wanted if self.wanted != ("all",) else ():
            # The uuid of a GPU that can't be read may be any; its number is known.
            may_be = bool(unreadable) if "-" in name else name.split(":")[0] in unreadable
            if not any(_is_called(gpu, name) for gpu in found.gpus) and not may_be:
                there = ", ".join(f"{gpu.number} ({gpu.uuid})" for gpu in found.gpus)
                raise UsageError(f"--devices: no GPU {name} here; there are: {there or 'none'}")
        if not self.of(found):
            why = found.reasons[0] if found.reasons else "none was found"
            raise UsageError(
                f"no GPU to offer ({why}); pass --cpu to offer this machine's CPU instead"
            )


def _is_called(gpu: Gpu, name: str) -> bool:
    return name in (gpu.uuid, gpu.parent_uuid, gpu.number, str(gpu.index))


class Machine:
    """This machine, as the owner offers it. `first`, then `look`, by one thread at a time."""

    def __init__(
        self, options: Options, runner: Runner, kept_bytes: Callable[[], int] = lambda: 0
    ) -> None:
        """`kept_bytes`: what is kept for nobody yet, and let go when there is need."""
        self._options = options
        self._kept_bytes = kept_bytes
        self._runner = runner
        self._chosen = Chosen(options.devices)
        self._helper = GpuHelper()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=LOOKER_NAME)
        self._engine_asked: Future[int] | None = None
        self._images_bytes = 0
        """what renters' images hold of the state folder's disk, as the engine said last"""

    def first(self, say: Callable[[str], None]) -> Facts:
        """Look for the first time. Raises UsageError where what was asked for is not there."""
        options = self._options
        host = read_host(options.state)
        if options.memory_bytes > host.memory_bytes:
            raise UsageError(
                f"--memory: this machine has {format_bytes(host.memory_bytes)}, and "
                f"{format_bytes(options.memory_bytes)} are asked for: offer less"
            )
        with contextlib.suppress(RunnerError):  # that it is silent is seen by the next look
            self._images_bytes = self._runner.images_hold_bytes(options.state)
        disk_bytes = host.disk_free_bytes + self._images_bytes + self._kept_bytes()
        if options.disk_bytes > disk_bytes:
            # What our own runs hold of it is there as well.
            folders = [options.state / "runs", options.state / "prepared"]
            disk_bytes += usage(folders, options.disk_bytes)
        if options.disk_bytes > disk_bytes:
            raise UsageError(
                f"--disk: the disk of {options.state} has {format_bytes(disk_bytes)} free, and "
                f"{format_bytes(options.disk_bytes)} are asked for: offer less, or put the state "
                "folder on another disk with --state"
            )
        if options.devices == ("none",):
            say("--devices none: nothing is offered; runs that are there go on")
        if options.cpu or options.devices == ("none",):
            return self._facts(host, GpuProbe((), ()), "")
        found = self._helper.look(FIRST_LIMIT_S)
        for reason in found.reasons:
            say(reason)
        self._chosen.check(found)
        facts = self._facts(host, found, "")
        for seen in facts.devices:
            if seen.shares_main_memory:
                memory = in_all(options.memory_bytes, facts) // len(facts.devices)
                say(
                    f"{seen.device.id} has no memory of its own and uses the machine's: "
                    f"{format_bytes(memory)} are offered as both"
                )
        return facts

    def look(self) -> Look:
        """Look again. Takes LIMIT_S and a little at most."""
        if self._engine_asked is None:
            self._engine_asked = self._threads.submit(self._ask_engine)
        if self._options.cpu or self._options.devices == ("none",):
            found = GpuProbe((), ())
        else:
            found = self._helper.look(LIMIT_S)
        facts = self._facts(read_host(self._options.state), found, self._engine_trouble())
        return Look(facts, found.faults)

    def close(self) -> None:
        """Let go of the helper; what hangs is left behind."""
        self._helper.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _engine_trouble(self) -> str:
        """Return what the runner says, and ask it again only once it has answered."""
        asked = self._engine_asked
        if asked is None:
            return ""
        try:
            error = asked.exception(LIMIT_S)
        except TimeoutError:
            return f"no answer within {LIMIT_S:g} s"
        self._engine_asked = None
        if error is not None:
            return str(error) or type(error).__name__
        self._images_bytes = asked.result()
        return ""

    def _ask_engine(self) -> int:
        self._runner.check()
        return self._runner.images_hold_bytes(self._options.state)

    def _facts(self, host: HostFacts, found: GpuProbe, engine: str) -> Facts:
        facts = Facts(
            devices=(),
            cpu_millis=host.cpu_count * 1000,
            memory_bytes=host.memory_bytes,
            memory_free_bytes=host.memory_free_bytes,
            disk_free_bytes=host.disk_free_bytes + self._images_bytes + self._kept_bytes(),
            engine=engine,
        )
        if self._options.devices == ("none",):
            return facts
        if self._options.cpu:
            return with_changes(facts, devices=(_cpu(host),))
        seen = [
            DeviceSeen(
                device_of(gpu),
                gpu.used_bytes,
                shares_main_memory=gpu.memory_bytes is None,
                utilization_percent=gpu.utilization_percent,
            )
            for gpu in self._chosen.of(found)
        ]
        return with_changes(
            facts,
            devices=tuple(seen),
            missing=self._chosen.missing(found),
            answering=frozenset(gpu.uuid for gpu in found.gpus),
        )


def choose_gpus(found: GpuProbe, wanted: Sequence[str]) -> list[Gpu]:
    """Return the GPUs that the owner names. Raises UsageError as `Chosen.check` does."""
    chosen = Chosen(tuple(wanted))
    chosen.check(found)
    return chosen.of(found)


def _cpu(host: HostFacts) -> DeviceSeen:
    device = Device(
        id=CPU_DEVICE,
        kind="cpu",
        name=host.cpu_name[:256],
        memory_bytes=host.memory_bytes,
        hardware_class=_label(host.hardware_class),
    )
    return DeviceSeen(device, shares_main_memory=True)


def device_of(gpu: Gpu) -> Device:
    """Return a GPU as an offer names it; what the driver doesn't tell is left open."""
    return Device(
        id=gpu.uuid,
        kind="gpu",
        name=gpu.name[:256],
        memory_bytes=gpu.memory_bytes or 0,
        hardware_class=_label(gpu.hardware_class),
        compute_capability=gpu.compute_capability,
        driver=gpu.driver,
        ecc=gpu.ecc,
        mig=gpu.mig,
        pcie_generation=gpu.pcie_generation,
        pcie_lanes=gpu.pcie_lanes,
        power_limit_mw=gpu.power_limit_mw,
    )


def _label(text: str) -> str:
    """Return a class as documents write it: small letters, digits, '.' and '-'."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:64]
