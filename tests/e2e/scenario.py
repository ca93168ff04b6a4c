"""One fault, played on a market of real processes: its agents, its job, and what came of it.

Scenarios share a broker and run beside each other; each has a region of its own, so that its job
only meets its own agents.
"""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sublet.client import Client, Job
from sublet.demo.local import LocalMarket, LocalProcess
from sublet_contracts.api import JobView, StatementView
from sublet_contracts.ckpt_helper_install import write_helper
from sublet_contracts.export import Verdict, verify_export

JOB_SCRIPT = Path(__file__).with_name("training_job.py")
STEPS = 80
EVERY = 5
PACE_S = 0.3
HOLD_AT = 52
LIMIT_S = 240.0
POLL_S = 0.2
ENDED = ("succeeded", "failed", "cancelled", "paused")


@dataclass
class Outcome:
    """What a renter can see once the job has ended."""

    view: JobView
    statement: StatementView
    verdict: Verdict
    weights: bytes | None
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """How many leases the job took."""
        return len(self.view.runs)


@dataclass
class Scenario:
    """A region of the market with two agents and one job."""

    name: str
    market: LocalMarket
    client: Client
    runner: str
    image: str
    folder: Path
    job: Job | None = None
    weights_file: str = "weights.json"
    """in its outputs; '': it has none"""

    def agent_name(self, index: int) -> str:
        """Return the name of its first (0) or second (1) agent."""
        return f"{self.name}-{index}"

    def start_agent(self, index: int) -> LocalProcess:
        """Start an agent, or start it again with the same state."""
        allowed = ("--allow-image", self.image) if self.runner == "docker" else ()
        return self.market.start_agent(
            self.agent_name(index),
            *allowed,
            "--runner",
            self.runner,
            "--region",
            self.name,
            "--trust",
            self.client.party,
            "--image-policy",
            "any",
        )

    def begin(self, agents: int = 2, *, hold: bool = False, **options: object) -> Job:
        """Start the agents, wait for them to be on the market, submit the job.

        `hold`: its first run stops short of the end until it is lost, or asked to stop.
        """
        for index in range(agents):
            self.start_agent(index)
        wanted = {self.agent_name(index) for index in range(agents)}
        self.market.wait_for(
            lambda: wanted <= {o.name for o in self.client.offers().offers},
            f"the agents of {self.name}",
            self.market.agents[self.agent_name(0)],
        )
        settings: dict[str, object] = {
            "image": self.image,
            "command": [
                "python3",
                "/job/training_job.py",
                "--steps",
                str(STEPS),
                "--every",
                str(EVERY),
                "--pace-s",
                str(PACE_S),
                *(("--hold-at", str(HOLD_AT)) if hold else ()),
                "--out",
                "/out",
            ],
            "gpus": "cpu",
            "max_price": "1.00",
            "budget": "1",
            "inputs": {str(JOB_SCRIPT): "/job/training_job.py"},
            "outputs": "/out",
            "name": self.name,
            "region": self.name,
            "memory": "256MB",
            "disk": "256MB",
            "cpus": 0.5,
        }
        self.job = self.client.run(**{**settings, **options})  # type: ignore[arg-type]
        return self.job

    @property
    def submitted(self) -> Job:
        """The job."""
        assert self.job is not None
        return self.job

    def until(self, condition: Callable[[JobView], bool], what: str) -> JobView:
        """Look at the job until `condition` holds; fail after LIMIT_S or when it has ended."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            view = self.submitted.view()
            if condition(view):
                return view
            assert view.state not in ENDED, f"{self.name}: {view.state} ({view.says}) before {what}"
            assert time.monotonic() < deadline, f"{self.name}: {what} did not come; {view.says}"
            time.sleep(POLL_S)

    def until_durable(self, step: int = 2 * EVERY) -> JobView:
        """Wait until the job has a durable checkpoint at `step` or later."""
        return self.until(lambda view: view.durable_step >= step, f"a durable step {step}")

    def kill_agent(self, index: int) -> None:
        """kill -9 the agent's process; its run goes on."""
        self.market.agents[self.agent_name(index)].kill()

    def kill_run(self, index: int) -> int:
        """kill -9 every process of the run on that agent's machine."""
        return self.market.kill_run(self.submitted.id, self.agent_name(index), self.runner)

    def holder(self, view: JobView) -> int:
        """Return which of the two agents holds the newest lease."""
        return int(view.runs[-1].provider_name.rsplit("-", 1)[-1])

    def finish(self, **notes: float) -> Outcome:
        """Wait for the job's end, gather all that can be checked, stop the agents."""
        job = self.submitted
        deadline = time.monotonic() + LIMIT_S
        while (view := job.view()).state not in ENDED:
            assert time.monotonic() < deadline, f"{self.name}: did not end; {view.says}"
            job.cosign()
            time.sleep(POLL_S)
        job.cosign()
        weights = None
        if view.state == "succeeded" and self.weights_file:
            job.download(self.folder / "out")
            weights = (self.folder / "out" / self.weights_file).read_bytes()
        export = job.export()
        (self.folder / "export.json").write_bytes(export)
        outcome = Outcome(
            job.view(),
            job.statement(),
            verify_export(export, broker=self.market.broker_id),
            weights,
            dict(notes),
        )
        self.stop_agents()
        return outcome

    def stop_agents(self) -> None:
        """Stop this scenario's agents."""
        # A copy: other scenarios start agents of theirs meanwhile.
        for name, agent in list(self.market.agents.items()):
            if name.startswith(self.name + "-"):
                agent.stop()


def undisturbed_weights(folder: Path) -> bytes:
    """Return the weights of the same job, run here without any market."""
    write_helper(folder / "helper")
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder / "helper"),
        "SUBLET_CHECKPOINT_DIR": str(folder / "checkpoint"),
    }
    (folder / "checkpoint").mkdir()
    subprocess.run(
        [
            sys.executable,
            str(JOB_SCRIPT),
            "--steps",
            str(STEPS),
            "--every",
            str(EVERY),
            "--pace-s",
            "0",
            "--out",
            str(folder / "out"),
        ],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    return (folder / "out" / "weights.json").read_bytes()


def sha256(data: bytes) -> str:
    """Return the hash that a failing comparison shows instead of the bytes."""
    return hashlib.sha256(data).hexdigest()
