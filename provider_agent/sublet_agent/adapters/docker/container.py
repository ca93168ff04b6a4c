"""What a job's container is created with. Pure: from the run and its image to the engine's words.

What holds a stranger's job: no capabilities and none to gain, a system call list of our own, a
read-only root, a user that is not root, no network, and limits on memory (swap included),
processes, cpu, log and files. `in/` and `ack/` lie read-only over the checkpoint folder, so that a
job can't put a link where the agent will write. What a kernel bug allows, this does not stop.

What it gives: the image's own variables and working folder, with folders of the run's own at
WORKDIR, HOME and /tmp (core/layout.py); a user that has a name; a host name that is known. What
the image sets is kept and added to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker.types import DeviceRequest, LogConfig, Mount, Ulimit

from sublet_agent.adapters.docker import seccomp
from sublet_agent.core import cores, runner_port
from sublet_agent.core.layout import RunFolders
from sublet_agent.core.runner_port import RunSpec

LABEL = "sublet"
CORES = f"{LABEL}.cores"
"""the label that says to which cores a run is kept"""
HOST_NAME = "job"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""what the engine sets where the image sets none"""
_LOG_FILES = 2
_OPEN_FILES = 16384  # under the hard limit that any engine itself runs with
_MAX_SHM_BYTES = 8 * 1024**3


@dataclass(frozen=True)
class ImageConfig:
    """What an image says of how it is run."""

    env: Mapping[str, str]
    volumes: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""

    @classmethod
    def of(cls, shown: Mapping[str, Any]) -> ImageConfig:
        """Read the engine's answer about an image."""
        config = shown.get("Config") or {}
        env = (str(pair).partition("=") for pair in config.get("Env") or ())
        return cls(
            env={name: value for name, _, value in env},
            volumes=tuple(map(str, config.get("Volumes") or ())),
            working_dir=str(config.get("WorkingDir") or ""),
            user=str(config.get("User") or ""),
        )


@dataclass(frozen=True)
class Host:
    """What of the machine and its owner decides how a container is created."""

    owner: str
    user: tuple[int, int]
    log_bytes: int
    volume_bytes: int
    """of each volume that an image declares"""
    network: str
    device_requests: tuple[DeviceRequest, ...] = ()
    unmapped: bool = False
    """whether the engine maps users: then the job runs without that"""
    cpu_count: int = 1
    cores: tuple[int, ...] = ()
    """to which the run is kept; none: it may use all"""
    told_by: tuple[tuple[str, Path], ...] = ()
    """files of /proc and /sys that tell the limits instead of the machine, and where they are"""


def arguments(spec: RunSpec, image: ImageConfig, host: Host) -> dict[str, Any]:
    """Return the arguments of the engine's `create_container` beside image and host config."""
    return {
        "command": list(spec.command) or None,
        "hostname": HOST_NAME,
        "user": f"{host.user[0]}:{host.user[1]}",
        "working_dir": spec.layout.work_path,
        "environment": environment(spec, image),
        "labels": {
            f"{LABEL}.owner": host.owner,
            f"{LABEL}.run": spec.run_id,
            f"{LABEL}.job": spec.job_id,
            f"{LABEL}.lease": spec.lease_id,
            f"{LABEL}.epoch": str(spec.epoch),
            f"{LABEL}.checkpoint_dir": str(spec.checkpoint_dir),
            CORES: cores.to_text(host.cores),
        },
        "healthcheck": {"test": ["NONE"]},
    }


def environment(spec: RunSpec, image: ImageConfig) -> dict[str, str]:
    """Return the job's variables, as they are given beside the image's."""
    home, user = spec.layout.home_path, spec.layout.user_name
    env = {
        "USER": image.env.get("USER", user),
        "LOGNAME": image.env.get("LOGNAME", user),
        # What `pip install --user` brings along is found, after all that the image has.
        "PATH": f"{image.env.get('PATH') or DEFAULT_PATH}:{home}/.local/bin",
    }
    if has_cache(spec):
        named = runner_port.cache_variables(
            runner_port.CACHE_PATH, has_caches=spec.layout.has_caches
        )
        env |= {name: path for name, path in named.items() if name not in image.env}
    env |= runner_port.job_environment(
        spec,
        checkpoint=runner_port.CHECKPOINT_PATH,
        inputs=runner_port.INPUTS_PATH,
        helper=runner_port.HELPER_PATH,
        outputs=spec.outputs_path,
        image=image.env,
    )
    # Where the job names another, that has become the home.
    return {**env, "HOME": home}


def host_config(spec: RunSpec, image: ImageConfig, host: Host) -> dict[str, Any]:
    """Return the arguments of the engine's `create_host_config`."""
    memory = spec.memory_bytes
    mounted = mounts(spec)
    mounted += [_bind(path, source, True) for path, source in host.told_by]
    taken = {mount["Target"] for mount in mounted}
    volume = f"rw,nosuid,nodev,mode=1777,size={min(host.volume_bytes, spec.disk_bytes)}"
    return {
        "init": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges", f"seccomp={seccomp.profile_json()}"],
        "read_only": True,
        "tmpfs": {path: volume for path in image.volumes if path not in taken},
        "mounts": mounted,
        # Counts as memory too.
        "shm_size": spec.shm_bytes or max(1024 * 1024, min(memory // 2, _MAX_SHM_BYTES)),
        "ipc_mode": "private",
        "mem_limit": memory,
        "memswap_limit": memory,  # the same: no swap
        "nano_cpus": min(spec.cpu_millis, 1000 * host.cpu_count) * 1_000_000,
        "cpuset_cpus": cores.to_text(host.cores) or None,
        "pids_limit": spec.pids,
        "oom_score_adj": 500,
        "ulimits": [
            Ulimit(name="nofile", soft=_OPEN_FILES, hard=_OPEN_FILES),
            Ulimit(name="core", soft=0, hard=0),
            Ulimit(name="fsize", soft=spec.disk_bytes, hard=spec.disk_bytes),
        ],
        "network_mode": host.network,
        "extra_hosts": {HOST_NAME: "127.0.0.1"},
        # An engine that maps users would hand the job folders that aren't its own. Without the
        # mapping all that holds a job on other engines holds it here: it is never root.
        "userns_mode": "host" if host.unmapped else None,
        # Not the engine's JSON files: those hold text, so a character that a long line was cut in
        # is lost there.
        "log_config": LogConfig(
            type="local",
            config={
                "max-size": str(host.log_bytes // _LOG_FILES),
                "max-file": str(_LOG_FILES),
                "compress": "false",
            },
        ),
        "restart_policy": {"Name": "no"},
        "device_requests": list(host.device_requests),
    }


def has_cache(spec: RunSpec) -> bool:
    """Say whether a run has its renter's caches: they belong to the usual user."""
    return spec.cache_dir is not None and not spec.user


def folders_of(spec: RunSpec) -> RunFolders:
    """Return the run's folders."""
    return RunFolders(
        spec.run_dir, spec.layout, spec.outputs_path, spec.destinations, spec.checkpoint_paths
    )


def _bind(target: str, source: Path, read_only: bool) -> Mount:
    return Mount(target, str(source), type="bind", read_only=read_only, propagation="rprivate")


def mounts(spec: RunSpec) -> list[Mount]:
    """Return what is mounted. The engine mounts what lies in another one after it."""

    own = folders_of(spec).mounts()
    if spec.outputs_path is not None and spec.outputs_dir is not None:
        own[spec.outputs_path] = spec.outputs_dir
    found = [
        _bind(runner_port.CHECKPOINT_PATH, spec.checkpoint_dir, False),
        _bind(f"{runner_port.CHECKPOINT_PATH}/in", spec.checkpoint_dir / "in", True),
        _bind(f"{runner_port.CHECKPOINT_PATH}/ack", spec.checkpoint_dir / "ack", True),
        _bind(runner_port.HELPER_PATH, spec.helper_dir, True),
        _bind(runner_port.INPUTS_PATH, spec.inputs_dir, True),
    ]
    if has_cache(spec) and spec.cache_dir is not None:
        found.append(_bind(runner_port.CACHE_PATH, spec.cache_dir, False))
    # An input that is the working folder was copied into it.
    placed = {path: host for path, host in spec.destinations.items() if path not in own}
    found += [_bind(path, host, True) for path, host in sorted(placed.items())]
    found += [_bind(path, host, False) for path, host in own.items()]
    for name in spec.layout.user_files:
        path = f"/etc/{name}"
        if path not in placed:
            found.append(_bind(path, spec.run_dir / "etc" / name, True))
    return found
