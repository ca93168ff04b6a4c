"""Runs jobs in containers of the local Docker Engine, with as little in them as a job needs.

What a container is created with stands in container.py, what its folders begin with in
furnishing.py.

Disk: the root is read-only; the working folder, HOME, /tmp, the checkpoint and the output folders
are ordinary ones of the run's own: RLIMIT_FSIZE bounds each file, and the agent measures the sum
and ends the run that passes `disk_bytes`. Volumes that an image declares become bounded tmpfs.

Network `egress` is refused unless the owner allowed it: jobs don't reach each other on its
bridge, but they do reach the owner's network and this host's own addresses until a firewall stops
that (DOCKER-USER for forwarded packets, INPUT on the bridge for the host).

Ends: an exit code says little, so `status` adds what the engine's events say of the end
(engine_events.py): a signal that was not ours, an engine that went away, memory that was full,
time in which the container was paused. A container that the engine started once more ended when it
ended first; what runs in it then is killed. The init turns signal n into the code 128 + n, which a
job can return as well: the kernel's process events (exit_witness.py) tell the two apart where this
agent may follow them; else, without an event or a record, nobody can.

Users: an engine with --userns-remap would show a job its folders as somebody else's, so it runs in
the host's user namespace, as on any other engine: without root, capabilities, or a way to any.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import docker
import requests
from docker.errors import APIError, DockerException, NotFound
from docker.types import DeviceRequest

from sublet_agent.adapters.docker import container
from sublet_agent.adapters.docker import logs as docker_logs
from sublet_agent.adapters.docker import usage as docker_usage
from sublet_agent.adapters.docker.container import CORES, LABEL, Host, ImageConfig
from sublet_agent.adapters.docker.engine_events import EngineEvents
from sublet_agent.adapters.docker.exit_witness import ExitWitness
from sublet_agent.adapters.docker.furnishing import Furnisher
from sublet_agent.adapters.docker.images import EVERYBODYS, DockerImages, ImageRules
from sublet_agent.adapters.docker.limits_told import LXCFS, told_by
from sublet_agent.adapters.docker.live_output import LiveOutput
from sublet_agent.adapters.docker.start_errors import judge_start
from sublet_agent.adapters.workspace import folders
from sublet_agent.adapters.workspace.start_test import idle_program, start_and_end
from sublet_agent.core import cores, engine_evidence, layout, runner_port
from sublet_agent.core.engine_evidence import EngineFact
from sublet_agent.core.layout import Layout
from sublet_agent.core.runner_port import (
    Cancel,
    FoundRun,
    ImageNeeds,
    LogBatch,
    Measure,
    OutputLine,
    ResolvedImage,
    RunSpec,
    RunStatus,
)

EGRESS_NETWORK = "sublet-egress"
JOB_UID = 65532  # of an agent that is root; any other agent's jobs have the agent's own user
_TIMEOUT_S = 60
_MIN_MEMORY_BYTES = 6 * 1024 * 1024  # the engine accepts no less
_OOM_RECORD_S = 0.5
_LOOK_AGAIN_S = 60.0
_LAST_SIGNAL = 64
_NEVER = "0001-01-01T00:00:00Z"


def why_silent(error: BaseException) -> str:
    """Say in a few words why no engine answers: the error at the bottom, not the four around it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror.lower() if strerror else str(error)


class DockerRunner:
    """The real runner. `owner` is the agent's state id: an agent sees only its own containers."""

    name = "docker"

    def __init__(
        self,
        owner: str,
        state_dir: Path | None = None,
        *,
        user: tuple[int, int] | None = None,
        allow_egress: bool = False,
        allow_user: bool = False,
        lxcfs: Path = LXCFS,
        log_bytes: int = 16 * 1024 * 1024,
        volume_bytes: int = 1024 * 1024 * 1024,
        client: docker.DockerClient | None = None,
        images: ImageRules = EVERYBODYS,
    ) -> None:
        """`state_dir`: where evidence and the list of pulled images are kept over a restart of the
        agent; None: in memory only. `images`: what the owner lets renters use.
        `user` is the (uid, gid) of jobs; `log_bytes` bounds each run's log, `volume_bytes` each
        volume that an image declares. `lxcfs`: where that lies, if it is installed."""
        self._owner = owner
        own = (os.geteuid(), os.getegid())
        self._user = user or (own if own[0] != 0 else (JOB_UID, JOB_UID))
        if 0 in self._user:
            raise ValueError("user: jobs must not run as uid or gid 0")
        self._allow_egress = allow_egress
        self._allow_user = allow_user
        self._lxcfs = lxcfs
        self._choosing_cores = threading.Lock()
        self._log_bytes = log_bytes
        self._volume_bytes = volume_bytes
        self._connected_client = client
        evidence = None if state_dir is None else state_dir / "evidence"
        self._images = DockerImages(self._client, rules=images, state=state_dir)
        self._events = EngineEvents(self._client, owner, evidence)
        self._live = LiveOutput(self._client)
        self._furnisher = Furnisher(self._client, owner)
        self._witness = ExitWitness(self._events.note)
        self._looked_s: float | None = None
        """when it was last looked at what the engine can do, by the monotonic clock"""

    # ---- the machine ----

    def why_no_witness(self) -> str:
        """Say why the kernel doesn't tell how a job's own process ends; empty: it does."""
        return self._witness.why_not()

    def check(self) -> None:
        """Raise RunnerUnavailable where no engine answers, or one that enforces no seccomp.

        Cheap, for it is asked every few seconds: what an engine can do is looked at again every
        minute, and when it has been away.
        """
        fix = "start dockerd, or set DOCKER_HOST, or use --runner process for your own jobs"
        looked_s, self._looked_s = self._looked_s, None
        try:
            if looked_s is not None and time.monotonic() - looked_s < _LOOK_AGAIN_S:
                self._client().ping()
                self._looked_s = looked_s
                return
            info = self._client().info()
        except runner_port.RunnerUnavailable:
            raise
        except (DockerException, requests.RequestException, OSError) as error:
            raise runner_port.RunnerUnavailable(
                f"no Docker Engine answers ({why_silent(error)})", fix
            ) from error
        _require_usable(info, fix)
        self._looked_s = time.monotonic()

    def look_up_image(self, image: str) -> str:
        """Return what a tag means, by content. See `Runner`."""
        with self._errors(f"image {image[:200]!a}"):
            return self._images.look_up(image)

    def ensure_image(
        self,
        image: str,
        progress: Callable[[str], None],
        policy: Literal["digest", "any"],
        cancel: Cancel | None = None,
    ) -> ResolvedImage:
        """Have an image in the engine that a renter may use. See `Runner`."""
        with self._errors(f"image {image[:200]!a}"):
            return self._images.ensure(image, progress, policy, cancel)

    def tidy_images(self, needs: ImageNeeds) -> list[str]:
        """Let go of renters' images until the rest fits. See `Runner`."""
        with self._errors("images"):
            return self._images.tidy(needs)

    def images_hold_bytes(self, folder: Path) -> int:
        """Return what renters' images hold of a folder's disk. See `Runner`."""
        with self._errors("images"):
            return self._images.hold_bytes(folder)

    # ---- a run's life ----

    def furnish(self, spec: RunSpec, cancel: Cancel | None = None) -> Layout:
        """Fill the run's folders with what the image has. See `Runner`."""
        runner_port.check_spec(spec)
        self._check_allowed(spec)
        with self._errors(f"run {spec.run_id}"):
            image_id = spec.image_id or self._images.id_of(spec.image)
            image = ImageConfig.of(self._client().api.inspect_image(image_id))
            try:
                hand_over = functools.partial(self._hand_over, spec)
                return self._furnisher.furnish(spec, image_id, image, self._user, hand_over, cancel)
            except requests.RequestException:
                raise
            except OSError as error:
                says = f"run {spec.run_id}: its folders: {error.strerror}"
                raise runner_port.StartFailed(says, str(error)) from error

    def start(self, spec: RunSpec) -> None:
        """Create and start the container, once. See `Runner`."""
        runner_port.check_spec(spec)
        self._check_allowed(spec)
        if spec.memory_bytes < _MIN_MEMORY_BYTES:
            raise runner_port.RunRefused(f"memory_bytes: at least {_MIN_MEMORY_BYTES}")
        self._events.know(spec.run_id)
        self._events.begin()
        with self._errors(f"run {spec.run_id}"):
            found = self._inspect(spec.run_id)
            if found is None:
                try:
                    self._hand_over(spec, spec.layout.user_ids or self._user)
                except OSError as error:
                    raise runner_port.StartFailed(
                        f"run {spec.run_id}: its folders: {error.strerror}", str(error)
                    ) from error
                try:
                    self._create(spec)
                except APIError as error:
                    # Somebody else created it in between: theirs is the same run.
                    if error.status_code != 409 or self._inspect(spec.run_id) is None:
                        raise _start_error(spec.run_id, error) from error
                found = self._inspect(spec.run_id)
            if found is not None and _status(found).state != "created":
                return
            if found is not None:
                self._witness.expect(spec.run_id, str(found["Id"]))
            self._live.follow(spec.run_id, self._name(spec.run_id), from_start=True)
            try:
                self._client().api.start(self._name(spec.run_id))
            except APIError as error:
                # A command that can't be run is an end of the job's own, and `status` tells it.
                if judge_start(_explanation(error)).exit_code is None:
                    raise _start_error(spec.run_id, error) from error
                found = self._inspect(spec.run_id)
                if found is None or _status(found).state == "created":  # it tells nothing
                    raise _start_error(spec.run_id, error) from error
                return
            found = self._inspect(spec.run_id)
            if found is not None and _status(found).started_ms is not None:
                self._events.began(spec.run_id, _nanoseconds(found["State"]["StartedAt"]))
                self._know_init(spec.run_id, found, found_running=False)

    def start_test(self, folder: Path, device_ids: tuple[str, ...]) -> None:
        """Start a program of our own that does nothing, in an image that holds nothing else. See
        `Runner`."""
        program = idle_program(os.uname().machine)
        if program is None:
            return  # No program for this architecture: the next jobs show whether they start.
        with self._errors("a start test"):
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as tar:
                entry = tarfile.TarInfo("idle")
                entry.mode, entry.size = 0o755, len(program)
                tar.addfile(entry, io.BytesIO(program))
            name = f"sublet-start-test:{self._owner[:12]}"
            said = self._client().api.import_image_from_data(packed.getvalue(), *name.split(":"))
            image_id = str(json.loads(said.splitlines()[-1])["status"])
            try:
                start_and_end(
                    self, folder, device_ids, image=name, image_id=image_id, command=("/idle",)
                )
            finally:
                self._client().api.remove_image(name, force=True)

    def find(self) -> list[FoundRun]:
        """List this agent's containers. See `Runner`."""
        wanted = {"label": [f"{LABEL}.owner={self._owner}"]}
        with self._errors("finding runs"):
            listed = self._client().api.containers(all=True, filters=wanted)
            for entry in listed:
                self._events.know(entry["Labels"][f"{LABEL}.run"])
            self._events.begin()
            found = []
            for entry in listed:
                labels = entry["Labels"]
                run_id = labels[f"{LABEL}.run"]
                shown = self._inspect(run_id)
                if shown is not None:
                    self._know_init(run_id, shown, found_running=True)
                found.append(
                    FoundRun(
                        run_id,
                        labels[f"{LABEL}.job"],
                        labels[f"{LABEL}.lease"],
                        int(labels[f"{LABEL}.epoch"]),
                        self.status(run_id),
                    )
                )
            return found

    def status(self, run_id: str) -> RunStatus:
        """Say how the container is. See `Runner`."""
        with self._errors(f"run {run_id}"):
            before = self._events.facts(run_id)
            found = self._inspect(run_id)
            if found is None:
                self._events.forget(run_id)
                return RunStatus("gone")
            seen = _status(found)
            if seen.started_ms is None:
                return seen
            return self._with_evidence(run_id, found, seen, before)

    def _know_init(self, run_id: str, container: Mapping[str, Any], *, found_running: bool) -> None:
        """Have the exits below the container's init witnessed; 0: it runs no more."""
        init = container["State"].get("Pid") or 0
        self._witness.know(run_id, str(container["Id"]), int(init), found=found_running)

    def _with_evidence(
        self,
        run_id: str,
        container: Mapping[str, Any],
        seen: RunStatus,
        before: tuple[EngineFact, ...],
    ) -> RunStatus:
        """Add what the engine's events say to what it says of a container that was started.
        `before`: what was known when it was looked at."""
        created_ns = _nanoseconds(container["Created"])
        started_ns = _nanoseconds(container["State"]["StartedAt"])
        before = _since(created_ns, before)
        began_ns = engine_evidence.began_ns(before)
        if began_ns is None:
            self._events.began(run_id, started_ns)
        elif started_ns != began_ns:
            return self._end_of_first(run_id, created_ns, began_ns, seen)
        if seen.state == "running":
            now_ms = time.time_ns() // 1_000_000
            self._agree_on_pause(run_id, seen.paused, before)
            facts = _since(created_ns, self._events.facts(run_id))
            paused_ms = engine_evidence.paused_ms(facts, now_ms)
            return dataclasses.replace(seen, paused_ms=paused_ms)
        self._witness.settle()
        memory = self._events.look()
        if seen.exit_code == 128 + signal.SIGKILL and not _explains_kill(self._events, run_id):
            # The kernel's record comes to the engine by another way than the end itself.
            memory = self._events.look(_OOM_RECORD_S)
        facts = _since(created_ns, self._events.facts(run_id))
        finished_ms = seen.finished_ms or 0
        end = engine_evidence.end_evidence(
            facts,
            exit_code=seen.exit_code,
            finished_ms=finished_ms,
            oom_flag=seen.oom_killed,
            memory=memory,
            away=self._events.away(),
        )
        died = any(fact.kind == "die" for fact in facts)
        if not died and (seen.started_ms or 0) < _boot_ms() <= finished_ms:
            # The machine went down under it, and the engine writes its own next start for the end.
            finished_ms = max((fact.at_ms for fact in before), default=seen.started_ms or 0)
        return dataclasses.replace(
            seen,
            oom_killed=end.out_of_memory,
            engine_stopped=end.engine_stopped,
            unknown_signal=end.unseen,
            returned=seen.returned or end.returned,
            signal=end.signal,
            worker_signal=end.worker_signal,
            paused_ms=engine_evidence.paused_ms(facts, finished_ms),
            finished_ms=finished_ms,
        )

    def _end_of_first(
        self, run_id: str, created_ns: int, began_ns: int, seen: RunStatus
    ) -> RunStatus:
        """The engine has started the container once more (docker restart, or start after stop): the
        run has ended, and what runs now is no run of ours."""
        if seen.state == "running":
            self._signal(run_id, signal.SIGKILL)
        self._events.look()
        facts = _since(created_ns, self._events.facts(run_id))
        end = engine_evidence.end_of_first(facts)
        finished_ms = end.at_ms if end is not None else seen.started_ms or 0
        return RunStatus(
            "exited",
            end.number if end is not None else None,
            engine_stopped="the engine stopped the container and started it again",
            started_ms=began_ns // 1_000_000,
            finished_ms=finished_ms,
            paused_ms=engine_evidence.paused_ms(facts, finished_ms),
        )

    def _agree_on_pause(self, run_id: str, paused: bool, before: tuple[EngineFact, ...]) -> None:
        """Where the events of a pause were lost, what is seen now counts from now."""
        if engine_evidence.is_paused(before) == paused:
            return
        self._events.look()
        if engine_evidence.is_paused(self._events.facts(run_id)) != paused:
            self._events.saw(run_id, "pause" if paused else "unpause")

    def stop(self, run_id: str) -> None:
        """Write STOP and send TERM, also to one that the engine holds still. See `Runner`."""
        with self._errors(f"run {run_id}"):
            found = self._inspect(run_id)
            if found is None:
                return
            folders.ask(Path(found["Config"]["Labels"][f"{LABEL}.checkpoint_dir"]), "STOP")
            if found["State"].get("Paused"):
                self._go_on(run_id)
            self._signal(run_id, signal.SIGTERM)

    def kill(self, run_id: str) -> None:
        """Send KILL to the container's init, which ends all in it. See `Runner`."""
        with self._errors(f"run {run_id}"):
            found = self._inspect(run_id)
            if found is None or found["State"]["Status"] in ("exited", "dead", "created"):
                return
            self._signal(run_id, signal.SIGKILL)
            if found["State"].get("Paused"):
                self._go_on(run_id)  # what stands still doesn't even die

    def remove(self, run_id: str) -> None:
        """Remove the container, its log and its anonymous volumes. See `Runner`."""
        with self._errors(f"run {run_id}"):
            with contextlib.suppress(NotFound):
                self._client().api.remove_container(self._name(run_id), force=True, v=True)
            with contextlib.suppress(NotFound):
                looked_through = self._furnisher.container_name(run_id)
                self._client().api.remove_container(looked_through, force=True, v=True)
            self._witness.forget(run_id)
            self._events.forget(run_id)
            self._live.forget(run_id)

    def read_logs(
        self, run_id: str, cursor: str | None, limit_bytes: int, *, ended: bool = False
    ) -> LogBatch:
        """Read the container's log. See `Runner`."""
        with self._errors(f"log of run {run_id}"):
            api, name = self._client().api, self._name(run_id)
            try:
                return docker_logs.read(
                    api, name, cursor, limit_bytes, self._log_bytes, ended=ended
                )
            except NotFound:
                return LogBatch((), cursor, False)

    def unfinished_lines(self, run_id: str) -> tuple[OutputLine, ...]:
        """Return how they stand in what the container writes. See `Runner`."""
        self._live.follow(run_id, self._name(run_id), from_start=False)
        return self._live.states(run_id)

    def measure(self, run_id: str) -> Measure | None:
        """Return what the engine's counters say. See `Runner`."""
        with self._errors(f"usage of run {run_id}"):
            at_ms = time.time_ns() // 1_000_000
            try:
                return docker_usage.ask(self._client().api, self._name(run_id), at_ms)
            except NotFound:
                return None

    def _signal(self, run_id: str, number: signal.Signals) -> None:
        self._events.about_to_send(run_id, number)
        try:
            self._client().api.kill(self._name(run_id), number.name)
        except NotFound:
            return
        except APIError as error:
            if error.status_code != 409:  # 409: it is not running, so there is nobody to tell
                raise

    def _go_on(self, run_id: str) -> None:
        try:
            self._client().api.unpause(self._name(run_id))
        except NotFound:
            return
        except APIError as error:
            # It goes on already, or has ended.
            if error.status_code not in (409, 500) or self._is_paused(run_id):
                raise

    def _is_paused(self, run_id: str) -> bool:
        found = self._inspect(run_id)
        return found is not None and bool(found["State"].get("Paused"))

    # ---- the container ----

    def _create(self, spec: RunSpec) -> None:
        api = self._client().api
        image_id = spec.image_id or self._images.id_of(spec.image)
        image = ImageConfig.of(api.inspect_image(image_id))
        with self._choosing_cores:  # else two that begin at once would choose the same
            self._create_on(spec, image_id, image)

    def _create_on(self, spec: RunSpec, image_id: str, image: ImageConfig) -> None:
        api = self._client().api
        info = self._client().info()
        host = Host(
            owner=self._owner,
            user=spec.layout.user_ids or self._user,
            log_bytes=self._log_bytes,
            volume_bytes=self._volume_bytes,
            network=self._network(spec),
            device_requests=tuple(self._devices(spec)),
            unmapped=_has_option(info, "name=userns"),
            cpu_count=int(info.get("NCPU") or os.cpu_count() or 1),
            cores=self._cores_for(spec, info),
            told_by=told_by(self._lxcfs),
        )
        api.create_container(
            image_id,
            name=self._name(spec.run_id),
            host_config=api.create_host_config(**container.host_config(spec, image, host)),
            **container.arguments(spec, image, host),
        )

    def _cores_for(self, spec: RunSpec, info: Mapping[str, Any]) -> tuple[int, ...]:
        if not info.get("CPUSet"):
            return ()
        count = int(info.get("NCPU") or 0)
        ours = sorted(os.sched_getaffinity(0))
        machine = ours if len(ours) == count else list(range(count))
        wanted = {"label": [f"{LABEL}.owner={self._owner}"]}
        others = self._client().api.containers(filters=wanted)
        taken = [cores.from_text(str(each["Labels"].get(CORES) or "")) for each in others]
        return cores.cores_for(spec.cpu_millis, machine, taken)

    def _network(self, spec: RunSpec) -> str:
        if spec.network == "none":
            return "none"
        api = self._client().api
        if not api.networks(names=[EGRESS_NETWORK]):
            api.create_network(
                EGRESS_NETWORK,
                driver="bridge",
                check_duplicate=True,
                options={"com.docker.network.bridge.enable_icc": "false"},
            )
        return EGRESS_NETWORK

    def _devices(self, spec: RunSpec) -> list[DeviceRequest]:
        gpus = runner_port.gpu_ids(spec)
        if not gpus:
            return []
        names = [f"nvidia.com/gpu={gpu}" for gpu in gpus]
        listed = {d.get("ID") for d in self._client().info().get("DiscoveredDevices") or ()}
        if listed.issuperset(names):
            return [DeviceRequest(driver="cdi", device_ids=names)]
        return [
            DeviceRequest(
                driver="nvidia", device_ids=list(gpus), capabilities=[["gpu", "compute", "utility"]]
            )
        ]

    def _check_allowed(self, spec: RunSpec) -> None:
        if spec.network == "egress" and not self._allow_egress:
            raise runner_port.RunRefused(
                "network egress: this owner gives jobs no network; use network none, "
                "or let the owner allow it with --allow-egress"
            )
        if spec.user and not self._allow_user:
            raise runner_port.RunRefused(
                f"user {spec.user!a}: this owner lets no job choose as whom it runs; leave out "
                "--user, or let the owner allow it with --allow-user"
            )

    def _hand_over(self, spec: RunSpec, user: tuple[int, int]) -> None:
        uid, gid = user
        for name in ("in", "out", "ack"):
            (spec.checkpoint_dir / name).mkdir(exist_ok=True)
        for folder in (spec.checkpoint_dir / "in", spec.checkpoint_dir / "ack", spec.inputs_dir):
            folders.make_readable(folder)
        if os.geteuid() == 0:
            os.chown(spec.checkpoint_dir, uid, gid)
        folders.hand_over(spec.checkpoint_dir / "out", uid, gid)
        for name in (layout.WORK, layout.HOME, layout.TMP):
            (spec.run_dir / name).mkdir(parents=True, exist_ok=True)
            folders.hand_over(spec.run_dir / name, uid, gid)
        for folder in spec.run_dir.glob(f"{layout.SAVED}-*"):
            folders.hand_over(folder, uid, gid)
        if spec.outputs_dir is not None:
            folders.hand_over(spec.outputs_dir, uid, gid)
        if spec.cache_dir is not None and container.has_cache(spec) and os.geteuid() == 0:
            os.chown(spec.cache_dir, uid, gid)  # what is in it is his already

    # ---- the engine ----

    def _name(self, run_id: str) -> str:
        return f"sublet-{self._owner[:12]}-{run_id}"

    def _inspect(self, run_id: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self._client().api.inspect_container(self._name(run_id))
        except NotFound:
            return None
        return found

    def _client(self) -> docker.DockerClient:
        if self._connected_client is None:
            try:
                self._connected_client = docker.from_env(timeout=_TIMEOUT_S)
            except (DockerException, requests.RequestException, OSError) as error:
                raise runner_port.RunnerUnavailable(
                    f"no Docker Engine answers ({why_silent(error)})",
                    "start dockerd, or set DOCKER_HOST",
                ) from error
        return self._connected_client

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except APIError as error:
            failed = runner_port.RunnerError(f"{what}: the Docker Engine answers with an error")
            failed.raw = _explanation(error)
            raise failed from error
        except (DockerException, requests.RequestException, OSError) as error:
            raise runner_port.RunnerUnavailable(
                f"{what}: the Docker Engine does not answer", "is dockerd running?", str(error)
            ) from error


def _require_usable(info: Mapping[str, Any], fix: str) -> None:
    """Raise RunnerUnavailable for an engine that can't hold or serve a stranger's job."""
    if info.get("OSType") != "linux":
        raise runner_port.RunnerUnavailable("the engine does not run Linux containers", fix)
    if not any("seccomp" in option for option in info.get("SecurityOptions") or ()):
        raise runner_port.RunnerUnavailable(
            "the engine can't filter system calls", "use a kernel and an engine with seccomp"
        )
    for field, what in (("MemoryLimit", "memory"), ("PidsLimit", "processes")):
        if not info.get(field):
            raise runner_port.RunnerUnavailable(
                f"the engine can't limit {what}", "enable that cgroup controller"
            )
    if _has_option(info, "rootless"):
        # Its users are mapped from the start, so that no job could write into its own folders.
        raise runner_port.RunnerUnavailable(
            "the engine runs rootless, so a job could not use its folders", "use one that root runs"
        )


def _has_option(info: Mapping[str, Any], name: str) -> bool:
    return any(name in option for option in info.get("SecurityOptions") or ())


def _explanation(error: Exception) -> str:
    return str(getattr(error, "explanation", None) or error)


def _start_error(run_id: str, error: APIError) -> runner_port.RunnerError:
    raw = _explanation(error)
    meant = judge_start(raw)
    if meant.exit_code is not None:
        return runner_port.RunRefused(f"run {run_id}: {meant.says}")
    return runner_port.StartFailed(f"run {run_id}: {meant.says}", raw)


def _status(container: Mapping[str, Any]) -> RunStatus:
    """Say what the engine says of a container by itself."""
    state = container["State"]
    started = _milliseconds(state.get("StartedAt"))
    meant = judge_start(state["Error"]) if state.get("Error") else None
    match state["Status"]:
        case "created" if meant is not None and meant.exit_code is not None:
            return RunStatus("exited", meant.exit_code, returned=True, error=meant.says)
        case "created":  # also where this machine failed to start it: it is tried again
            return RunStatus("created")
        case "exited" | "dead":
            code = int(state["ExitCode"])
            finished = _milliseconds(state.get("FinishedAt"))
            if started is not None and finished is not None:
                # The engine notes the start once it has happened: what ends at once ended before.
                finished = max(started, finished)
            return RunStatus(
                "exited",
                code,
                # Its init turns signal n into code 128 + n, and so may a job.
                returned=not 128 < code <= 128 + _LAST_SIGNAL,
                oom_killed=bool(state.get("OOMKilled")),
                started_ms=started,
                finished_ms=finished,
                error=meant.says if meant else None,
            )
    return RunStatus("running", paused=bool(state.get("Paused")), started_ms=started)


def _since(created_ns: int, facts: tuple[EngineFact, ...]) -> tuple[EngineFact, ...]:
    """Leave out what the engine told of a container that had the same name before."""
    return tuple(fact for fact in facts if fact.at_ns >= created_ns)


def _explains_kill(events: EngineEvents, run_id: str) -> bool:
    kinds = {(fact.kind, fact.number) for fact in events.facts(run_id)}
    return any(kind == "oom" or number == signal.SIGKILL for kind, number in kinds)


def _boot_ms() -> int:
    return (time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) // 1_000_000


def _milliseconds(stamp: str | None) -> int | None:
    return None if not stamp or stamp == _NEVER else _nanoseconds(stamp) // 1_000_000


def _nanoseconds(stamp: str) -> int:
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    seconds = int(datetime.fromisoformat(whole + "+00:00").timestamp())
    return seconds * 1_000_000_000 + int((fraction + "0" * 9)[:9])
