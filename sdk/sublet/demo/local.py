"""A market on this machine: a broker and agents as processes of their own, started and killed.

Used by `sublet demo` and by the end-to-end tests. Every process is started exactly as an owner or
an operator would, through the command line; nothing here reaches into their insides.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_LIMIT_S = 180.0
JOB_LABEL = "sublet.job"
"""The label with which the Docker runner marks its containers."""


class LocalMarketError(RuntimeError):
    """A process of the local market didn't do what it should; the message ends with its log."""


@dataclass
class LocalProcess:
    """One `sublet ...` process with its log file."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    within: Sequence[str] = ()
    """What it's started by, if anything: a command that becomes it, as `ip netns exec` does."""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it in a session of its own, so that a Ctrl-C here does not reach it first."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.within, sys.executable, "-m", "sublet.cli.main", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        if self.process is None:
            raise LocalMarketError(f"{self.name} has not been started")
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal (it alone: its runs are not its group)."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, and wait until it's gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self, limit_s: float = 30.0) -> None:
        """SIGTERM, then after `limit_s` SIGKILL."""
        if self.process is None or self.process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_tail(self, lines: int = 25) -> str:
        """Return the end of its log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@dataclass
class LocalMarket:
    """A broker, its agents and their folders below `root`."""

    root: Path
    broker_arguments: Sequence[str] = ()
    ray: str = "local"
    """what the broker's --ray is"""
    broker: LocalProcess | None = None
    agents: dict[str, LocalProcess] = field(default_factory=dict)
    url: str = ""
    broker_id: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process: configuration below `root`, not the user's own."""
        return {
            "XDG_CONFIG_HOME": str(self.root / "config"),
            "XDG_STATE_HOME": str(self.root / "state"),
            "XDG_DATA_HOME": str(self.root / "data"),
            "SUBLET_BROKER": self.url,
            "SUBLET_PROFILE": "",
        }

    @property
    def operator_key(self) -> Path:
        """The broker's key file, which is the operator's."""
        return self.root / "broker" / "broker.key"

    def within(self, name: str) -> Sequence[str]:
        """Return what the process of this name is started by; for tests to say."""
        return ()

    def start_broker(self, listen: str = "127.0.0.1:0") -> None:
        """Start the broker and wait until it's ready. Raises LocalMarketError."""
        ready = self.root / "broker" / "listen.json"
        ready.unlink(missing_ok=True)
        arguments = ["broker", "--listen", listen, "--data", str(self.root / "broker")]
        arguments += ["--ray", self.ray]
        self.broker = LocalProcess(
            "broker",
            [*arguments, *self.broker_arguments],
            self.environment,
            self.root / "logs" / "broker.log",
            self.within("broker"),
        )
        self.broker.start()
        self.wait_for(ready.exists, "the broker to be ready", self.broker)
        said = json.loads(ready.read_text())
        self.url, self.broker_id = said["url"], said["broker"]

    def restart_broker(self) -> None:
        """Start the broker again on the port that it had."""
        self.start_broker(self.url.rsplit("/", 1)[-1])

    def start_agent(self, name: str, *arguments: str, price: str = "0.40") -> LocalProcess:
        """Start (or start again) an agent that offers this machine's CPU."""
        agent = LocalProcess(
            name,
            [
                "provide",
                "--broker",
                self.url,
                "--state",
                str(self.root / name),
                "--name",
                name,
                "--price",
                price,
                "--cpu",
                *arguments,
            ],
            self.environment,
            self.root / "logs" / f"{name}.log",
            self.within(name),
        )
        agent.start()
        self.agents[name] = agent
        return agent

    def command(self, *arguments: str) -> str:
        """Run a `sublet` command on this market and return what it prints.

        Raises LocalMarketError with its error output if it fails.
        """
        done = subprocess.run(
            [sys.executable, "-m", "sublet.cli.main", *arguments],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise LocalMarketError(
                f"sublet {' '.join(arguments)} exited with {done.returncode}:\n"
                f"{done.stdout[-1000:]}{done.stderr[-2000:]}"
            )
        return done.stdout

    def wait_for(
        self,
        condition: Callable[[], object],
        what: str,
        process: LocalProcess | None = None,
        limit_s: float = START_LIMIT_S,
    ) -> None:
        """Wait until `condition` is true. Raises LocalMarketError if `process` ends before that."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if process is not None and not process.running:
                raise LocalMarketError(
                    f"{process.name} ended while waiting for {what}:\n{process.log_tail()}"
                )
            if time.monotonic() > deadline:
                tail = process.log_tail() if process else ""
                raise LocalMarketError(f"waited {limit_s:.0f} s for {what}\n{tail}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop the agents, then the broker, and end what they left running."""
        for agent in self.agents.values():
            agent.stop()
        if self.broker:
            self.broker.stop()
        for pid in self.run_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for container in self.containers(stopped=True):
            container.remove(force=True)

    def run_processes(self, job: str | None = None, agent: str | None = None) -> list[int]:
        """Return the processes of runs on this machine that belong to this market.

        They are known by their environment: SUBLET_CHECKPOINT_DIR lies below an agent's folder.
        """
        prefix = str(self.root / agent) if agent else str(self.root)
        found = []
        for pid, environment in _environments():
            folder = environment.get("SUBLET_CHECKPOINT_DIR", "")
            if not folder.startswith(prefix + os.sep):
                continue
            if job is None or environment.get("SUBLET_JOB_ID") == job:
                found.append(pid)
        return found

    def processes(self) -> dict[int, str]:
        """Return all processes that come of this market, Ray's too, and how each was called: they
        inherit its environment."""
        config = self.environment["XDG_CONFIG_HOME"]
        found = {}
        for pid, environment in _environments():
            if environment.get("XDG_CONFIG_HOME") == config:
                with contextlib.suppress(OSError):  # it may have ended
                    command = Path(f"/proc/{pid}/cmdline").read_bytes()[:80]
                    found[pid] = command.replace(b"\0", b" ").decode(errors="replace").strip()
        return found

    def containers(
        self, job: str | None = None, agent: str | None = None, *, stopped: bool = False
    ) -> list[Any]:
        """Return this market's containers (Docker SDK objects), known by what they mount.

        None where no Docker Engine answers.
        """
        try:
            docker = importlib.import_module("docker")
            engine = docker.from_env(timeout=20)
        except (ImportError, OSError, RuntimeError):
            return []
        except Exception as error:
            # docker.errors.DockerException can't be named before docker has been imported.
            if type(error).__name__ != "DockerException":
                raise
            return []
        prefix = str(self.root / agent) if agent else str(self.root)
        labels = {"label": f"{JOB_LABEL}={job}" if job else JOB_LABEL}
        found = engine.containers.list(all=stopped, filters=labels, ignore_removed=True)
        return [
            container
            for container in found
            if any(
                m.get("Source", "").startswith(prefix + os.sep) for m in container.attrs["Mounts"]
            )
        ]

    def last_step(self, agent: str) -> int:
        """Return the newest step that the run on `agent` wrote down, by the checkpoint protocol.

        It's newer than what the agent had time to report. 0: it wrote none.
        """
        steps = [0]
        for file in (self.root / agent).glob("runs/*/checkpoint/progress.json"):
            steps.append(int(json.loads(file.read_text())["step"]))
        return max(steps)

    def kill_run(self, job: str, agent: str, runner: str) -> int:
        """kill -9 every process of the run that `agent` has of `job`; return how many.

        With Docker the container's processes are killed through the engine.
        """
        if runner == "docker":
            containers = self.containers(job, agent)
            for container in containers:
                container.kill(signal="SIGKILL")
            return len(containers)
        pids = self.run_processes(job, agent)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            raw = (entry / "environ").read_bytes()
        except OSError:
            # Gone meanwhile, or another user's: not one of ours.
            continue
        pairs = (item.split("=", 1) for item in raw.decode(errors="replace").split("\0"))
        yield int(entry.name), {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
