"""The port to whatever runs a job: Docker, or a plain process. Pure: types and rules, no IO.

A run's life, the same for every runner: `start` -> created -> running -> exited -> `remove` ->
gone.
- Everything is keyed by `run_id`, and each call may be repeated: `start` of a run that is there
  does nothing, `stop`, `kill` and `remove` of one that is gone do nothing.
- A runner keeps no memory of its own. After `kill -9` of the agent, `find` lists this agent's
  runs again, `status` tells how they ended meanwhile and `read_logs` goes on at the cursor.
- Runners block: the agent calls them in threads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from sublet_agent.core.layout import UNFURNISHED, Layout
from sublet_contracts.reasons import Reason

CHECKPOINT_PATH = "/sublet/checkpoint"
HELPER_PATH = "/sublet/helper"
INPUTS_PATH = "/inputs"
CACHE_PATH = "/sublet/cache"
CPU_DEVICE = "cpu"
LINE_BYTES = 64  # what a line costs beside its text: a job may print nothing but empty ones
MAX_LINE_BYTES = 16 * 1024  # a longer line comes in pieces of this size, as Docker itself does it

_RUN_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,99}\Z")
_DIGEST = re.compile(r"(?:[^\s@]+@)?sha256:[0-9a-f]{64}\Z")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_RESERVED = ("/proc", "/sys", "/dev", "/sublet")


class Cancel(Protocol):
    """Says whether something is still wanted."""

    def is_set(self) -> bool:
        """Whether it isn't any more."""


class RunnerError(Exception):
    """A runner can't do what it was asked. The text says why and what to do next."""

    raw = ""
    """the engine's own words, where there are any: for the owner only"""


class RunnerUnavailable(RunnerError):
    """This runner can't work on this machine at all."""

    def __init__(self, reason: str, fix: str, raw: str = "") -> None:
        super().__init__(f"{reason}: {fix}")
        self.raw = raw
        self.reason = reason
        self.fix = fix


class ImageTrouble(RunnerError):
    """The image can't be used here. The text is ours alone, `raw` what the engine said: that is for
    the owner only."""

    reason = Reason.PULL_FAILED

    def __init__(self, text: str, raw: str = "", *, errno: int | None = None) -> None:
        super().__init__(text)
        self.raw = raw
        self.errno = errno


class ImageUnknown(ImageTrouble):
    """There is no such image for anybody, as far as this machine can tell."""

    reason = Reason.IMAGE_UNKNOWN


class ImageNotAllowed(ImageTrouble):
    """The owner does not let renters use it."""

    reason = Reason.IMAGE_NOT_ALLOWED


class ImageNotPinned(ImageNotAllowed):
    """The policy wants an image named by its digest."""


class PullFailed(ImageTrouble):
    """This machine could not pull it; another one may."""


class PullCancelled(RunnerError):
    """Nobody waits for the image any more."""


class RunRefused(RunnerError):
    """The spec asks for what this runner, or its owner, does not allow. Says which field."""


class StartFailed(RunnerError):
    """The runner could not bring the run up, for a reason of this machine. Not the job's fault."""

    def __init__(self, text: str, raw: str = "") -> None:
        super().__init__(text)
        self.raw = raw


@dataclass(frozen=True)
class RunSpec:
    """All that a runner needs for one run. Host directories exist before `start`."""

    run_id: str  # unique: label and name
    job_id: str
    lease_id: str
    epoch: int
    image: str
    image_id: str | None  # as `ensure_image` resolved it; None: by `image`
    command: tuple[str, ...]  # empty: the image's own
    env: Mapping[str, str]
    device_ids: tuple[str, ...]  # uuids of GPUs or MIG instances, or ("cpu",)
    cpu_millis: int
    memory_bytes: int
    disk_bytes: int  # most for one file; the agent holds the sum to it with `usage`
    pids: int
    network: Literal["none", "egress"]
    run_dir: Path  # with work/ home/ tmp/: see layout.py
    checkpoint_dir: Path  # with in/ out/ ack/
    inputs_dir: Path
    helper_dir: Path
    stop_grace_ms: int
    threads: int = 0  # of arithmetic (OMP_NUM_THREADS); 0: as many as there are whole cores
    destinations: Mapping[str, Path] = field(default_factory=dict)  # container path -> host path
    outputs_dir: Path | None = None
    outputs_path: str | None = None  # where the job writes them, in the container
    checkpoint_paths: tuple[str, ...] = ()  # folders whose content is a checkpoint, as named
    workdir: str = ""  # the working folder that the job wishes; '': the image's
    shm_bytes: int = 0  # of /dev/shm, as a part of the memory; 0: half of it
    user: str = ""  # as whom it wishes to run: UID, UID:GID or a name of the image's
    cache_dir: Path | None = None  # the renter's own, which outlives the run; not if `user` is set
    layout: Layout = UNFURNISHED  # as `furnish` has found it


@dataclass(frozen=True)
class ResolvedImage:
    """An image that is ready here. `digest` is the registry's, where there is one."""

    reference: str
    image_id: str
    digest: str | None = None
    size_bytes: int | None = None


@dataclass(frozen=True)
class ImageNeeds:
    """What images have to leave room for, and which of them are needed."""

    in_use: frozenset[str]
    """images as jobs name them, and ids of those that are about to start"""
    offered_bytes: int = 0
    """the disk that the owner offers in all; 0: what is free"""
    reserved_bytes: int = 0
    """what the runs asked for"""
    unwritten_bytes: int = 0
    """what of that they have not written yet"""


@dataclass(frozen=True)
class RunStatus:
    """What became of a run.

    created: prepared, and the agent died before it was started; `start` it again or `remove` it.
    exited: `exit_code` is None where nobody can know it. What else was seen of the end is evidence
    for the judgement in exit_reasons.py, and means what it means there.
    """

    state: Literal["created", "running", "exited", "gone"]
    exit_code: int | None = None
    returned: bool = False
    signal: int | None = None
    worker_signal: int | None = None
    oom_killed: bool = False
    limit_exceeded: str = ""
    engine_stopped: str = ""
    outside_signal: str = ""
    unknown_signal: str = ""
    paused: bool = False  # the engine holds it still
    paused_ms: int = 0  # wall time for which the engine held it still: nothing ran
    started_ms: int | None = None
    finished_ms: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class FoundRun:
    """A run of this agent that is still there, running or not."""

    run_id: str
    job_id: str
    lease_id: str
    epoch: int
    status: RunStatus


@dataclass(frozen=True)
class OutputLine:
    """A line of the job's output; stream `sublet` is the runner's own remark about the output."""

    stream: Literal["stdout", "stderr", "sublet"]
    time_ms: int
    text: str


@dataclass(frozen=True)
class Measure:
    """What a runner measured of one run. None: it can't be had."""

    at_ms: int  # by this machine's clock
    cpu_ns: int | None = None  # of all its processes, since it began
    memory_bytes: int | None = None  # file cache that can be dropped left out
    peak_memory_bytes: int | None = None  # the most since it began, as far as the runner knows


@dataclass(frozen=True)
class LogBatch:
    """Lines after a cursor, and the cursor after them. `more`: the limit ended it, read on."""

    lines: tuple[OutputLine, ...]
    cursor: str | None
    more: bool


class Runner(Protocol):
    """What the agent asks of a runner. All methods raise RunnerError where they can't."""

    name: str

    def check(self) -> None:
        """Raise RunnerUnavailable where this runner can't work here."""

    def look_up_image(self, image: str) -> str:
        """Return what an image's tag means now, by its content: what a job that names it is to be
        run by from here on. '': this runner uses no images. Raises ImageTrouble."""

    def ensure_image(
        self,
        image: str,
        progress: Callable[[str], None],
        policy: Literal["digest", "any"],
        cancel: Cancel | None = None,
    ) -> ResolvedImage:
        """Have the image here, pulling it if need be. `cancel`: it isn't wanted any more. Raises
        ImageTrouble or PullCancelled."""

    def tidy_images(self, needs: ImageNeeds) -> list[str]:
        """Let go of images that were pulled for renters until the rest fits. Returns lines that say
        what went."""

    def images_hold_bytes(self, folder: Path) -> int:
        """Return what renters' images hold of the disk of a folder: it is let go when needed."""

    def furnish(self, spec: RunSpec, cancel: Cancel | None = None) -> Layout:
        """Fill the run's own folders, which are empty, with what the image has there; return where
        they are to be. `cancel`: it isn't wanted any more, and the rest doesn't matter. Raises
        RunRefused or StartFailed."""

    def start(self, spec: RunSpec) -> None:
        """Start the run; nothing if it was started before. Raises RunRefused or StartFailed."""

    def start_test(self, folder: Path, device_ids: tuple[str, ...]) -> None:
        """Start something that does nothing, as a job with these devices is started, and see it
        end well; `folder` is for its files. Raises StartFailed."""

    def find(self) -> list[FoundRun]:
        """List this agent's runs, by its owner id."""

    def status(self, run_id: str) -> RunStatus:
        """Say how the run is; `gone` for one that is unknown."""

    def stop(self, run_id: str) -> None:
        """Ask the job to save and leave: STOP in its checkpoint folder, and TERM. Does not wait."""

    def kill(self, run_id: str) -> None:
        """End the job and everything it started, at once."""

    def remove(self, run_id: str) -> None:
        """Kill what is left and forget the run, its output too. The host folders stay."""

    def read_logs(
        self, run_id: str, cursor: str | None, limit_bytes: int, *, ended: bool = False
    ) -> LogBatch:
        """Read on at `cursor` (None: the start), about `limit_bytes` at most. The lines are those
        of log_lines.py; `ended`: the run is over, so that an unfinished line is one as well."""

    def unfinished_lines(self, run_id: str) -> tuple[OutputLine, ...]:
        """Return how the lines stand that the job has not ended yet, one for each stream that has
        such a line. Only a view of now, and none where it can't be had; raises nothing."""

    def measure(self, run_id: str) -> Measure | None:
        """Return what the run uses of the machine now; of one that is over, what was known last, if
        anything is."""


def is_pinned(image: str) -> bool:
    """Say whether the image is named by content: `name@sha256:...` or `sha256:...`."""
    return _DIGEST.match(image) is not None


def require_pinned(image: str, policy: Literal["digest", "any"], known_as: str | None) -> None:
    """Raise ImageNotPinned where the policy wants a digest; `known_as`: its pinned name."""
    if policy == "any" or is_pinned(image):
        return
    hint = f"use {known_as}" if known_as else f"use {image.split('@')[0]}@sha256:<digest>"
    raise ImageNotPinned(
        f"image {image!a} can change under its tag and this owner wants it pinned: {hint}"
    )


def is_run_id(text: str) -> bool:
    """Say whether a run can have this id."""
    return _RUN_ID.match(text) is not None


def check_spec(spec: RunSpec) -> None:
    """Raise RunRefused, naming the field, for a spec that no runner may start."""
    if not is_run_id(spec.run_id):
        raise RunRefused(f"run_id {spec.run_id!r}: use 1 to 100 letters, digits, '_', '.', '-'")
    for name in ("cpu_millis", "memory_bytes", "disk_bytes", "pids"):
        if getattr(spec, name) < 1:
            raise RunRefused(f"{name} is {getattr(spec, name)}: it must be at least 1")
    if spec.network not in ("none", "egress"):
        raise RunRefused(f"network {spec.network!r}: use none or egress")
    if not spec.device_ids:
        raise RunRefused("device_ids is empty: name the GPUs, or cpu")
    if any("\0" in part for part in (*spec.command, *spec.env.values())):
        raise RunRefused("command or env holds a NUL byte: remove it")
    for variable in spec.env:
        if not _VARIABLE.match(variable):
            raise RunRefused(f"env: {variable!r} is no variable name: letters, digits and '_'")
    if (spec.outputs_dir is None) != (spec.outputs_path is None):
        raise RunRefused("outputs_dir and outputs_path come together: give both or none")
    named = [path for path in spec.checkpoint_paths if path.startswith("/")]
    for path in [*spec.destinations, *([spec.outputs_path] if spec.outputs_path else []), *named]:
        _check_container_path(path)


def _check_container_path(path: str) -> None:
    parts = PurePosixPath(path)
    plain = path.startswith("/") and not path.startswith("//") and ".." not in parts.parts
    if not plain or str(parts) == "/" or "\0" in path or ":" in path:
        raise RunRefused(f"container path {path!r}: use an absolute one without '..' or ':'")
    if any(parts == PurePosixPath(r) or PurePosixPath(r) in parts.parents for r in _RESERVED):
        raise RunRefused(
            f"container path {path!r} is not the job's to use: not {', '.join(_RESERVED)}"
        )


def gpu_ids(spec: RunSpec) -> tuple[str, ...]:
    """Return the GPUs of the run; none for a run on the CPU."""
    return tuple(d for d in spec.device_ids if d != CPU_DEVICE)


THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


_CACHES = {
    "PIP_CACHE_DIR": "pip",
    "UV_CACHE_DIR": "uv",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
}
_HOME_CACHES = {"XDG_CACHE_HOME": "", "HF_HOME": "huggingface", "TORCH_HOME": "torch"}
"""what else lies in HOME's .cache, and is read there where an image has brought it"""


def cache_variables(at: str, *, has_caches: bool) -> dict[str, str]:
    """Return the variables by which programs keep their caches in a folder. `has_caches`: HOME has
    such already, which stay where they are."""
    wanted = _CACHES if has_caches else {**_CACHES, **_HOME_CACHES}
    return {name: f"{at}/{folder}".rstrip("/") for name, folder in wanted.items()}


def job_environment(
    spec: RunSpec,
    *,
    checkpoint: str,
    inputs: str,
    helper: str,
    outputs: str | None,
    image: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return what the job sees beside what its image sets; the given paths are as the job sees
    them. `image`: what the image sets.

    What job or image set stays: the job's own wins, PYTHONPATH is added to (the helper's folder
    first, the image's last). The threads of arithmetic are alike in all libraries. No SUBLET_* of
    the job's own is passed on.
    """
    given = dict(image or {})
    own = {k: v for k, v in spec.env.items() if not k.startswith("SUBLET_")}
    threads = str(spec.threads or max(1, spec.cpu_millis // 1000))
    threads = own.get("OMP_NUM_THREADS") or given.get("OMP_NUM_THREADS") or threads
    env = dict.fromkeys((name for name in THREAD_VARIABLES if name not in given), threads)
    env |= {"PYTHONUNBUFFERED": given.get("PYTHONUNBUFFERED", "1"), **own}
    paths = [helper, own.get("PYTHONPATH"), given.get("PYTHONPATH")]
    env["PYTHONPATH"] = ":".join(path for path in paths if path)
    env["SUBLET_JOB_ID"] = spec.job_id
    env["SUBLET_EPOCH"] = str(spec.epoch)
    env["SUBLET_CHECKPOINT_DIR"] = checkpoint
    env["SUBLET_INPUT_DIR"] = inputs
    if outputs is not None:
        env["SUBLET_OUTPUT_DIR"] = outputs
    return env
