"""What befalls machines and jobs, as the world has taught it: devices, engines, registries, memory,
signals. The machine supplies the truth and what is seen of it; the agent's core judges."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from sublet_agent.core import events
from sublet_agent.core.run_phases import RunPhase
from sublet_contracts.reasons import Reason
from tests.simulation.registry import EVERYBODY, TAGS

if TYPE_CHECKING:
    from tests.simulation.agents import AgentHost
    from tests.simulation.engine import Engine
    from tests.simulation.jobs import Container
    from tests.simulation.market import Market


class Mishaps:
    """The part of Chaos that is about them."""

    market: Market
    engine: Engine
    over: bool

    def _agent(self) -> AgentHost:
        return self.engine.random.choice(self.market.agents)

    def _busy_agent(self) -> AgentHost:
        """Return mostly one that runs something."""
        found = self._some_run() if self.engine.happens(0.8) else None
        return found[0] if found else self._agent()

    def _some_run(self) -> tuple[AgentHost, Container] | None:
        """Return a run that is under way somewhere."""
        running = [
            (agent, container)
            for agent in self.market.agents
            for container in agent.containers.values()
            if container.running
        ]
        return self.engine.random.choice(running) if running else None

    def _run_killed(self) -> None:
        found = self._some_run()
        if found is None:
            return
        _, container = found
        match self.engine.random.choice(("unseen", "unseen", "worker", "by someone", "seen")):
            case "unseen":
                container.ends(137, "killed unseen", signal=9)
            case "worker":
                number = self.engine.random.choice((9, 15))
                ends = {"returned": True, "worker_signal": number}  # as a shell passes it on
                container.ends(128 + number, "killed unseen", **ends)
            case "by someone":
                says = "something sent it KILL, of the run or not"
                container.ends(137, "killed unseen", unknown_signal=says)
            case "seen":
                container.ends(137, "killed from outside", outside_signal="pid 1 of the host: KILL")

    def _self_kill(self) -> None:
        """A job ends itself in ways that look as if somebody else had."""
        found = self._some_run()
        if found is None:
            return
        _, container = found
        match self.engine.random.choice(("returns", "returns", "TERM", "KILL")):
            case "returns":
                code = self.engine.random.choice((137, 143))
                container.ends(code, "failed", returned=True)
            case "TERM":
                container.ends(143, "killed unseen")
            case "KILL":
                container.ends(137, "killed unseen")

    def _stall(self) -> None:
        """A job stands still: its machine is well, and it hears nothing."""
        found = self._some_run()
        if found is not None and found[1].stalls:
            found[1].hang()

    def _worker_oom(self) -> None:
        """The kernel kills one of its workers, and the job ends with that, in its own way."""
        found = self._some_run()
        if found is not None:
            found[1].ends(self.engine.random.choice((1, 137)), "memory", out_of_memory=True)

    def _gpu_lost(self) -> None:
        found = self._some_run() if self.engine.happens(0.8) else None
        agent = found[0] if found else self._agent()
        devices = found[1].devices if found else tuple(d.id for d in agent.terms.devices)
        agent.lose_device(self.engine.random.choice(devices), self.engine.draw_ms(5_000, 600_000))

    def _engine(self) -> None:
        draw = self.engine.random
        found = self._some_run() if self.engine.happens(0.8) else None
        if found is not None and self.engine.happens(0.6):
            says = "the engine was asked to stop it"
            found[1].engine_stops(says, patient=draw.random() < 0.7)
            return
        agent = found[0] if found else self._agent()
        if draw.random() < 0.3:
            agent.engine_stumbles_ms = self.engine.draw_ms(500, 8_000)
            return
        agent.restart_engine(self.engine.draw_ms(1_000, 40_000), keeps_runs=draw.random() < 0.3)

    def _registry(self) -> None:
        registry = self.market.registry
        span_ms = self.engine.draw_ms(5_000, self.engine.random.choice((60_000, 1_200_000)))
        whom = EVERYBODY if self.engine.happens(0.5) else self._agent().name
        if self.engine.happens(0.4):
            registry.is_busy(span_ms, whom)
        elif self.engine.happens(0.5):
            registry.push(self.engine.random.choice(TAGS))
        elif self.engine.happens(0.4):
            registry.lacks(self.engine.random.choice(registry.known()), span_ms, whom)
        else:
            self._image_deleted()

    def _image_deleted(self) -> None:
        """An image that is old by now is deleted, and a machine is taken back whose job had run on
        it, and has something durable."""
        found = [
            (agent, run.record)
            for agent in self.market.agents
            for run in (agent.core.runs.values() if agent.up else ())
            if run.record.phase is RunPhase.RUNNING
            and (run.record.checkpoint is not None or run.record.durable_step)
        ]
        if found:
            agent, record = self.engine.random.choice(found)
            image = record.image or record.job.image
            self.market.registry.lacks(image, self.engine.draw_ms(400_000, 1_200_000))
            self._take_back(agent)

    def _reclaim(self) -> None:
        """An owner takes his machine back: at once, or just when a run is about to finish, which it
        does while it saves."""
        found = self._some_run() if self.engine.happens(0.6) else None
        if found is None or found[1].folder is not None:
            self._take_back(self._agent())
            return
        agent, container = found
        at_ms = container.finishes_in_ms() - self.engine.draw_ms(0, container.program.save_ms)

        def take_back() -> None:
            if container.running and not self.over:
                self._take_back(agent, least_grace_ms=30_000)

        self.engine.after(at_ms, take_back)

    def _take_back(self, agent: AgentHost, least_grace_ms: int = 0) -> None:
        if not agent.up:
            return
        reason = self.engine.random.choice((Reason.RECLAIMED, Reason.PROVIDER_DRAINED))
        grace_ms = max(least_grace_ms, self.engine.random.choice((0, 5_000, 30_000, 60_000)))
        agent._later(1, lambda: agent.drain(reason, grace_ms))
        agent._later(self.engine.draw_ms(30_000, 300_000), lambda: agent.post(events.OfferAgain()))

    def _slow_registry(self) -> None:
        whom = EVERYBODY if self.engine.happens(0.6) else self._agent().name
        self.market.registry.is_slow(self.engine.draw_ms(60_000, 1_200_000), whom)

    def _start_fails(self) -> None:
        agent = self._busy_agent()
        agent.breaks_by = self.engine.random.choice(("start", "flaky", "flaky", "odd"))
        if agent.breaks_by == "flaky":
            span_ms = self.engine.draw_ms(600_000, 3_600_000)
        else:
            most_ms = self.engine.random.choice((60_000, 600_000, 3_600_000))
            span_ms = self.engine.draw_ms(10_000, most_ms)
        agent.broken_until_ms = self.engine.now_ms + span_ms
        if agent.breaks_by == "odd" and agent.up and agent.core.runs:
            lease_id = self.engine.random.choice(sorted(agent.core.runs))
            agent._later(self.engine.draw_ms(1, 20_000), partial(agent.quarantine, lease_id))

    def _deadline(self) -> None:
        """An agent dies and stays away for longer than its runs may live without it."""
        found = self._some_run()
        agent = found[0] if found else self._agent()
        agent.die(self.engine.draw_ms(60_000, 3_600_000))
