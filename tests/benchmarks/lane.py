"""One lane of the recovery benchmarks: a job without end, and a machine ready to take it over.

Every lane has a region of its own, so that several can share a broker without sharing machines. A
round disturbs the machine that holds the job, and measures until the job makes its first new step
on the other one. The machine that was disturbed is then replaced by a new one with a key of its
own, so no round meets a provider with a past.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sublet.client import Client, Job
from sublet.demo.local import LocalMarket
from sublet_contracts.api import EventView, JobView
from sublet_contracts.reasons import Reason

JOB_SCRIPT = Path(__file__).parents[1] / "e2e" / "training_job.py"
ENDLESS = 1_000_000
EVERY = 10
PACE_S = 0.2
POLL_S = 0.25
LIMIT_S = 120.0
ENDED = ("succeeded", "failed", "cancelled", "paused")
STEP = re.compile(r"step (\d+) ")


class RoundFailed(RuntimeError):
    """The job didn't come back; the message says where it stood."""


@dataclass(frozen=True)
class Round:
    """What came of one disturbance. Times are seconds; `began_ms` and the rest by one clock."""

    lane: str
    phase_s: float
    began_ms: int
    """The kill, or the owner's command."""
    ended_ms: int
    """The old lease's end became known: lease closed, or (reclaim) the run's exit."""
    proposed_ms: int
    running_ms: int
    first_step_ms: int
    prepared: bool
    """Whether the successor had fetched image and checkpoint before it was needed."""
    start_step: int
    steps_lost: int

    @property
    def total_s(self) -> float:
        """From the disturbance to the first new step."""
        return (self.first_step_ms - self.began_ms) / 1000

    @property
    def detection_s(self) -> float:
        """From the disturbance until the broker closed the book on the old run."""
        return (self.ended_ms - self.began_ms) / 1000

    @property
    def rest_s(self) -> float:
        """From there to the first new step."""
        return (self.first_step_ms - self.ended_ms) / 1000

    @property
    def match_s(self) -> float:
        """From there until the successor was offered the lease."""
        return (self.proposed_ms - self.ended_ms) / 1000

    @property
    def start_s(self) -> float:
        """Sign, pull, restore, start."""
        return (self.running_ms - self.proposed_ms) / 1000

    @property
    def step_s(self) -> float:
        """The job's own start-up and its first step."""
        return (self.first_step_ms - self.running_ms) / 1000


@dataclass
class Lane:
    """A region with its agents and its job."""

    name: str
    market: LocalMarket
    client: Client
    runner: str
    image: str
    say: Callable[[str], None]
    job: Job | None = None
    machines: list[str] = field(default_factory=list)
    """Those that live: the holder and the one that is ready to take over."""
    _made: int = 0
    _last_event: int = 0
    _last_line: int = -1

    def begin(self) -> None:
        """Start two machines and the job."""
        for _ in range(2):
            self.add_machine()
        self.await_offers()
        self.job = self.client.run(
            image=self.image,
            command=[
                "python3",
                "/job/training_job.py",
                "--steps",
                str(ENDLESS),
                "--every",
                str(EVERY),
                "--pace-s",
                str(PACE_S),
                "--out",
                "/out",
            ],
            gpus="cpu",
            max_price="1.00",
            budget="2",
            outputs="/out",
            name=self.name,
            inputs={str(JOB_SCRIPT): "/job/training_job.py"},
            region=self.name,
            memory="256MB",
            disk="256MB",
            cpus=0.5,
        )

    def add_machine(self) -> None:
        """Start an agent with a new key."""
        name = f"{self.name}-{self._made}"
        self._made += 1
        allowed = ("--allow-image", self.image) if self.runner == "docker" else ()
        self.market.start_agent(
            name,
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
        self.machines.append(name)

    def await_offers(self) -> None:
        """Wait until all machines of this lane are on the market."""
        wanted = set(self.machines)
        self.market.wait_for(
            lambda: wanted <= {o.name for o in self.client.offers(region=self.name).offers},
            f"the offers of {self.name}",
            self.market.agents[self.machines[-1]],
        )

    @property
    def running_job(self) -> Job:
        """The job."""
        if self.job is None:
            raise RoundFailed(f"{self.name} has not begun")
        return self.job

    def until(self, condition: Callable[[JobView], bool], what: str) -> JobView:
        """Look at the job until `condition` holds. Raises RoundFailed."""
        deadline = time.monotonic() + LIMIT_S
        while not condition(view := self.running_job.view()):
            if view.state in ENDED or time.monotonic() > deadline:
                raise RoundFailed(f"{self.name}: {view.state} ({view.says}), no {what}")
            time.sleep(POLL_S)
        return view

    def until_durable(self) -> JobView:
        """Wait until the newest run has made a durable checkpoint of its own."""
        return self.until(
            lambda view: bool(view.runs) and view.durable_step > view.runs[-1].start_step,
            "durable checkpoint",
        )

    def play(self, phase_s: float, disturb: Callable[[str], None], *, notice: bool) -> Round:
        """Play one round: `disturb` the holder `phase_s` after a durable checkpoint."""
        self.await_offers()
        view = self.until_durable()
        held, holder = view.runs[-1], view.runs[-1].provider_name
        time.sleep(phase_s)  # any phase of the heartbeat is as likely as any other
        began_ms = time.time_ns() // 1_000_000
        disturb(holder)
        reached = self.market.last_step(holder)
        self.until(lambda view: view.runs[-1].epoch > held.epoch, "successor")
        start_step = self.running_job.view().runs[-1].start_step
        first_step_ms = self._first_step(held.epoch + 1, start_step)
        took_over = self.running_job.view().runs[-1]
        if took_over.epoch != held.epoch + 1:
            raise RoundFailed(f"{self.name}: the first successor did not hold")
        events = self._new_events()
        ended = (
            _find(events, held.epoch, "run", "exited")
            if notice
            else _find(events, held.epoch, "lease", "closed", Reason.PROVIDER_LOST)
        )
        done = Round(
            lane=self.name,
            phase_s=phase_s,
            began_ms=began_ms,
            ended_ms=ended.time_ms,
            proposed_ms=_find(events, took_over.epoch, "lease", "proposed").time_ms,
            running_ms=_find(events, took_over.epoch, "run", "running").time_ms,
            first_step_ms=first_step_ms,
            prepared=any(
                e.kind == "successor" and e.epoch == held.epoch and e.after == "ready"
                for e in events
            ),
            start_step=start_step,
            steps_lost=max(0, reached - start_step),
        )
        self.running_job.cosign()
        self.market.agents[holder].stop()
        self.machines.remove(holder)
        self.add_machine()
        return done

    def _first_step(self, epoch: int, start_step: int) -> int:
        """Return when the run of `epoch` printed its first step beyond `start_step`.

        The line's time is the one that the runner stamped on it, on this same machine.
        """
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            for line in self.running_job.logs(after=self._last_line):
                self._last_line = line.cursor
                found = STEP.match(line.text)
                if line.epoch >= epoch and found and int(found[1]) > start_step:
                    return line.time_ms
            time.sleep(POLL_S)
        raise RoundFailed(f"{self.name}: no step beyond {start_step} within {LIMIT_S:.0f} s")

    def _new_events(self) -> list[EventView]:
        """Return the job's history since the last round's end."""
        found: list[EventView] = []
        while page := self.running_job.events(after=self._last_event).events:
            found += page
            self._last_event = page[-1].id
        return found


def _find(
    events: Sequence[EventView], epoch: int, kind: str, after: str, reason: Reason | None = None
) -> EventView:
    for event in events:
        if (event.kind, event.epoch, event.after) == (kind, epoch, after):
            if reason is not None and event.reason is not reason:
                raise RoundFailed(f"epoch {epoch} ended for {event.reason}, not {reason}")
            return event
    raise RoundFailed(f"epoch {epoch} has no event {kind} -> {after}")
