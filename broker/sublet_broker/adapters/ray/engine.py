"""Ray's keeper: starts the host process, sees that it answers, and starts it again when it doesn't.

Nothing here blocks the broker. Who asks while Ray is down gets EngineAway at once; a thread brings
it back, waiting longer after each failure. Bytes on the socket pair are Python pickles: they come
from our own child and never from a stranger.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

log = logging.getLogger("sublet.ray")

START_LIMIT_S = 90.0
PING_EVERY_S = 2.0
PING_LIMIT_S = 5.0
PINGS_MISSED = 3
BACKOFF_S = (1.0, 60.0)
_STOP_LIMIT_S = 10.0
# Below a longer one the paths of Ray's sockets would not fit into a Unix socket's address.
_LONGEST_TMP = 12

OFF = "off"
"""The address of a broker that does everything in its own process."""

Then = Callable[[bool, Any], None]


class EngineAway(Exception):
    """Ray doesn't answer; the message says why."""


@dataclass(frozen=True)
class EngineConfig:
    """How Ray is run. `address`: "local", or that of a cluster one of whose nodes this is; OFF: it
    isn't."""

    database_url: str
    blobs_root: Path
    address: str = "local"
    shards: int = 1
    cpus: int = max(1, min(4, os.cpu_count() or 1))
    s3: str = ""
    """s3://..., where the blobs lie there and not in the folder."""

    @property
    def blobs(self) -> str:
        """Where they lie, as opening.open_blobs has it."""
        return self.s3 or str(self.blobs_root)


class RayEngine:
    """Ray, kept running."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.before_start: list[Callable[[], None]] = []
        """Called just before Ray starts anew and its shards read the database."""
        self.on_down: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._host: _HostProcess | None = None
        self.off = config.address == OFF
        self._why_away = "it is switched off" if self.off else "it has not been started"
        self._stopping = threading.Event()
        self._up = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="ray-keeper", daemon=True)

    def start(self) -> None:
        """Begin to bring Ray up, and return at once."""
        if self.off:
            log.info("ray is off: jobs are matched, verified and settled in this process")
            return
        log.info(
            "ray starts; its processes listen on every interface of this machine and are guarded "
            "by a token: close their ports to the outside (see deploy/README.md)"
        )
        self._keeper.start()

    def wait_up(self, timeout_s: float) -> bool:
        """Wait until Ray answers. Return whether it does."""
        return self._up.wait(timeout_s)

    def alive(self) -> bool:
        """Say whether Ray answers, for /readyz."""
        return self._up.is_set()

    @property
    def host_pid(self) -> int | None:
        """The host process, if there is one."""
        host = self._host
        return host.process.pid if host else None

    def ask(self, operation: str, *arguments: Any, then: Then) -> None:
        """Ask the host; `then(succeeded, value)` is called from another thread, once.

        Raises EngineAway.
        """
        host = self._host
        if host is None:
            raise EngineAway(f"Ray is away: {self._why_away}")
        host.ask(operation, arguments, then)

    def call(self, operation: str, *arguments: Any, timeout_s: float) -> Any:
        """Ask the host and wait. Raises EngineAway."""
        answered = threading.Event()
        got: list[tuple[bool, Any]] = []

        def then(succeeded: bool, value: Any) -> None:
            got.append((succeeded, value))
            answered.set()

        self.ask(operation, *arguments, then=then)
        if not answered.wait(timeout_s):
            raise EngineAway(f"Ray did not answer within {timeout_s} s")
        succeeded, value = got[0]
        if not succeeded:
            raise EngineAway(f"Ray failed: {value}")
        return value

    def stop(self) -> None:
        """Take Ray down and wait for it. Safe to call twice."""
        self._stopping.set()
        if self._keeper.is_alive():
            self._keeper.join(START_LIMIT_S + _STOP_LIMIT_S)

    def _keep(self) -> None:
        delay_s, longest_s = BACKOFF_S
        while not self._stopping.is_set():
            for starting in self.before_start:
                starting()
            try:
                host = _HostProcess(self.config, self._stopping)
            except (EngineAway, OSError) as error:
                self._why_away = str(error)
                log.warning("ray is away: %s; trying again in %.0f s", error, delay_s)
                self._stopping.wait(delay_s)
                delay_s = min(delay_s * 2, longest_s)
                continue
            delay_s = BACKOFF_S[0]
            self._host = host
            self._up.set()
            log.info("ray is up (host process %d)", host.process.pid)
            self._why_away = self._watch(host)
            self._up.clear()
            self._host = None
            host.stop()
            for down in self.on_down:
                down()
            if not self._stopping.is_set():
                log.warning("ray is away: %s; jobs stay queued meanwhile", self._why_away)

    def _watch(self, host: "_HostProcess") -> str:
        missed = 0
        while not self._stopping.is_set():
            if host.gone.wait(PING_EVERY_S):
                return "its host process ended"
            if self._stopping.is_set():
                break
            try:
                healthy = bool(self.call("ping", timeout_s=PING_LIMIT_S))
            except EngineAway:
                healthy = False
            missed = 0 if healthy else missed + 1
            if missed >= PINGS_MISSED:
                return "its control store does not answer"
        return "the broker is stopping"


class _HostProcess:
    """One life of the host process."""

    def __init__(self, config: EngineConfig, stopping: threading.Event) -> None:
        self.gone = threading.Event()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Then] = {}
        self._lock = threading.Lock()
        self._temp = _private_temp(config)
        ours, theirs = socket.socketpair()
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
        # A host that has lost its control store should end soon, so that a new one is started.
        environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "10"
        if config.address == "local":
            environment.pop("RAY_ADDRESS", None)
            environment.pop("RAY_AUTH_TOKEN", None)
            environment["RAY_AUTH_TOKEN_PATH"] = str(_write_token(self._temp))
        with open(self._temp / "host.log", "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sublet_broker.adapters.ray.host", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the broker, which then stops us in order
            )
        theirs.close()
        self._connection = Connection(ours.detach())
        try:
            self._begin(config, stopping)
        except BaseException:
            self.stop()
            raise
        threading.Thread(target=self._receive, name="ray-host-answers", daemon=True).start()

    def ask(self, operation: str, arguments: tuple[Any, ...], then: Then) -> None:
        with self._lock:
            if self.gone.is_set():
                raise EngineAway("Ray is away: its host process ended")
            number = next(self._numbers)
            self._waiting[number] = then
            try:
                self._connection.send((number, operation, arguments))
            except OSError as error:
                del self._waiting[number]
                raise EngineAway("Ray is away: its host process ended") from error

    def stop(self) -> None:
        """End the process, politely first, and remove its folder."""
        # A shutdown wakes the thread that reads, where a close would leave it waiting.
        ours = socket.socket(fileno=os.dup(self._connection.fileno()))
        with ours, contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)
        for ending in (None, self.process.terminate, self.process.kill):
            if ending is not None:
                ending()
            try:
                self.process.wait(_STOP_LIMIT_S)
                break
            except subprocess.TimeoutExpired:
                continue
        self._fail_all("its host process was stopped")
        self._connection.close()
        shutil.rmtree(self._temp, ignore_errors=True)

    def _begin(self, config: EngineConfig, stopping: threading.Event) -> None:
        self._connection.send(
            {
                "address": config.address,
                "database_url": config.database_url,
                "blobs": config.blobs,
                "shards": config.shards,
                "cpus": config.cpus,
                # Ray opens its folder to everybody; the one around it is ours alone.
                "temp_dir": str(self._temp / "r"),
            }
        )
        waited_s = 0.0
        while not self._connection.poll(0.5):
            waited_s += 0.5
            if stopping.is_set():
                raise EngineAway("the broker is stopping")
            if waited_s >= START_LIMIT_S:
                raise EngineAway(f"it did not start within {START_LIMIT_S:.0f} s")
        try:
            _number, succeeded, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise EngineAway(f"its host ended at once: {self._last_words()}") from error
        if not succeeded:
            raise EngineAway(str(value))

    def _last_words(self) -> str:
        try:
            lines = (self._temp / "host.log").read_text(errors="replace").splitlines()
        except OSError:
            return "it left no log"
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")[:500]

    def _receive(self) -> None:
        while True:
            try:
                number, succeeded, value = self._connection.recv()
            except (EOFError, OSError):
                self._fail_all("its host process ended")
                return
            with self._lock:
                then = self._waiting.pop(number, None)
            if then is not None:
                then(succeeded, value)

    def _fail_all(self, why: str) -> None:
        with self._lock:
            self.gone.set()
            waiting, self._waiting = self._waiting, {}
        for then in waiting.values():
            then(False, why)


def _private_temp(config: EngineConfig) -> Path:
    """Return a new folder, ours alone, for Ray's sockets and logs.

    What killed brokers of the same data folder left is swept: we hold that folder's lock, so none
    of them is alive. Their Ray may be about to end; it misses nothing.
    """
    base = tempfile.gettempdir()
    base = base if len(base) <= _LONGEST_TMP else "/tmp"
    tag = hashlib.sha256(str(config.blobs_root.absolute()).encode()).hexdigest()[:6]
    prefix = f"sublet-ray-{tag}-"
    for left in Path(base).glob(f"{prefix}*"):
        status = left.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=base))


def _write_token(folder: Path) -> Path:
    path = folder / "token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path
