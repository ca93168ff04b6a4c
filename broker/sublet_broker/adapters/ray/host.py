"""The process that is Ray's driver: `python -m sublet_broker.adapters.ray.host`.

It stands between the broker and Ray because a driver shares Ray's fate: when the cluster's control
store goes, Ray ends the driver's process, and it takes over signal handlers besides. Here the
broker loses a child that it starts again, and nothing else. The two talk over a socket pair that
only they have; when the broker is gone the socket closes, and the host takes Ray down with it.

Requests are (number, operation, arguments); answers are (number, succeeded, value).
"""

import logging
import os
import select
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ray

from sublet_broker.adapters.ray.shards import SHARD_ANSWER_S, ShardKeeper, ShardReply, Silence
from sublet_broker.adapters.ray.tasks import (
    ShardActor,
    check_pack,
    move_packs,
    settle_batch,
    verify,
    whole_in_packs,
)

log = logging.getLogger("sublet.ray")

NAMESPACE = "sublet"
_OBJECT_STORE_BYTES = 80 * 1024 * 1024  # Ray's least: only ids and records pass through it
_MAX_TASK_RETRIES = 3


@dataclass(frozen=True)
class HostConfig:
    """What the broker tells its host at start."""

    address: str
    database_url: str
    blobs: str
    shards: int
    cpus: int
    temp_dir: str


class Host:
    """Ray as the broker uses it."""

    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._keeper: ShardKeeper[Any]
        self._operations: dict[str, Callable[..., Any]] = {
            "ping": self.ping,
            "propose": self.propose,
            "rebuild": self.rebuild,
            "verify": self.verify,
            "settle": self.settle,
            "check_pack": self.check_pack,
            "whole_in_packs": self.whole_in_packs,
            "move_packs": self.move_packs,
            "shard_pids": self.shard_pids,
        }

    def start(self) -> None:
        """Bring Ray up, and the shards. Raises what ray.init raises."""
        local = self._config.address == "local"
        if local:
            # Where the dashboard's libraries happen to be installed, Ray would start its agent with
            # all its modules (a job server among them) and wait for it, a third of its start-up.
            sys.modules["ray.dashboard.optional_deps"] = None  # type: ignore[assignment]
        bounds: dict[str, Any] = {
            "num_cpus": self._config.cpus,
            "num_gpus": 0,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_temp_dir": self._config.temp_dir,
            "_node_ip_address": "127.0.0.1",
        }
        ray.init(
            address=self._config.address,
            namespace=NAMESPACE,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_config=ray.LoggingConfig(encoding="JSON", log_level="INFO"),
            **(bounds if local else {}),
        )
        # The database and the blobs may be this machine's files, so the work stays where they are.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            node_id=ray.get_runtime_context().get_node_id(), soft=False
        )
        # Shards wait for the database and compute little: they reserve no CPU of their own. Who
        # finds one dead makes a new one, so Ray restarts none by itself.
        make = ray.remote(ShardActor).options(
            num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy=here
        )
        url, count = self._config.database_url, self._config.shards
        self._keeper = ShardKeeper(count, lambda n: make.remote(url, n, count), ray.kill)
        retried = {"max_retries": _MAX_TASK_RETRIES, "scheduling_strategy": here}
        self._verify = ray.remote(verify).options(num_cpus=1, **retried)
        self._settle = ray.remote(settle_batch).options(num_cpus=1, **retried)
        self._check_pack = ray.remote(check_pack).options(num_cpus=1, **retried)
        self._whole = ray.remote(whole_in_packs).options(num_cpus=1, **retried)
        self._move = ray.remote(move_packs).options(num_cpus=1, **retried)

    def warm(self) -> None:
        """Once the shards are up, let the workers load our code: the first checkpoint's verdict
        should not wait for it."""
        try:
            self.shard_pids()
            ray.get([self._settle.remote([]) for _ in range(self._config.cpus)])
        except ray.exceptions.RayError as error:
            log.warning("the workers could not be warmed up: %s", error)

    def ping(self) -> bool:
        """Say whether the control store answers and this machine's node is alive."""
        return any(node["Alive"] for node in ray.nodes())

    def rebuild(self) -> bool:
        """Replace all shards by new ones, which read the database."""
        with self._lock:
            self._keeper.rebuild()
        return True

    def propose(self, changes: list[list[Any]], now_ms: int) -> list[ShardReply | None]:
        """Ask all shards at once; None stands for one that does not answer."""
        with self._lock:
            asked = [
                actor.propose.remote(mine, now_ms)
                for actor, mine in zip(self._keeper.actors, changes)
            ]
            ready, _late = ray.wait(asked, num_returns=len(asked), timeout=SHARD_ANSWER_S)
            return self._keeper.judge(
                [self._heard(n, it) if it in ready else Silence.LATE for n, it in enumerate(asked)]
            )

    def _heard(self, number: int, reference: Any) -> ShardReply | Silence:
        try:
            reply: ShardReply = ray.get(reference)
        except ray.exceptions.RayError as error:
            log.warning("shard %d: %s", number, error)
            return Silence.DEAD
        return reply

    def verify(self, task: Any) -> Any:
        """Check one checkpoint in a task; a worker that is killed is replaced."""
        return ray.get(self._verify.remote(task, self._config.blobs))

    def settle(self, batch: Any) -> Any:
        """Decide a batch of settlements in a task."""
        return ray.get(self._settle.remote(batch))

    def check_pack(self, pack: str, name: str, table: bytes, size_bytes: int) -> Any:
        """Hash one pack in a task."""
        where = self._config.blobs
        return ray.get(self._check_pack.remote(pack, name, table, size_bytes, where))

    def whole_in_packs(self, contents: Any) -> Any:
        """Hash what lies in packs in a task."""
        return ray.get(self._whole.remote(contents, self._config.blobs))

    def move_packs(self, contents: Any, to: str) -> Any:
        """Write a new pack in a task."""
        return ray.get(self._move.remote(contents, to, self._config.blobs))

    def shard_pids(self) -> list[int]:
        """Return the process ids of the shards, for tests and for people who look for them."""
        pids: list[int] = ray.get([actor.pid.remote() for actor in self._keeper.actors])
        return pids

    def serve(self, connection: Connection) -> None:
        """Answer until the broker closes its end."""
        sending = threading.Lock()

        def answer(number: int, name: str, arguments: tuple[Any, ...]) -> None:
            try:
                reply = (number, True, self._operations[name](*arguments))
            except Exception as error:  # noqa: BLE001 - the broker is told, and decides
                reply = (number, False, f"{type(error).__name__}: {error}")
            try:
                with sending:
                    connection.send(reply)
            except (BrokenPipeError, ConnectionError):
                return  # the broker is gone; the loop below notices as well

        # The broker bounds what it asks for at once; threads only wait for Ray.
        pool = ThreadPoolExecutor(max_workers=16, thread_name_prefix="host")
        pool.submit(self.warm)
        while True:
            try:
                number, name, arguments = connection.recv()
            except (EOFError, ConnectionError):
                ray.shutdown()
                return
            pool.submit(answer, number, name, arguments)


def _end_if_alone(descriptor: int, started: threading.Event) -> None:
    """End this process at once if the broker goes while Ray still starts.

    ray.init may never return then: the next broker sweeps the folder with Ray's sockets. Ray's own
    processes end with the one that started them.
    """
    watched = select.poll()
    watched.register(descriptor, 0)  # nothing but the hang-up
    watched.poll()
    if not started.is_set():
        os._exit(1)


def main() -> None:
    """Serve on the descriptor that the broker names in the first argument."""
    descriptor = int(sys.argv[1])
    # Ray's processes must not hold it: the broker sees that we are gone by its closing.
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    config: HostConfig = HostConfig(**connection.recv())
    host = Host(config)
    started = threading.Event()
    threading.Thread(
        target=_end_if_alone, args=(descriptor, started), name="alone", daemon=True
    ).start()
    try:
        host.start()
    except Exception as error:
        connection.send((0, False, f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error
    started.set()
    connection.send((0, True, os.getpid()))
    host.serve(connection)
    # A broker that was killed can't do it; one that lives does it as well.
    shutil.rmtree(Path(config.temp_dir).parent, ignore_errors=True)
    os._exit(0)  # threads that still wait for Ray have nobody left to answer


if __name__ == "__main__":
    main()
