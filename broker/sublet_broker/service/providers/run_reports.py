"""Reports: heartbeats, changes of runs, answers to leases, and logs, as agents send them."""

from dataclasses import replace
from functools import partial

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import (
    AgentFact,
    ChainFact,
    JobFact,
    LeaseFact,
    LogLineFact,
    RunFact,
)
from sublet_broker.market.leasing import is_held
from sublet_broker.market.running import exited, heard, is_at_edge, is_over, takes_logs
from sublet_broker.market.setting_aside import has_started
from sublet_broker.service.errors import StaleInstance
from sublet_broker.service.leases.closing import close, close_if_due, send_stop
from sublet_broker.service.leases.open_offers import OpenOffers
from sublet_broker.service.leases.standby import prepare_successor, release_successor
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.heartbeats import with_figures
from sublet_broker.service.unit_of_work.signed_input import merge, receive_document
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.documents import DocumentRefused, Job, Lease
from sublet_contracts.envelope import Envelope
from sublet_contracts.image_references import can_mean
from sublet_contracts.reasons import IMAGE_REASONS, Reason
from sublet_contracts.states import (
    JOB,
    LEASE,
    ChainState,
    Desired,
    JobState,
    LeaseState,
    RunState,
    step,
)
from sublet_contracts.wire import (
    Heartbeat,
    LeaseAnswer,
    LogLine,
    Logs,
    LogStates,
    LogsWanted,
    Prepared,
    RunChanged,
    RunReport,
)


def current_agent(work: UnitOfWork, party: str, instance: str) -> AgentFact:
    """Return an agent, if that is its newest connection. Raises StaleInstance."""
    agent = work.get(AgentFact, party)
    if agent is None or agent.instance != instance:
        raise StaleInstance
    return agent


def _trust_again(work: UnitOfWork, provider: str) -> None:
    """A run has started there: whatever kept others from starting is over."""
    agent = work.get(AgentFact, provider)
    if agent is not None and agent.start_failures:
        work.put(has_started(agent), before=agent)
        work.touch_offer(provider)


class RunReports:
    """What agents say about their runs."""

    def __init__(self, context: Context, open_offers: OpenOffers) -> None:
        self._context = context
        self._open_offers = open_offers

    def steady(self, party: str, instance: str, message: Heartbeat) -> bool:
        """Take a heartbeat that changes nothing but figures: in memory, at once, waiting for
        nobody. False: it needs `heartbeat`."""
        now_ms = self._context.ports.clock.now_ms()
        return self._context.heartbeats.take(party, instance, message.runs, now_ms)

    def log_states(self, party: str, instance: str, message: LogStates) -> None:
        """Take how a run's unfinished lines stand: in memory, at once, waiting for nobody."""
        now_ms = self._context.ports.clock.now_ms()
        self._context.heartbeats.take_unfinished(party, instance, message, now_ms)

    def heartbeat(self, party: str, instance: str, message: Heartbeat) -> None:
        """Note who lives. A run that isn't named isn't heard from. Raises StaleInstance."""
        if self.steady(party, instance, message):
            return
        heartbeats = self._context.heartbeats
        steady: list[RunFact] = []
        with self._context.work() as work:
            agent = current_agent(work, party, instance)
            seen = replace(agent, connected=True, last_seen_ms=work.now_ms)
            work.put(seen, before=agent)
            if not agent.connected:
                work.touch_offer(party)
            for report in message.runs:
                run = self._report(work, party, report)
                if run is not None and run.state == report.state:
                    steady.append(run)
        heartbeats.mark_steady(party, steady, work.token)

    def _report(self, work: UnitOfWork, party: str, report: RunReport) -> RunFact | None:
        """Act on one line of a heartbeat; return the run if it lives."""
        lease = work.get(LeaseFact, report.lease)
        if lease is None or lease.provider != party:
            return None
        if lease.state is LeaseState.CLOSED:
            if report.state != "exited":
                send_stop(work, lease, lease.reason or Reason.PROVIDER_LOST)
            return None
        run = work.get(RunFact, lease.id)
        job = work.must(JobFact, lease.job)
        if run is None or is_over(run) or not is_held(lease, job, party, report.epoch):
            return None
        self._context.heartbeats.track(run, lease.start_step, work.token)
        if run.state is RunState.UNKNOWN:
            self._context.heartbeats.note_return(run.id, work.now_ms)
        self._context.heartbeats.note_usage(report, work.now_ms)
        self._context.heartbeats.note_signs(report, work.now_ms)
        figures = with_figures(run, report, work.now_ms)
        return self._observed(work, job, lease, run, figures, RunState(report.state))

    def _observed(
        self,
        work: UnitOfWork,
        job: JobFact,
        lease: LeaseFact,
        before: RunFact,
        run: RunFact,
        state: RunState,
    ) -> RunFact:
        """Note that a run lives and where it stands, and what that means for its job."""
        reached = run.known_state if state is RunState.EXITED else state
        release_successor(work, before)
        after = work.put_run(before, heard(run, reached, work.now_ms))
        if before.running_ms is None and after.running_ms is not None:
            _trust_again(work, lease.provider)
        if after.running_ms is not None and job.state in (JobState.STARTING, JobState.RECOVERING):
            work.put_job(
                job,
                replace(
                    job,
                    state=step(JOB, job.state, JobState.RUNNING),
                    reason=None,
                    detail="",
                    started_ms=job.started_ms or work.now_ms,
                ),
                lease=lease.id,
            )
        return after

    def run_changed(self, party: str, message: RunChanged) -> None:
        """Note that a run entered a state."""
        with self._context.work() as work:
            lease = work.get(LeaseFact, message.lease)
            if lease is None or lease.provider != party:
                return
            run = work.get(RunFact, lease.id)
            job = work.must(JobFact, lease.job)
            if lease.state is LeaseState.CLOSED:
                if message.state != "exited":
                    send_stop(work, lease, lease.reason or Reason.PROVIDER_LOST)
                return
            if run is None or is_over(run) or not is_held(lease, job, party, message.epoch):
                return
            counted = replace(run, cum_device_ms=max(run.cum_device_ms, message.cum_device_ms))
            if message.state != "exited":
                self._observed(work, job, lease, run, counted, RunState(message.state))
                self._note_notice(work, run, message)
                return
            release_successor(work, run)
            reason = message.reason or Reason.RUN_KILLED
            at_edge = is_at_edge(
                lease,
                message.cum_device_ms,
                stop_grace_ms=accepted(job.envelope, Job).stop_grace_ms,
                margin_ms=self._context.settings.drain_margin_ms,
            )
            ended = exited(
                counted,
                reason,
                message.exit_code,
                message.detail,
                work.now_ms,
                at_edge=at_edge,
            )
            stall = work.stall(lease.id)
            if stall is not None:
                # Heartbeats' figures go with the run; this one is still asked for afterwards.
                ended = replace(ended, stall=stall.model_dump())
            work.put_run(run, ended)
            close_if_due(self._context, work, lease)

    def _note_notice(self, work: UnitOfWork, run: RunFact, message: RunChanged) -> None:
        """Keep the reason for a drain that the provider began by itself."""
        now = work.must(RunFact, run.id)
        if message.state == "draining" and message.reason and now.desired is Desired.RUN:
            work.put(replace(now, detail=f"the provider drains it: {message.reason}"))

    def lease_answer(self, party: str, message: LeaseAnswer) -> None:
        """Take an agent's signature on a lease, or its refusal. Raises DocumentRefused."""
        with self._context.work() as work:
            lease = work.get(LeaseFact, message.lease)
            if lease is None or lease.provider != party:
                raise DocumentRefused("it answers a lease that was not offered", "lease")
            if lease.state is LeaseState.CLOSED:
                if message.signed is not None:
                    send_stop(work, lease, lease.reason or Reason.LEASE_UNANSWERED)
                return
            if lease.state is LeaseState.ACTIVE:
                return
            if message.signed is None:
                of_image = message.reason if message.reason in IMAGE_REASONS else None
                reason = of_image or Reason.LEASE_REFUSED
                if of_image:
                    # There is no run whose log could tell it.
                    self._tell_in_log(work, lease, f"{reason}: {message.refusal}")
                close(self._context, work, lease, reason, message.refusal)
            else:
                self._activate(work, lease, message.signed, message.image)

    def _tell_in_log(self, work: UnitOfWork, lease: LeaseFact, text: str) -> None:
        line = LogLine(number=0, time_ms=work.now_ms, stream="sublet", text=text)
        self._keep_lines(work, lease, Logs(lease=lease.id, epoch=lease.epoch, lines=(line,)))

    def _pin_image(self, work: UnitOfWork, lease: LeaseFact, image: str) -> None:
        """Keep what the job's tag means, as the first agent that signs has looked it up."""
        named = accepted(lease.envelope, Lease).image
        job = work.must(JobFact, lease.job)
        if named and image != named:
            raise DocumentRefused(f"{image or 'nothing'} was said of {named}", "image")
        if not image or named:
            return
        tag = accepted(job.envelope, Job).image
        if not can_mean(tag, image):
            raise DocumentRefused(f"{image} is not what {tag!a} can mean", "image")
        work.put(replace(job, image_pinned=image))

    def _activate(self, work: UnitOfWork, lease: LeaseFact, envelope: Envelope, image: str) -> None:
        parties = (self._context.party, lease.provider)
        signed = receive_document(self._context, envelope, Lease, signed_by=parties)
        if signed.id != lease.id:
            raise DocumentRefused("another lease was signed than the one offered", "signed")
        self._pin_image(work, lease, image)
        active = replace(
            lease,
            state=step(LEASE, lease.state, LeaseState.ACTIVE),
            active_ms=work.now_ms,
            envelope=merge(lease.envelope, envelope),
        )
        work.put(active)
        work.record(lease.id)
        run = RunFact(
            id=lease.id,
            job=lease.job,
            provider=lease.provider,
            epoch=lease.epoch,
            state=RunState.ASSIGNED,
            desired=Desired.RUN,
            last_seen_ms=work.now_ms,
            known_state=RunState.ASSIGNED,
            step=lease.start_step,
        )
        work.add(run)
        work.add(ChainFact(lease.id, lease.job, ChainState.OPEN))
        work.event(
            "lease",
            lease.job,
            lease=lease.id,
            epoch=lease.epoch,
            before=lease.state,
            after=active.state,
            detail=f"step {lease.start_step}" + (f", image {image}" if image else ""),
        )

    def prepared(self, party: str, message: Prepared) -> None:
        """Note whether a successor is ready; where it can't be, try another."""
        self._open_offers.refresh()
        with self._context.work() as work:
            for run in work.find(RunFact, {"job": message.job, "successor": party}):
                work.event(
                    "successor",
                    run.job,
                    lease=run.id,
                    epoch=run.epoch,
                    before="preparing",
                    after="ready" if message.ready else "unable",
                    detail=message.detail,
                )
                if not message.ready:
                    lease = work.must(LeaseFact, run.id)
                    free = work.put_run(run, replace(run, successor=""))
                    work.touch_offer(party)
                    prepare_successor(self._open_offers, work, lease, free, without=party)

    def logs(self, party: str, message: Logs) -> LogsWanted:
        """Keep the lines that are next; return the number that is wanted after them.

        What isn't wanted, for whatever reason, is answered with the number past it, so that its
        agent lets go of it.
        """
        end = LogsWanted(lease=message.lease, next_number=message.lines[-1].number + 1)
        with self._context.work() as work:
            lease = work.get(LeaseFact, message.lease)
            if lease is None or lease.provider != party or lease.epoch != message.epoch:
                return end
            job = work.must(JobFact, lease.job)
            run = work.get(RunFact, lease.id)
            late_ms = self._context.settings.late_logs_ms
            if not takes_logs(lease, job, run, now_ms=work.now_ms, late_ms=late_ms):
                return end
            return self._keep_lines(work, lease, message) or end

    def _keep_lines(self, work: UnitOfWork, lease: LeaseFact, message: Logs) -> LogsWanted | None:
        """Append what is next; None: the job's log is full."""
        settings = self._context.settings
        kept: dict[str, int] = {}
        work.tx.after_commit(partial(self._context.heartbeats.finished, lease.id, kept))
        newest = work.find(LogLineFact, {"job": lease.job}, order_by="id", descending=True, limit=1)
        last, total_bytes = (newest[0].id, newest[0].total_bytes) if newest else (0, 0)
        if last >= settings.max_job_logs or total_bytes >= settings.max_job_log_bytes:
            return None
        wanted = self._next_number(work, lease.id)
        for line in message.lines:
            if line.number != wanted:
                continue
            last, wanted = last + 1, wanted + 1
            kept[line.stream] = wanted
            total_bytes += len(line.text.encode()) + 1
            work.put(
                LogLineFact(
                    lease.job,
                    last,
                    lease.id,
                    lease.epoch,
                    line.number,
                    line.time_ms,
                    line.stream,
                    line.text,
                    total_bytes,
                )
            )
            work.jobs_with_news[lease.job] = None
            self._context.heartbeats.note_output(lease.id, work.now_ms)
            if last >= settings.max_job_logs or total_bytes >= settings.max_job_log_bytes:
                work.event(
                    "log",
                    lease.job,
                    lease=lease.id,
                    epoch=lease.epoch,
                    after="full",
                    detail=f"{last} lines, {total_bytes} bytes: what comes later is not kept",
                )
                return None
        return LogsWanted(lease=lease.id, next_number=wanted)

    def _next_number(self, work: UnitOfWork, lease: str) -> int:
        newest = work.find(
            LogLineFact, {"lease": lease}, order_by="number", descending=True, limit=1
        )
        return newest[0].number + 1 if newest else 0
