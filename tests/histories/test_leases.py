"""Jobs, runs and leases under any order of events, by what the broker's facts say after each.

One holder at a time, epochs only grow, every transition is one of DESIGN.md's, no terminal state
is left, no device is leased twice, a successor starts at the newest durable step, and whatever a
zombie writes under its old epoch changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sublet_broker.adapters.http.problems import STATUS
from sublet_broker.market.facts import (
    CheckpointFact,
    EventFact,
    JobFact,
    LeaseFact,
    RunFact,
)
from sublet_broker.service.broker import Settings
from sublet_broker.service.errors import NotYet, Refusal
from sublet_contracts.problems import ProblemCode
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import CheckpointUploaded, LeaseAnswer, RunChanged
from tests.histories.profiles import profile
from tests.service.world import AgentDouble, RunDouble, World

LIVE = {"proposed", "active"}
STOPPABLE = {"cancelled", "paused", "failed"}
JOB_EDGES = {
    "": {"queued"},
    "queued": {"starting", *STOPPABLE},
    "starting": {"running", "recovering", "queued", "succeeded", *STOPPABLE},
    "running": {"recovering", "succeeded", *STOPPABLE},
    "recovering": {"running", "succeeded", *STOPPABLE},
    "paused": {"queued", "recovering", "cancelled"},
}
"""Written down anew from DESIGN.md's table, so that a slip in the broker's own one shows."""
RUN_WAY = ("assigned", "pulling", "restoring", "running", "draining")
RUN_EDGES = {
    state: {*RUN_WAY[at + 1 :], "unknown", "exited", "lost"} for at, state in enumerate(RUN_WAY)
} | {"unknown": {*RUN_WAY, "exited", "lost"}}
ENDS = {
    "job": {"succeeded", "failed", "cancelled"}, "run": {"exited", "lost"}, "lease": {"closed"},
}  # fmt: skip
LEASE_EDGES = {"": {"proposed"}, "proposed": {"active", "closed"}, "active": {"closed"}}
ENDINGS = (
    Reason.SUCCEEDED, Reason.JOB_FAILED, Reason.RECLAIMED, Reason.RUN_KILLED, Reason.YIELDED,
    Reason.START_FAILED, Reason.PROVIDER_DRAINED,
)  # fmt: skip
AGENTS = ("ada", "bob", "cy")
numbers = st.integers(0, 30)


class Market(RuleBasedStateMachine):
    """One renter, three machines, and everything that may befall them."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(Settings(fruitless_limit=50))
        self.agents: dict[str, AgentDouble] = {name: self.world.agent(name) for name in AGENTS}
        self.renter = self.world.renter()
        self.jobs: list[str] = []
        self.epochs: dict[str, int] = {}
        self.ended: dict[tuple[str, str], str] = {}
        self.known_leases: set[str] = set()
        self.last_event = 0
        self.now_in: dict[tuple[str, str], str] = {}
        self.stale: list[str] = []
        """Checkpoints that a zombie has signed."""
        self.submit()

    # -- commands ----------------------------------------------------------------------------------

    @rule()
    def submit(self) -> None:
        if len(self.jobs) >= 5:
            return
        try:
            self.jobs.append(self.renter.run(budget_ucr=3_000_000))
        except Refusal as error:
            # Everybody may be silent: then nothing is on offer.
            if error.code is not ProblemCode.NO_MATCH or self.world.broker.market.offers().offers:
                raise

    @rule(which=numbers, wish=st.sampled_from(("pause", "resume", "resume", "cancel")))
    def wish(self, which: int, wish: str) -> None:
        jobs = self.world.broker.jobs
        act = {"pause": jobs.pause, "resume": jobs.resume, "cancel": jobs.cancel}[wish]
        try:
            act(self.renter.party, self.jobs[which % len(self.jobs)])
        except Refusal as error:
            if not 400 <= STATUS[error.code] < 500:
                raise
        self.world.settle_down(2)

    @rule(span_ms=st.sampled_from((500, 3_000, 8_999, 9_001, 20_001, 31_000)))
    def time_passes(self, span_ms: int) -> None:
        self.world.pass_ms(span_ms)

    @rule(which=numbers)
    def save(self, which: int) -> None:
        agent, run = self.pick(which)
        if run is not None and agent.connected and not run.orders:
            agent.checkpoint(run, run.step + 1)
            self.world.settle_down(2)

    @rule(which=numbers, reason=st.sampled_from(ENDINGS))
    def exits(self, which: int, reason: Reason) -> None:
        agent, run = self.pick(which)
        if run is not None:
            agent.exit(run, run.orders[0].reason if run.orders else reason)
            self.world.settle_down(2)

    @rule(name=st.sampled_from(AGENTS))
    def falls_silent(self, name: str) -> None:
        self.agents[name].die()

    @rule(name=st.sampled_from(AGENTS), same=st.booleans())
    def comes_back(self, name: str, same: bool) -> None:
        agent = self.agents[name]
        agent.awake = True
        agent.join()
        if not same:
            agent.past.update(agent.runs)
            agent.runs.clear()
        agent.announce()
        self.world.settle_down(2)

    @rule(name=st.sampled_from(AGENTS), yes=st.booleans())
    def answers_leases(self, name: str, yes: bool) -> None:
        self.agents[name].accepts_leases = yes

    @rule()
    def broker_restarts(self) -> None:
        self.world.restart_broker()
        for agent in self.agents.values():
            if agent.awake:
                agent.join()

    @rule(which=numbers, what=st.integers(0, 4))
    def is_lost_and_returns(self, which: int, what: int) -> None:
        """A machine is silent until its lease is closed, and comes back with its run still on."""
        agent, run = self.pick(which)
        if run is None:
            return
        agent.die()
        self.world.pass_ms(31_000)
        agent.awake = True
        agent.join()
        self.zombie(agent, which, what)
        self.world.settle_down(2)

    @rule(which=numbers, off=st.sampled_from((-1, 1)))
    def another_epoch(self, which: int, off: int) -> None:
        """A lease's holder speaks under an epoch that isn't its own: nobody listens."""
        agent, run = self.pick(which)
        epoch = run.lease.epoch + off if run else 0
        if run is None or epoch < 1 or not agent.connected:
            return
        before = self.picture(run.job_id)
        agent.tell(
            RunChanged(
                lease=run.id,
                epoch=epoch,
                state="exited",
                cum_device_ms=10**9,
                reason=Reason.SUCCEEDED,
                exit_code=0,
            )
        )
        assert self.picture(run.job_id) == before

    @rule(name=st.sampled_from(AGENTS), which=numbers, what=st.integers(0, 4))
    def an_old_lease_speaks(self, name: str, which: int, what: int) -> None:
        self.zombie(self.agents[name], which, what)

    def zombie(self, agent: AgentDouble, which: int, what: int) -> None:
        """Somebody writes under a lease that has been closed: everything is as before."""
        with self.world.store.snapshot() as tx:
            leases = tx.find(LeaseFact, {"provider": agent.party, "state": "closed"})
        runs = {**agent.past, **agent.runs}
        mine = [lease for lease in leases if lease.id in runs]
        if not mine or not agent.connected:
            return
        lease = mine[which % len(mine)]
        run = runs[lease.id]
        before = self.picture(lease.job)
        try:
            match what:
                case 0:
                    agent.upload(run, {"model.bin": b"of a zombie"})
                    raise AssertionError("a zombie has uploaded")
                case 1:
                    signed = agent.checkpoint(run, run.step + 1_000, upload=False)
                    self.stale.append(signed.id)
                    agent.tell(CheckpointUploaded(checkpoint=signed.envelope))
                    self.world.broker.supervision.verdicts()
                case 2:
                    agent.tell(
                        RunChanged(
                            lease=lease.id,
                            epoch=lease.epoch,
                            state="exited",
                            cum_device_ms=10**9,
                            reason=Reason.SUCCEEDED,
                            exit_code=0,
                        )
                    )
                case 3:
                    envelope = lease.envelope.countersigned(agent.key)
                    agent.tell(LeaseAnswer(lease=lease.id, signed=envelope))
                case _:
                    agent.receipt(run)
        except Refusal as error:
            if STATUS[error.code] not in (404, 409):
                raise
        except NotYet as error:
            raise AssertionError("a zombie is asked to try again") from error
        assert self.picture(lease.job) == before

    def pick(self, which: int) -> tuple[AgentDouble, RunDouble | None]:
        busy = [(a, r) for a in self.agents.values() if a.awake for r in a.runs.values()]
        return busy[which % len(busy)] if busy else (self.agents["ada"], None)

    def picture(self, job: str) -> object:
        """Return all that must not move when a zombie speaks."""
        with self.world.store.snapshot() as tx:
            return (
                tx.get(JobFact, job),
                tx.find(LeaseFact, {"job": job}),
                [(r.id, r.state, r.reason) for r in tx.find(RunFact, {"job": job})],
                tx.find(CheckpointFact, {"job": job, "state": "durable"}),
            )

    # -- what must hold ----------------------------------------------------------------------------

    @invariant()
    def one_holder_and_growing_epochs(self) -> None:
        with self.world.store.snapshot() as tx:
            jobs, leases = tx.find(JobFact), tx.find(LeaseFact)
        for job in jobs:
            mine = [lease for lease in leases if lease.job == job.id]
            live = [lease for lease in mine if lease.state in LIVE]
            assert len(live) <= 1, "two holders"
            assert sorted(lease.epoch for lease in mine) == list(range(1, job.epoch + 1))
            assert all(lease.epoch == job.epoch for lease in live)
            assert job.epoch >= self.epochs.get(job.id, 0)
            self.epochs[job.id] = job.epoch
            if job.state in ("queued", "paused", "succeeded", "failed", "cancelled"):
                assert not live, f"{job.state} and held"
            if job.state in ("starting", "running"):
                assert live, f"{job.state} and nobody holds it"
        devices = [(x.provider, d) for x in leases if x.state in LIVE for d in x.device_ids]
        assert len(devices) == len(set(devices)), "a device is leased twice"

    @invariant()
    def a_successor_starts_at_the_newest_durable_step(self) -> None:
        with self.world.store.snapshot() as tx:
            fresh = [x for x in tx.find(LeaseFact) if x.id not in self.known_leases]
            for lease in sorted(fresh, key=lambda x: x.epoch):
                durable = [
                    c.step
                    for c in tx.find(CheckpointFact, {"job": lease.job, "kind": "checkpoint"})
                    if c.state == "durable" and c.durable_ms is not None and c.epoch < lease.epoch
                ]
                assert lease.start_step == max(durable, default=0)
                self.known_leases.add(lease.id)
            for id in self.stale:
                fact = tx.get(CheckpointFact, id)
                assert fact is None or fact.state == "rejected"

    @invariant()
    def only_the_tables_transitions(self) -> None:
        with self.world.store.snapshot() as tx:
            events = tx.find(EventFact, after=("id", self.last_event), order_by="id")
            states = {("job", job.id): str(job.state) for job in tx.find(JobFact)}
            states |= {("lease", x.id): str(x.state) for x in tx.find(LeaseFact)}
            states |= {("run", run.id): str(run.state) for run in tx.find(RunFact)}
        for event in events:
            self.last_event = event.id
            if event.kind == "job":
                self.moved("job", event.job, event, JOB_EDGES)
            elif event.kind == "lease":
                self.moved("lease", event.lease, event, LEASE_EDGES)
            elif event.kind == "run":
                self.now_in.setdefault(("run", event.lease), "assigned")
                self.moved("run", event.lease, event, RUN_EDGES)
        for key, state in states.items():
            fresh = "assigned" if key[0] == "run" else ""
            assert self.now_in.get(key, fresh) == state, f"{key} is {state} without an event"
            gone = self.ended.get(key)
            assert gone is None or gone == state, f"{key} left {gone} for {state}"
            if state in ENDS[key[0]]:
                self.ended[key] = state

    def moved(self, kind: str, id: str, event: EventFact, edges: Mapping[str, set[str]]) -> None:
        before = self.now_in.get((kind, id), "")
        if event.before == event.after:
            return
        assert event.before == before, f"{kind} was {before}, the event says {event.before}"
        assert event.after in edges.get(before, set()), f"{kind}: {before} -> {event.after}"
        self.now_in[kind, id] = event.after

    @invariant()
    def the_books_are_right(self) -> None:
        self.world.audit()


Market.TestCase.settings = profile(examples=50, steps=30)
TestMarket = Market.TestCase
