"""Heartbeats, kept in memory between the moments at which they are written down.

Most heartbeats change nothing but figures: when a run was heard from, its step, its device time. A
commit for each would be most of what a broker writes, and nobody needs it: after a restart of the
broker everyone has a period of grace, and says all of it again with the next heartbeat.

- A run is *steady* once a heartbeat has gone through a transaction and found nothing else to
  change. From then on the same words are kept here, and laid over its fact wherever that is read.
- Whoever changes the run's fact, its lease's or its job's ends that: the next heartbeat looks at
  everything again. A transaction makes steady only what nobody has changed since it did so itself.
- Figures are written down every WRITE_EVERY_MS, so that a restart loses sight of no more.
- What a run uses of its machine, and how the lines stand that it is still writing, is only kept
  here, as it was said last, and goes with the run. So are its signs of life.

Any thread may call this, and none waits: whether a run is steady is one comparison of the
transaction that changed it last with the one that made it steady, and figures are replaced whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sublet_broker.market.facts import AgentFact, Fact, JobFact, LeaseFact, RunFact
from sublet_broker.market.metering import heard_preparing_ms
from sublet_broker.market.running import PREPARING, is_over
from sublet_broker.market.signs_of_life import Signs, reported, returned, saved, wrote
from sublet_contracts.wire import LogState, LogStates, RunReport, RunStall, RunUpload, RunUsage

WRITE_EVERY_MS = 30_000
_NOBODY = object()


@dataclass(slots=True)
class _Agent:
    instance: str
    last_seen_ms: int
    last_writer: object
    """The token of the transaction that changed the agent's fact last."""
    steady_since: object = _NOBODY
    """The token of the transaction that made it steady: it is, while both are the same."""


class _Look(NamedTuple):
    """What a look at a run has found: nothing is due with it for a while."""

    writer: object
    """Who had changed it last at that time: what is found holds until somebody else does."""
    again_ms: int
    """When to look again."""
    silence_ms: int
    """After how long without a heartbeat it counts as silent."""


_NEVER_LOOKED = _Look(_NOBODY, 0, 0)


@dataclass(slots=True)
class _Run:
    provider: str
    job: str
    last_writer: object
    """The token of the transaction that changed the run's fact, its lease's or its job's last."""
    steady_since: object = _NOBODY
    """The token of the transaction that made it steady: it is, while both are the same."""
    state: str = ""
    epoch: int = 0
    written_ms: int = 0
    newest: "_Figures | None" = None
    merged: tuple[RunFact, "_Figures", RunFact] | None = None
    """A fact as it was read, the newest figures at that time, and both in one."""
    look: _Look = _NEVER_LOOKED
    start_step: int = 0
    signs: Signs | None = None
    usage: tuple[int, RunUsage] | None = None
    """What it uses of its machine, and when that was measured."""
    stall: RunStall | None = None
    """For how long saving has held its loop, as it said last."""
    upload: tuple[int, RunUpload] | None = None
    """What of it is on its way here, and when that was measured."""
    unfinished: tuple[LogState, ...] = ()
    """How the lines stand that it is still writing."""

    def is_steady(self) -> bool:
        return self.steady_since is self.last_writer


class _Figures(NamedTuple):
    """What changes with each heartbeat; field by field as in RunFact."""

    last_seen_ms: int
    cum_device_ms: int
    step: int
    total_steps: int | None
    metrics: Mapping[str, Any]
    detail: str
    preparing_ms: int

    @classmethod
    def of(cls, run: RunFact) -> "_Figures":
        return cls(
            run.last_seen_ms,
            run.cum_device_ms,
            run.step,
            run.total_steps,
            run.metrics,
            run.detail,
            run.preparing_ms,
        )

    def after(self, report: RunReport, now_ms: int, *, begun: bool) -> "_Figures":
        """`begun`: its command was seen to run before, and this report is an old one if it says
        that it doesn't."""
        preparing_ms = self.preparing_ms
        if not begun and report.state in PREPARING:
            preparing_ms = heard_preparing_ms(preparing_ms, now_ms - self.last_seen_ms)
        return _Figures(
            max(now_ms, self.last_seen_ms),
            max(self.cum_device_ms, report.cum_device_ms),
            max(self.step, report.step),
            report.total_steps or self.total_steps,
            dict(report.metrics) or self.metrics,
            report.detail,
            preparing_ms,
        )

    def on(self, run: RunFact) -> RunFact:
        return replace(run, **self._asdict())


class Heartbeats:
    """The newest words of all agents."""

    def __init__(self) -> None:
        self._agents: dict[str, _Agent] = {}
        self._runs: dict[str, _Run] = {}
        self._lease_of: dict[str, str] = {}

    def take(self, party: str, instance: str, reports: Sequence[RunReport], now_ms: int) -> bool:
        """Take a heartbeat if it changes nothing but figures. False: it needs a transaction."""
        agent = self._agents.get(party)
        if (
            agent is None
            or agent.steady_since is not agent.last_writer
            or agent.instance != instance
        ):
            return False
        heard: list[tuple[_Run, _Figures]] = []
        for report in reports:
            run = self._runs.get(report.lease)
            if (
                run is None
                or run.newest is None
                or not run.is_steady()
                or run.state != report.state
                or run.epoch != report.epoch
                or run.provider != party
                or now_ms - run.written_ms >= WRITE_EVERY_MS
            ):
                return False
            heard.append((run, run.newest.after(report, now_ms, begun=run.state not in PREPARING)))
        agent.last_seen_ms = max(agent.last_seen_ms, now_ms)
        for run, newest in heard:
            run.newest = newest
        for report in reports:
            self.note_usage(report, now_ms)
            self.note_signs(report, now_ms)
        return True

    def note_usage(self, report: RunReport, now_ms: int) -> None:
        """Keep what a run that is tracked uses of its machine, how long saving holds it and what of
        it is on its way here; the caller has looked at who says so, and under which epoch."""
        run = self._runs.get(report.lease)
        if run is not None and report.usage is not None:
            run.usage = (max(0, now_ms - report.usage.age_ms), report.usage)
        if run is not None and report.stall is not None:
            run.stall = report.stall
        if run is not None:
            upload = report.upload
            run.upload = (max(0, now_ms - upload.age_ms), upload) if upload is not None else None

    def usage(self, lease: str) -> tuple[int, RunUsage] | None:
        """Return what a run uses of its machine, and when that was measured by the broker's
        clock; None: it has not said so, or is over."""
        run = self._runs.get(lease)
        return run.usage if run is not None else None

    def stall(self, lease: str) -> RunStall | None:
        """Return for how long saving has held a run's loop; None: it has not said so, or is
        over."""
        run = self._runs.get(lease)
        return run.stall if run is not None else None

    def upload(self, lease: str) -> tuple[int, RunUpload] | None:
        """Return what of a run is on its way here, and when that was measured by the broker's
        clock; None: nothing, or it is over."""
        run = self._runs.get(lease)
        return run.upload if run is not None else None

    def uploaded(self, lease: str, kind: str, step: int) -> None:
        """All of it is here: it isn't on its way any more, whatever the heartbeat before said."""
        run = self._runs.get(lease)
        if run is not None and run.upload is not None:
            upload = run.upload[1]
            if (upload.kind, upload.step) == (kind, step):
                run.upload = None

    def take_unfinished(self, party: str, instance: str, message: LogStates, now_ms: int) -> None:
        """Keep how the unfinished lines of a run stand, if that is its agent's to say."""
        agent, run = self._agents.get(party), self._runs.get(message.lease)
        if agent is None or agent.instance != instance or run is None:
            return
        if run.provider == party and run.epoch == message.epoch:
            run.unfinished = message.states
            self.note_output(message.lease, now_ms)

    def finished(self, lease: str, next_numbers: Mapping[str, int]) -> None:
        """Lines of a run are kept: stream -> the number after its newest. What they were before
        they were finished is over."""
        run = self._runs.get(lease)
        if run is not None and run.unfinished:
            run.unfinished = tuple(
                state
                for state in run.unfinished
                if state.number >= next_numbers.get(state.stream, 0)
            )

    def unfinished(self, job: str) -> tuple[int, tuple[LogState, ...]]:
        """Return how the unfinished lines of a job's run stand, and the run's epoch."""
        run = self._runs.get(self._lease_of.get(job, ""))
        return (run.epoch, run.unfinished) if run is not None else (0, ())

    def note_signs(self, report: RunReport, now_ms: int) -> None:
        """Take what a run that is tracked says as a sign of its life, or of none."""
        run = self._runs.get(report.lease)
        if run is not None and report.state == "running":
            run.signs = reported(run.signs, report, run.start_step, now_ms)

    def note_output(self, lease: str, now_ms: int) -> None:
        """Lines of a run's output came."""
        run = self._runs.get(lease)
        if run is not None and run.signs is not None:
            run.signs = wrote(run.signs, now_ms)

    def note_saved(self, lease: str, now_ms: int) -> None:
        """A checkpoint of a run became durable."""
        run = self._runs.get(lease)
        if run is not None and run.signs is not None:
            run.signs = saved(run.signs, now_ms)

    def note_return(self, lease: str, now_ms: int) -> None:
        """A run is heard from again, or could not be heard for our own doing."""
        run = self._runs.get(lease)
        if run is not None and run.signs is not None:
            run.signs = returned(run.signs, now_ms)

    def signs(self, lease: str) -> Signs | None:
        """Return what is known of a run's life; None: nothing yet, since the broker started."""
        run = self._runs.get(lease)
        return run.signs if run is not None else None

    def with_newest(self, run: RunFact) -> RunFact:
        """Return a run as it was read, with the newest figures."""
        known = self._runs.get(run.id)
        newest = known.newest if known is not None else None
        if newest is None or newest.last_seen_ms <= run.last_seen_ms or is_over(run):
            return run
        assert known is not None
        before = known.merged
        if before is not None and before[0] is run and before[1] is newest:
            return before[2]
        merged = newest.on(run)
        known.merged = (run, newest, merged)
        return merged

    def last_seen_ms(self, agent: AgentFact) -> int:
        """Return when this agent was heard from last."""
        known = self._agents.get(agent.id)
        return max(agent.last_seen_ms, known.last_seen_ms if known else 0)

    def nothing_due_until(self, lease: str) -> int:
        """Return before when nothing can be due with this run: it was looked at, nothing of it has
        changed since, and if it says no more it is silent then. 0: something may be."""
        run = self._runs.get(lease)
        if run is None or run.newest is None:
            return 0
        if run.look.writer is not run.last_writer:
            return 0
        return min(run.look.again_ms, run.newest.last_seen_ms + run.look.silence_ms)

    def nothing_due(self, lease: str, again_ms: int, silence_ms: int) -> None:
        """Nothing is due with this run before `again_ms`, unless something of it changes or it is
        silent for so long."""
        run = self._runs.get(lease)
        if run is not None and run.is_steady():
            run.look = _Look(run.last_writer, again_ms, silence_ms)

    # -- transactions -----------------------------------------------------------------------------

    def changed(self, fact: Fact, by: object) -> None:
        """A transaction puts a fact: what it is about is no longer steady."""
        match fact:
            case RunFact() | LeaseFact():
                self._no_longer_steady(fact.id, by)
            case JobFact():
                self._no_longer_steady(self._lease_of.get(fact.id, ""), by)
            case AgentFact():
                self._agents[fact.id] = _Agent(fact.instance, fact.last_seen_ms, by)
            case _:
                pass

    def _no_longer_steady(self, lease: str, by: object) -> None:
        run = self._runs.get(lease)
        if run is not None:
            run.last_writer = by

    def forget(self, lease: str) -> None:
        """It is committed that this run is over, and no sooner: a transaction may fail, and then
        what was heard last still counts."""
        run = self._runs.pop(lease, None)
        if run is not None:
            self._lease_of.pop(run.job, None)

    def track(self, run: RunFact, start_step: int, by: object) -> None:
        """A transaction is about to put what a heartbeat says of this run, whose lease begins at
        that step."""
        if run.id not in self._runs:
            self._runs[run.id] = _Run(
                run.provider, run.job, by, epoch=run.epoch, start_step=start_step
            )
            self._lease_of[run.job] = run.id

    def mark_steady(self, party: str, runs: Sequence[RunFact], by: object) -> None:
        """The transaction `by` is committed, and these runs need no other as long as their agent
        goes on saying what it said."""
        agent = self._agents.get(party)
        if agent is not None:
            agent.steady_since = by
        for fact in runs:
            run = self._runs.get(fact.id)
            if run is not None and run.last_writer is by:
                run.newest = _Figures.of(fact)
                run.state, run.epoch, run.written_ms = fact.state, fact.epoch, fact.last_seen_ms
                run.steady_since = by


def with_figures(run: RunFact, report: RunReport, now_ms: int) -> RunFact:
    """Return the run with what a heartbeat says that is no change of state."""
    begun = run.running_ms is not None
    return _Figures.of(run).after(report, now_ms, begun=begun).on(run)
