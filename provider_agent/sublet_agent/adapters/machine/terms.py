"""From command line and machine to terms: which runner, which devices, what each brings along."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import platformdirs

from sublet_agent.adapters.machine.host import HostFacts, read_host
from sublet_agent.adapters.machine.nvml import Gpu, GpuProbe, probe
from sublet_agent.adapters.options import Options, UsageError
from sublet_agent.core.offers import Terms
from sublet_agent.core.runner_port import Runner, RunnerUnavailable
from sublet_contracts.documents import Device
from sublet_contracts.keys import KeyRefused, SigningKey, short

_RESERVED_DISK_BYTES = 2 * 1024**3
_RESERVED_MEMORY_PERCENT = 10


def choose_runner(options: Options, owner: str, say: Callable[[str], None]) -> Runner:
    """Return the runner that was asked for; `auto`: Docker where an engine answers, else processes.

    Raises UsageError.
    """
    from sublet_agent.adapters.process.runner import ProcessRunner

    if options.runner in ("docker", "auto"):
        try:
            from sublet_agent.adapters.docker.runner import DockerRunner

            docker = DockerRunner(owner, allow_egress=options.allow_egress)
            docker.check()
            say("runner: docker (an engine answers; jobs are isolated)")
            return docker
        except (RunnerUnavailable, ImportError) as error:
            if options.runner == "docker":
                raise UsageError(f"--runner docker: {error}") from error
            say(f"runner: process, because Docker can't be used: {error}")
    process = ProcessRunner(owner, options.state / "engine")
    try:
        process.check()
    except RunnerUnavailable as error:
        raise UsageError(f"--runner process: {error}") from error
    say("warning: the process runner isolates nothing; only trusted renters' jobs run here")
    return process


def trusted(options: Options, runner: Runner, say: Callable[[str], None]) -> tuple[str, ...]:
    """Return the renters served; () is everybody. Raises UsageError."""
    if options.trust or runner.name == "docker":
        return options.trust
    key = own_renter_key()
    if key.is_file():
        try:
            party = SigningKey.load_or_create(key).party
        except KeyRefused as error:
            raise UsageError(f"--trust: {error}") from error
        say(f"serving your own jobs only ({short(party)}); --trust PARTY admits others")
        return (party,)
    raise UsageError(
        "the process runner isolates nothing, so the offer must name its renters: pass --trust "
        f"PARTY (`sublet balance` shows a renter's party id), or make your own key ({key}) by "
        "running any `sublet` command, or install Docker"
    )


def own_renter_key() -> Path:
    """Return where this user's own renter key is, if it exists: that of the active profile."""
    profile = os.environ.get("SUBLET_PROFILE") or "default"
    return Path(platformdirs.user_config_dir("sublet")) / "profiles" / profile / "key"


def make_terms(
    options: Options, runner: Runner, accepts: tuple[str, ...], say: Callable[[str], None]
) -> Terms:
    """Return what is offered. Raises UsageError where there is nothing to offer."""
    host = read_host(options.state)
    devices = _devices(options, host, say)
    share = max(1, len(devices))
    memory = options.memory_bytes or host.memory_bytes * (100 - _RESERVED_MEMORY_PERCENT) // 100
    disk = options.disk_bytes or max(0, host.disk_free_bytes - _RESERVED_DISK_BYTES)
    if memory > host.memory_bytes:
        raise UsageError(f"--memory: this machine has {host.memory_bytes} bytes")
    return Terms(
        name=options.name,
        devices=devices,
        price_ucr_per_device_hour=options.price_ucr,
        cpu_millis=host.cpu_count * 1000 // share,
        memory_bytes=memory // share,
        disk_bytes=disk // share,
        region=options.region,
        runner=runner.name,
        image_policy=options.image_policy,
        egress=options.allow_egress,
        accepts=accepts,
        grace_ms=options.grace_ms,
    )


def _devices(options: Options, host: HostFacts, say: Callable[[str], None]) -> tuple[Device, ...]:
    if options.cpu:
        memory = options.memory_bytes or host.memory_bytes
        return (
            Device(
                id="cpu",
                kind="cpu",
                name=host.cpu_name[:256],
                memory_bytes=memory,
                hardware_class=_label(host.hardware_class),
            ),
        )
    if options.devices == ("none",):
        say("--devices none: nothing is offered; runs that are there go on")
        return ()
    found = probe()
    for reason in found.reasons:
        say(reason)
    return tuple(device_of(gpu) for gpu in choose_gpus(found, options.devices))


def choose_gpus(found: GpuProbe, wanted: Sequence[str]) -> list[Gpu]:
    """Return the GPUs that the owner names, by uuid or by number from 0, in the driver's order;
    ("all",): every one. Raises UsageError: one of them isn't here, or there is none at all."""
    gpus = list(found.gpus)
    if tuple(wanted) != ("all",):
        known = {gpu.uuid for gpu in gpus} | {str(number) for number in range(len(gpus))}
        missing = [name for name in wanted if name not in known]
        if missing:
            raise UsageError(
                f"--devices: no GPU {missing[0]} here; there are: "
                + (", ".join(f"{n} ({g.uuid})" for n, g in enumerate(gpus)) or "none")
            )
        gpus = [g for n, g in enumerate(gpus) if g.uuid in wanted or str(n) in wanted]
    if not gpus:
        why = found.reasons[0] if found.reasons else "none was found"
        raise UsageError(f"no GPU to offer ({why}); pass --cpu to offer this machine's CPU instead")
    return gpus


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
