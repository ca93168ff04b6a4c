"""Views: what callers may see, put together from facts. Nothing here changes anything.

Renters see their own jobs only; for everybody else those don't exist.
"""

from sublet_broker.market.checkpointing import kept_until_ms
from sublet_broker.market.facts import (
    EventFact,
    JobFact,
    LeaseFact,
    ReceiptFact,
)
from sublet_broker.service.errors import Refusal
from sublet_broker.service.queries.checkpoints import checkpoints_page
from sublet_broker.service.queries.export import Exporter, chain_receipts
from sublet_broker.service.queries.job_log import log_lines, log_start
from sublet_broker.service.queries.job_view import job_view
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.job_lookup import own_job
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.api import (
    BrokerInfo,
    CheckpointsPage,
    EventsPage,
    EventView,
    JobLogLine,
    JobsPage,
    JobView,
    LogView,
    ReceiptsPage,
)
from sublet_contracts.export import Export
from sublet_contracts.problems import ProblemCode
from sublet_contracts.states import JobState

MAX_CHECKPOINTS = 1000
MAX_JOBS = 1000
MAX_EVENTS = 1000
MAX_LINES = 5000


class Views:
    """What can be looked at."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._exporter = Exporter(context)

    def info(self, version: str) -> BrokerInfo:
        """Return who this broker is."""
        settings = self._context.settings
        return BrokerInfo(
            broker=self._context.party,
            version=version,
            time_ms=self._context.ports.clock.now_ms(),
            fee_bps=settings.fee_bps,
            heartbeat_ms=settings.heartbeat_ms,
            image_policy=settings.image_policy,
            max_blob_bytes=settings.max_blob_bytes,
        )

    def job(self, caller: str, ref: str) -> JobView:
        """Return a job."""
        with self._context.read() as snapshot:
            return self._view(snapshot, own_job(snapshot, caller, ref))

    def jobs(
        self, caller: str, state: str | None = None, name: str | None = None, limit: int = 100
    ) -> JobsPage:
        """Return the caller's jobs, newest first."""
        where: dict[str, object] = {"renter": caller}
        if state:
            if state not in set(JobState):
                raise Refusal(
                    ProblemCode.BAD_STATE,
                    f"{state[:40]!r} is not a job's state",
                    field="state",
                    state=state[:40],
                )
            where["state"] = JobState(state)
        if name:
            where["name"] = name
        with self._context.read() as snapshot:
            found = snapshot.find(
                JobFact,
                where,
                order_by="submitted_ms",
                descending=True,
                limit=max(1, min(limit, MAX_JOBS)),
            )
            return JobsPage(jobs=tuple(self._view(snapshot, job) for job in found))

    def _view(self, snapshot: UnitOfWork, job: JobFact) -> JobView:
        return job_view(snapshot, job, keep_ended_ms=self._context.settings.keep_ended_ms)

    def events(self, caller: str, ref: str, after: int = 0, limit: int = 500) -> EventsPage:
        """Return a job's history after event number `after`."""
        with self._context.read() as snapshot:
            job = own_job(snapshot, caller, ref)
            found = snapshot.find(
                EventFact,
                {"job": job.id},
                after=("id", after),
                order_by="id",
                limit=max(1, min(limit, MAX_EVENTS)),
            )
        views = tuple(
            EventView(
                id=e.id,
                time_ms=e.time_ms,
                job=e.job,
                lease=e.lease or None,
                epoch=e.epoch,
                kind=e.kind,
                before=e.before,
                after=e.after,
                reason=e.reason,
                detail=e.detail,
            )
            for e in found
        )
        return EventsPage(events=views, next_after=views[-1].id if views else after)

    def logs(
        self, caller: str, ref: str, after: int = 0, limit: int = 1000, epoch: int | None = None
    ) -> list[JobLogLine]:
        """Return a job's log lines after cursor `after`, of all its runs or of one."""
        with self._context.read() as snapshot:
            job = own_job(snapshot, caller, ref)
            most = max(1, min(limit, MAX_LINES))
            return log_lines(snapshot, job, after=after, limit=most, epoch=epoch)

    def log_start(
        self,
        caller: str,
        ref: str,
        *,
        tail: int | None = None,
        since_ms: int | None = None,
        epoch: int | None = None,
    ) -> int:
        """Return the cursor after which the last `tail` lines begin, or those since a time."""
        with self._context.read() as snapshot:
            job = own_job(snapshot, caller, ref)
            return log_start(snapshot, job, tail=tail, since_ms=since_ms, epoch=epoch)

    def unfinished(self, job: str, after: int, epoch: int | None = None) -> list[JobLogLine]:
        """Return how the lines stand that a job is writing, from memory; `after`: the cursor that
        they come behind. Whoever asks has looked the job up, and so may see it."""
        running, states = self._context.heartbeats.unfinished(job)
        return [
            JobLogLine(
                cursor=after,
                epoch=running,
                number=state.number,
                time_ms=state.time_ms,
                stream=state.stream,
                text=state.text,
                unfinished=True,
            )
            for state in states
            if epoch in (None, running)
        ]

    def checkpoints(
        self,
        caller: str,
        ref: str,
        kind: str | None = None,
        before_ms: int | None = None,
        limit: int = MAX_CHECKPOINTS,
    ) -> CheckpointsPage:
        """Return a job's checkpoints and outputs, or those of a kind, newest first."""
        with self._context.read() as snapshot:
            job = own_job(snapshot, caller, ref)
            keep_ended_ms = self._context.settings.keep_ended_ms
            until_ms = kept_until_ms(job, keep_ended_ms=keep_ended_ms)
            return checkpoints_page(
                snapshot,
                job,
                kind=kind,
                before_ms=before_ms,
                limit=max(1, min(limit, MAX_CHECKPOINTS)),
                until_ms=until_ms,
            )

    def receipts(self, caller: str, ref: str, unsigned: bool = False) -> ReceiptsPage:
        """Return a job's receipts, oldest first. `unsigned`: of each lease the newest one, where
        the renter hasn't signed it: cumulative, it stands for all before it."""
        with self._context.read() as snapshot:
            job = own_job(snapshot, caller, ref)
            leases = snapshot.find(LeaseFact, {"job": job.id}, order_by="epoch")
            shown: list[ReceiptFact] = []
            for lease in leases:
                chain = chain_receipts(snapshot, lease.id)
                if unsigned:
                    chain = [r for r in chain[-1:] if not r.countersigned]
                shown += chain
        wanted = {receipt.lease for receipt in shown}
        return ReceiptsPage(
            receipts=tuple(receipt.envelope for receipt in shown),
            leases={lease.id: lease.envelope for lease in leases if lease.id in wanted},
        )

    def export(self, caller: str, ref: str) -> Export:
        """Return all documents of a job with their proofs: what verify_export checks offline."""
        with self._context.read() as snapshot:
            return self._exporter.export(snapshot, own_job(snapshot, caller, ref))

    def log(self, since: int) -> LogView:
        """Return the log's head, and the proof that it only grew since it had that many entries."""
        with self._context.read() as snapshot:
            return self._exporter.since(snapshot, since)
