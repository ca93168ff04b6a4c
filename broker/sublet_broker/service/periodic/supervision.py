"""Supervision: what happens because time passes.

One look finds what may be due; each thing is then done in its own transaction, which looks again:
so a sweep never holds the database up, and a crash in its middle loses nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import (
    AgentFact,
    CounterFact,
    JobFact,
    LeaseFact,
    RunFact,
)
from sublet_broker.market.resuming import ended_by_renter
from sublet_broker.market.running import (
    disobeys,
    fell_silent,
    is_overdue,
    nears_the_edge,
    silence_of,
)
from sublet_broker.market.setting_aside import is_set_aside
from sublet_broker.market.warnings import Watched, facts_of, stalled, warnings_now
from sublet_broker.service.content.retention import Retention
from sublet_broker.service.leases.closing import close, give_up, release_if_ended
from sublet_broker.service.leases.open_offers import OpenOffers
from sublet_broker.service.leases.orders import give_order
from sublet_broker.service.leases.standby import prepare_successor
from sublet_broker.service.ports import BlobsAway, MatcherAway, VerifyResult
from sublet_broker.service.providers.checkpoints import Checkpoints
from sublet_broker.service.providers.offers import Offers
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.documents import Job
from sublet_contracts.job_warnings import warning_text
from sublet_contracts.reasons import Reason
from sublet_contracts.states import Desired, JobState, LeaseState, RunState

STARTED = "started"
"""A counter: when the broker started last."""
EXPIRY_EVERY_MS = 30_000
LOOK_EVERY_MS = 8_000
"""A run with which nothing can be due is looked at so often, or when it falls silent."""
IDLE_LOOK_EVERY_MS = 60_000
"""Where nothing runs there is nothing to be due, until something is leased."""
LIVE_RUN = tuple(s for s in RunState if s not in (RunState.EXITED, RunState.LOST))


class Supervision:
    """The sweeper, and what follows from verification."""

    def __init__(
        self, context: Context, offers: Offers, retention: Retention, open_offers: OpenOffers
    ) -> None:
        self._context = context
        self._retention = retention
        self._offers = offers
        self._open_offers = open_offers
        self._checkpoints = Checkpoints(context)
        self._unjudged: dict[str, VerifyResult] = {}
        self._next_expiry_ms = 0
        self._looked_after: object = None
        """The transaction that had changed a run or a lease last when all were looked at."""
        self._next_look_ms = 0
        """When they are looked at again, unless somebody changes one before."""

    def started(self) -> None:
        """Begin after a start: everyone gets one period of grace, because it was us who were away.

        To be called once, before agents may join.
        """
        with self._context.work() as work:
            self._context.started_ms = work.now_ms
            # A commit at each start, whatever else there is: the clock doesn't go back behind it.
            work.put(CounterFact(STARTED, work.now_ms))
            for agent in work.find(AgentFact, {}):
                if agent.connected:
                    work.put(replace(agent, connected=False))
                work.touch_offer(agent.id)
                if is_set_aside(agent, work.now_ms):
                    work.set_aside(agent.id, agent.set_aside_until_ms)
            self._grant_grace(work)
            for lease in work.find(LeaseFact, {"state": LeaseState.ACTIVE}):
                work.touch_ended(lease.id)  # Those that run are left out by the first look.
            for job in work.find(JobFact, {"state": (JobState.QUEUED, JobState.RECOVERING)}):
                work.touch_job(job.id)
        self._checkpoints.verify_all()
        try:
            self._context.ports.matcher.rebuild()
        except MatcherAway:
            pass  # It rebuilds by itself when it comes; queued jobs wait.

    def _grant_grace(self, work: UnitOfWork) -> None:
        """Count everybody's silence from now."""
        until_ms = work.now_ms + self._grace_ms()
        for run in work.find(RunFact, {"state": LIVE_RUN}):
            ordered_ms = run.order_until_ms
            work.put(
                replace(
                    run,
                    last_seen_ms=work.now_ms,
                    order_until_ms=ordered_ms and max(ordered_ms, until_ms),
                )
            )
            self._context.heartbeats.note_return(run.id, work.now_ms)
        for lease in work.find(LeaseFact, {"state": LeaseState.PROPOSED}):
            work.put(replace(lease, answer_by_ms=until_ms))

    def _grace_ms(self) -> int:
        return max(self._context.settings.answer_ms, self._context.settings.unknown_after_ms)

    def sweep(self) -> None:
        """Do what is due: silence, answers, orders, budgets' edges, expiry.

        It begins with a period of grace for everyone where something could not be written since the
        last one: it may have been what they said. Raises StorageFull, StoreAway.
        """
        if self._context.writes_failed:
            # Before it is read: what fails from now on sets it again.
            self._context.writes_failed = False
            with self._context.work() as work:
                self._grant_grace(work)
        self._sweep()

    def was_away(self) -> None:
        """Have the next sweep begin with a period of grace for everyone: the broker itself stood
        still, and what was said meanwhile has still to be read."""
        self._context.writes_failed = True

    def _sweep(self) -> None:
        now_ms = self._context.ports.clock.now_ms()
        if (
            self._looked_after is not self._context.dirty.last_run_change
            or now_ms >= self._next_look_ms
        ):
            self._look()
        self._end_setting_aside(now_ms)
        if now_ms >= self._next_expiry_ms:
            self._sweep_expired()
            self._next_expiry_ms = now_ms + EXPIRY_EVERY_MS

    def _end_setting_aside(self, now_ms: int) -> None:
        """Put machines back on the market that have been set aside for long enough."""
        aside = self._context.dirty.set_aside
        over = [provider for provider, until_ms in list(aside.items()) if now_ms >= until_ms]
        for provider in over:
            del aside[provider]
            self._context.dirty.offer_changed(provider)

    def _look(self) -> None:
        """Look at all that lives, and do what is due with it."""
        # Before the look: what is put during it is looked at next.
        seen = self._context.dirty.last_run_change
        with self._context.read() as snapshot:
            proposed = snapshot.find(LeaseFact, {"state": LeaseState.PROPOSED})
            late = [lease.id for lease in proposed if snapshot.now_ms >= lease.answer_by_ms]
            runs = [run.id for run in snapshot.tx.find(RunFact, {"state": LIVE_RUN})]
            due = [run for run in runs if self._due(snapshot, run)]
            due_again_ms = [lease.answer_by_ms for lease in proposed]
            due_again_ms += [self._context.heartbeats.nothing_due_until(run) for run in runs]
        self._looked_after = seen
        self._next_look_ms = min(due_again_ms, default=snapshot.now_ms + IDLE_LOOK_EVERY_MS)
        self._each(late, self._unanswered)
        if due:
            self._open_offers.refresh()  # a successor may have to be chosen
        self._each(due, self._attend)

    def _sweep_expired(self) -> None:
        """Offers and jobs whose time is over. Nothing is leased on them meanwhile."""
        with self._context.read() as snapshot:
            offers = self._offers.expired(snapshot)
            jobs = [
                job.id
                for job in snapshot.find(JobFact, {"state": JobState.QUEUED, "started_ms": None})
                if accepted(job.envelope, Job).expires_ms <= snapshot.now_ms
            ]
        self._offers.expire(offers)
        self._each(jobs, self._expire)

    def _each(self, ids: Iterable[str], act: Callable[[UnitOfWork, str], None]) -> None:
        for id in ids:
            with self._context.work() as work:
                act(work, id)

    def _unanswered(self, work: UnitOfWork, id: str) -> None:
        lease = work.must(LeaseFact, id)
        if lease.state is LeaseState.PROPOSED and work.now_ms >= lease.answer_by_ms:
            close(self._context, work, lease, Reason.LEASE_UNANSWERED, "")

    def _silence(self, run: RunFact, job: Job, now_ms: int) -> RunState | None:
        return silence_of(
            run,
            now_ms=now_ms,
            unknown_after_ms=self._context.settings.unknown_after_ms,
            patience_ms=job.patience_ms,
        )

    def _nears_the_edge(self, run: RunFact, lease: LeaseFact, job: Job, now_ms: int) -> bool:
        return run.desired is Desired.RUN and nears_the_edge(
            run,
            lease,
            now_ms=now_ms,
            stop_grace_ms=job.stop_grace_ms,
            margin_ms=self._context.settings.drain_margin_ms,
        )

    def _watched(self, run: RunFact, lease: LeaseFact, job: Job, now_ms: int) -> Watched:
        return Watched(run, lease, job, self._context.heartbeats.signs(run.id), now_ms)

    def _due(self, snapshot: UnitOfWork, id: str) -> bool:
        now_ms = snapshot.now_ms
        if now_ms < self._context.heartbeats.nothing_due_until(id):
            return False
        run = snapshot.must(RunFact, id)
        job = accepted(snapshot.must(JobFact, run.job).envelope, Job)
        lease = snapshot.must(LeaseFact, run.id)
        if (
            self._silence(run, job, now_ms) is not None
            or (run.state is RunState.UNKNOWN and not run.successor)
            or is_overdue(run, now_ms)
            or disobeys(run, now_ms, self._context.settings.stop_overdue_ms)
            or self._nears_the_edge(run, lease, job, now_ms)
        ):
            return True
        watched = self._watched(run, lease, job, now_ms)
        if stalled(watched) or warnings_now(watched) != run.warnings:
            return True
        if run.desired is Desired.RUN and not self._nears_the_edge(
            run, lease, job, now_ms + LOOK_EVERY_MS
        ):
            silent_ms = min(self._context.settings.unknown_after_ms, job.patience_ms)
            self._context.heartbeats.nothing_due(run.id, now_ms + LOOK_EVERY_MS, silent_ms)
        return False

    def _attend(self, work: UnitOfWork, id: str) -> None:
        run = work.must(RunFact, id)
        lease = work.must(LeaseFact, id)
        if lease.state is not LeaseState.ACTIVE:
            return
        job = accepted(work.must(JobFact, run.job).envelope, Job)
        silence = self._silence(run, job, work.now_ms)
        if silence is RunState.LOST:
            self._lose(work, lease, run)
            return
        if disobeys(run, work.now_ms, self._context.settings.stop_overdue_ms):
            give_up(
                self._context, work, lease, Reason.PROVIDER_LOST, "it did not stop when it was to"
            )
            return
        if silence is RunState.UNKNOWN:
            run = work.put_run(run, fell_silent(run, work.now_ms))
        run = prepare_successor(self._open_offers, work, lease, run)
        watched = self._watched(run, lease, job, work.now_ms)
        run = self._warn(work, watched)
        if is_overdue(run, work.now_ms):
            reason = run.order_reason or Reason.CANCELLED
            give_order(work, lease, run, Desired.STOP, reason, 0)
        elif self._nears_the_edge(run, lease, job, work.now_ms):
            give_order(work, lease, run, Desired.DRAIN, Reason.BUDGET_EXHAUSTED, job.stop_grace_ms)
        elif stalled(watched):
            give_order(work, lease, run, Desired.DRAIN, Reason.STALLED, job.stop_grace_ms)

    def _warn(self, work: UnitOfWork, watched: Watched) -> RunFact:
        """Note what warnings stand now; return the run as it is then."""

        def says(code: str) -> str:
            return warning_text(code, facts_of(code, watched)) if code in standing else ""

        standing = warnings_now(watched)
        if standing == watched.run.warnings:
            return watched.run
        return work.put_run(watched.run, work.warn(watched.run, standing, says))

    def _lose(self, work: UnitOfWork, lease: LeaseFact, run: RunFact) -> None:
        agent = work.get(AgentFact, lease.provider)
        # It has spoken since it named this run last.
        lives = (
            agent is not None
            and agent.connected
            and self._context.heartbeats.last_seen_ms(agent) > run.last_seen_ms
        )
        reason = Reason.RUN_VANISHED if lives else Reason.PROVIDER_LOST
        silent_ms = work.now_ms - run.last_seen_ms
        give_up(self._context, work, lease, reason, f"silent for {silent_ms} ms")

    def _expire(self, work: UnitOfWork, id: str) -> None:
        job = work.must(JobFact, id)
        if job.state is JobState.QUEUED and job.started_ms is None:
            ended = ended_by_renter(job, JobState.CANCELLED, Reason.JOB_EXPIRED, work.now_ms)
            work.put_job(job, ended)
            release_if_ended(work, ended)

    def verdicts(self) -> int:
        """Act on what the verifier has finished. Return how many.

        The verifier tells each result once. Those that can't be written down now, as where the
        database is away, are kept for the next round: nobody else would ask for them again.
        """
        for result in self._context.ports.verifier.collect():
            self._unjudged[result.checkpoint] = result
        failed: Exception | None = None
        judged = 0
        for result in tuple(self._unjudged.values()):
            try:
                job = self._checkpoints.verdict(result)
            except Exception as error:  # noqa: BLE001 - one must not hold up the others
                failed = error
                continue
            del self._unjudged[result.checkpoint]
            judged += 1
            if job is not None:
                try:
                    self._retention.prune(job)
                except BlobsAway as error:
                    failed = error  # It is pruned with its next one.
        if failed is not None:
            raise failed
        return judged
