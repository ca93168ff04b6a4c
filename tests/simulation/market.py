"""One simulated market: a broker, providers, renters, the faults that befall them, and the calm
after which everything must come to its end."""

from __future__ import annotations

import functools
import gc
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from sublet.log_head import LogRewritten
from sublet_agent.core.offers import Terms
from sublet_broker.service.settings import Settings
from sublet_contracts.documents import Device
from sublet_contracts.keys import SigningKey
from tests.simulation import shortcuts
from tests.simulation.agents import AgentHost
from tests.simulation.auditor import Auditor
from tests.simulation.broker import BrokerHost
from tests.simulation.by_address import Awaited
from tests.simulation.cadences import Cadences
from tests.simulation.chaos import Chaos
from tests.simulation.doom import CrashPoints
from tests.simulation.engine import Engine
from tests.simulation.lifetimes import Lifetimes
from tests.simulation.matching import Matching
from tests.simulation.models import Violation
from tests.simulation.registry import Registry
from tests.simulation.renters import RenterHost
from tests.simulation.silence import Silence
from tests.simulation.stalls import Stalls

MINUTE_MS = 60_000
HOUR_MS = 3_600_000
SCRUB_EVERY_MS = 20 * MINUTE_MS
UPLOAD_OPEN_MS = 10 * MINUTE_MS
CALM_MS = 6 * HOUR_MS
"""Every job must have ended so long after the last fault: the bound of liveness."""
REGIONS = ("home", "lab", "attic")
"""With one class of hardware: so many pools."""
AGENT_CALM_MS = 10 * MINUTE_MS
"""And every agent must have put everything away so long after that."""


@dataclass(frozen=True)
class Plan:
    """What markets are to be simulated."""

    faults: frozenset[str]
    hours: float = 1.5
    jobs: int = 20
    providers: int = 5
    renters: int = 3
    fault_every_ms: int = MINUTE_MS


@dataclass(frozen=True)
class Outcome:
    """What became of one market."""

    seed: int
    digest: str
    violation: str = ""
    last: tuple[str, ...] = ()
    steps: int = 0
    simulated_ms: int = 0
    counts: tuple[tuple[str, int], ...] = ()
    reasons: tuple[tuple[str, int], ...] = ()
    """By which leases were settled, and how often."""
    points: frozenset[str] = frozenset()
    """Where a process could have died: each side of each kind of commit and effect."""
    crashed: frozenset[str] = frozenset()
    """Where one did."""
    jobs: int = 0
    charged_ucr: int = 0
    lost_device_ms: int = 0


@functools.cache
def key_named(name: str) -> SigningKey:
    """Return the key that belongs to a name: the same in every market."""
    return SigningKey.from_seed(hashlib.sha256(name.encode()).digest())


class Market:
    """A market under simulation."""

    def __init__(self, seed: int, plan: Plan, trace: Callable[[str], None] | None = None) -> None:
        self.plan = plan
        self.seed = seed
        self.engine = Engine(seed, trace=trace)
        self.counts: Counter[str] = Counter()
        self.points = CrashPoints()
        self.settings = Settings(scrub_every_ms=SCRUB_EVERY_MS, upload_open_ms=UPLOAD_OPEN_MS)
        self.broker_key = key_named("broker")
        self.names: dict[str, str] = {}
        self.verifier_dies = False
        self.verified_ms: dict[str, int] = {}
        """When the content of each checkpoint was verified last; true time."""
        self.honest = True
        """Whether the broker's log is what it was."""
        self.registry = Registry(self.engine)
        self.shards = self.engine.draw_ms(1, 3)
        self.auditor = Auditor(self)
        self.matching = Matching(self)
        self.silence = Silence(self)
        self.lifetimes = Lifetimes(self)
        self.stalls = Stalls(self)
        self.cadences = Cadences(self)
        self.awaited = Awaited(self)
        self.broker = BrokerHost(self)
        self.agents = [self._agent(n) for n in range(plan.providers)]
        self.agents_by_party = {agent.party: agent for agent in self.agents}
        self.renters = [RenterHost(self, n) for n in range(plan.renters)]
        self.chaos = Chaos(self)

    def count(self, what: str) -> None:
        """Count something for the report."""
        self.counts[what] += 1

    def _agent(self, number: int) -> AgentHost:
        draw = self.engine.random
        name = f"provider-{number}"
        devices = tuple(
            Device(
                id=f"GPU-{number}-{n}",
                kind="gpu",
                name="NVIDIA RTX 4090",
                memory_bytes=24 * 10**9,
                hardware_class="rtx4090",
            )
            for n in range(2 if number == 0 else draw.choice((1, 1, 2)))
        )
        terms = Terms(
            name=name,
            devices=devices,
            price_ucr_per_device_hour=draw.choice((720_001, 1_000_000, 1_999_999, 2_500_000)),
            cpu_millis=draw.choice((2_000, 8_000, 8_000)),
            memory_bytes=32 * 10**9,
            disk_bytes=100 * 10**9,
            region=draw.choice(REGIONS),
            runner="docker",
            image_policy="any",
            egress=False,
            accepts=(),
            grace_ms=30_000,
        )
        agent = AgentHost(self, name, key_named(name), terms)
        self.names[agent.party] = name
        return agent

    def run(self) -> Outcome:
        """Let it happen. Returns what became of it; a violation ends it at once."""
        violation = ""
        try:
            self._happen()
        except Violation as error:
            violation = str(error)
        except Exception as error:
            violation = f"{type(error).__name__}: {error}"
            if self.engine._trace is not None:
                raise
        if violation:
            self.engine.say(f"VIOLATION: {violation}")
        return Outcome(
            seed=self.seed,
            digest=self.engine.digest,
            violation=violation,
            last=tuple(self.engine.last) if violation else (),
            steps=self.engine.steps,
            simulated_ms=self.engine.now_ms,
            counts=tuple(sorted(self.counts.items())),
            reasons=tuple(sorted(self.auditor.charges.reasons.items())),
            points=frozenset(self.points.met),
            crashed=frozenset(self.points.died_at),
            jobs=len(self.auditor.jobs),
            charged_ucr=self.auditor.charges.charged_ucr,
            lost_device_ms=self.auditor.charges.lost_device_ms,
        )

    def _happen(self) -> None:
        engine = self.engine
        self.broker.start()
        for agent in self.agents:
            agent.start()
        for renter in self.renters:
            renter.begin()
        self.chaos.begin()
        end_ms = int(self.plan.hours * HOUR_MS)
        self._until(end_ms, stop_when_done=True)
        self.chaos.calm()
        calm_ms = engine.now_ms
        self._until(calm_ms + CALM_MS, stop_when_done=True)
        self.auditor.finished(at_rest=False)
        self._until(engine.now_ms + AGENT_CALM_MS, stop_when_done=False)
        self.auditor.finished(at_rest=True)
        for agent in self.agents:
            for lease_id, run in agent.core.runs.items():
                raise Violation(
                    f"{agent.name} still has lease {lease_id[:8]} as {run.record.phase}"
                )
            if any(container.running for container in agent.containers.values()):
                raise Violation(f"{agent.name} still runs something that nobody pays for")
            if agent.journal.outbox:
                raise Violation(f"{agent.name} has messages that nobody took")
        self._look_from_outside()

    def _until(self, end_ms: int, *, stop_when_done: bool) -> None:
        engine = self.engine
        while engine.now_ms < end_ms:
            if stop_when_done and self._all_ended():
                return
            engine.run(min(end_ms, engine.now_ms + MINUTE_MS))

    def _all_ended(self) -> bool:
        ended = ("succeeded", "failed", "cancelled")
        submitted = all(renter.all_sent for renter in self.renters)
        return submitted and all(job.state in ended for job in self.auditor.jobs.values())

    def _look_from_outside(self) -> None:
        """What any party can check for itself at the end."""
        self.awaited.at_the_end()
        found = self.broker.broker.ledger_audit.breaches()
        if found:
            raise Violation(f"the broker's own audit: {found[0]}")
        for renter in self.renters:
            renter.verify()
            renter.check_log()
        if "rewrite" in self.plan.faults:
            self._rewrite_the_log()

    def _rewrite_the_log(self) -> None:
        """Whoever has seen an entry notices that it is gone, changed, or elsewhere."""
        self.honest = False
        way = self.broker.tamper_with_log()
        self.broker.die(1_000)
        self.broker.start()
        if self.engine.happens(0.5):
            # It grows on, as agents come back: an old head must be proven, not just compared.
            self._until(self.engine.now_ms + MINUTE_MS, stop_when_done=False)
        for renter in self.renters:
            try:
                renter.check_log()
            except LogRewritten:
                self.count("rewrite")
                continue
            raise Violation(f"{renter.name} did not notice that the log was rewritten: {way}")


def simulate(seed: int, plan: Plan, trace: Callable[[str], None] | None = None) -> Outcome:
    """Simulate the market of a seed."""
    collects = gc.isenabled()
    gc.disable()  # it costs more than it frees within one market
    try:
        with shortcuts.taken():
            return Market(seed, plan, trace).run()
    finally:
        if collects:
            gc.enable()


def quiet(plan: Plan) -> Plan:
    """Return the plan without any fault."""
    return replace(plan, faults=frozenset())
