"""From command line and machine to terms: which runner, which renters, what is offered."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import platformdirs

from sublet_agent.adapters.options import Options, UsageError
from sublet_agent.core.kept_inputs import DEFAULT_SHARE
from sublet_agent.core.offers import Terms
from sublet_agent.core.runner_port import Runner, RunnerUnavailable
from sublet_agent.core.supply import Facts, Supply
from sublet_contracts.keys import KeyRefused, SigningKey, short


def choose_runner(options: Options, owner: str, say: Callable[[str], None]) -> Runner:
    """Return the runner that was asked for; `auto`: Docker where an engine answers, else processes.

    Raises UsageError.
    """
    from sublet_agent.adapters.process.runner import ProcessRunner

    if options.runner in ("docker", "auto"):
        try:
            from sublet_agent.adapters.docker.images import ImageRules
            from sublet_agent.adapters.docker.runner import DockerRunner

            docker = DockerRunner(
                owner,
                options.state,
                allow_egress=options.allow_egress,
                allow_user=options.allow_user,
                images=ImageRules(
                    options.allow_images,
                    options.allow_registries,
                    _image_cap_bytes(options),
                    max(1, options.pull_patience_ms) / 1000,
                ),
            )
            docker.check()
            say("runner: docker (an engine answers; jobs are isolated)")
            _tell_if_blind(docker, say)
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
    _tell_if_blind(process, say)
    return process


class _Witnessed(Protocol):
    def why_no_witness(self) -> str: ...


def _tell_if_blind(runner: _Witnessed, say: Callable[[str], None]) -> None:
    """Tell the owner where the kernel is silent about exits, and what that means."""
    blind = runner.why_no_witness()
    if blind:
        say(
            "a job that returns 137 or the like by itself can't be told from one that was "
            f"killed: the kernel doesn't tell this agent of exits ({blind}); it takes root "
            "or CAP_NET_ADMIN, in the machine's own pid namespace"
        )


def _image_cap_bytes(options: Options) -> int:
    """Return the most that one image may have: half of the disk, unless the owner says it."""
    disk = options.disk_bytes or shutil.disk_usage(options.state).free
    return options.image_cap_bytes or disk // 2


def cache_cap_bytes(options: Options) -> int:
    """Return the most that may be kept of renters' inputs: a share of the disk, unless the owner
    says it."""
    if options.cache_bytes is not None:
        return options.cache_bytes
    disk = options.disk_bytes or shutil.disk_usage(options.state).free
    return disk // DEFAULT_SHARE


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
    options: Options, runner: Runner, accepts: tuple[str, ...], facts: Facts, now_ms: int
) -> Terms:
    """Return what is offered by what was seen at the start."""
    terms = Terms(
        name=options.name,
        devices=(),
        price_ucr_per_device_hour=options.price_ucr,
        cpu_millis=0,
        memory_bytes=0,
        disk_bytes=0,
        region=options.region,
        runner=runner.name,
        image_policy=options.image_policy,
        egress=options.allow_egress,
        users=options.allow_user and runner.name == "docker",
        accepts=accepts,
        grace_ms=options.grace_ms,
        asked_memory_bytes=options.memory_bytes,
        asked_disk_bytes=options.disk_bytes,
    )
    supply = Supply(terms)
    supply.take(facts, (), now_ms)
    return supply.terms
