"""Resuming: what becomes of a job when its lease has ended, and who takes it over.

Rules, first match counts:
1. It succeeded: the job has, whatever else was wished meanwhile.
2. The renter wants it cancelled: cancelled.
3. The reason's own meaning (reasons.py): finish, fail, cancel, pause or retry. A pause that the
   renter has taken back, and a budget's edge that has been topped up, are retries.
4. Before a retry: the renter wants a pause; then too many attempts without a new durable step; then
   a budget that pays for no further minute. Each of these pauses the job and says why.
5. Otherwise it goes on: recovering if it ever ran, queued if not.

An attempt is a lease that was signed, or that its agent refused because it can't have the image: a
tag is looked up before the lease is signed, and what comes of that counts as a pull does. The first
attempt after a loss starts at once: recovery time is what people wait for. Only attempts that come
to nothing one after the other wait longer and longer, and so does asking a provider again who has
refused. Providers that failed the job are avoided, not excluded, until it has made progress
elsewhere. A lease that was no attempt doesn't change why the job waits: what its last attempt came
to tells the renter more than that a machine has had enough of it.

An attempt that never ran (the pull, the start or the restore failed) says more about its machine
than about the job: of those there may be more, and each provider is asked once before any is asked
again. That the registry knows no such image ends a job only when three providers have said so, or
when nobody else fits and one says so again five minutes after the first. What has something durable
is paused instead of failed, by this and by kills that nobody owns to: nothing paid for is lost.

The first agent that signs says which image the job's tag means, and the job is pinned to that:
every later run uses the same, so that it makes the same bits. Until something durable was made with
it, a provider who knows nothing of the image that his lease names unpins the job, and is no witness
against its tag: the image may have been one agent's own, or its lie.
"""

from dataclasses import dataclass, replace

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import JobFact, LeaseFact
from sublet_broker.market.leasing import affords_a_lease
from sublet_contracts.documents import Job
from sublet_contracts.reasons import IMAGE_REASONS, MEANINGS, Next, Reason
from sublet_contracts.states import JOB, JobState, LeaseState, is_terminal, step

MAX_AVOIDED = 8
UNSTARTED_FOR_ONE_FRUITLESS = 4
"""So many attempts that never ran count for one that ran and came to nothing."""
IMAGE_WITNESSES = 3
IMAGE_WAIT_MS = 300_000
_NO_ATTEMPT = frozenset({Reason.LEASE_REFUSED, Reason.LEASE_UNANSWERED})
PAUSED_WHEN_DURABLE = frozenset({Reason.IMAGE_UNAVAILABLE, Reason.KILLED_TOO_OFTEN})
DURABLE_COUNTS = PAUSED_WHEN_DURABLE | IMAGE_REASONS
"""Where it matters whether something durable is there; a search for an image may end the job."""


@dataclass(frozen=True)
class Ending:
    """How a lease ended, in what matters to its job."""

    reason: Reason
    detail: str
    provider: str
    signed: bool
    """Whether the agent had signed the lease: else it was no attempt."""
    progressed: bool
    """Whether it made a new durable step."""
    ran: bool = True
    """Whether its agent ever said that the command was running."""
    successor: str = ""
    """The provider that has prepared to take over."""
    has_durable: bool = False
    """Whether the job would go on from something durable. Told where the reason is one of
    DURABLE_COUNTS: whoever tells looks it up for these only."""
    image_named: bool = False
    """Whether the lease named the image by content. Told where its image is the trouble."""
    topped_up: bool = False
    """Whether more can be charged now than this lease left over."""

    @property
    def is_attempt(self) -> bool:
        """Whether it counts as one."""
        return self.signed or self.reason in IMAGE_REASONS


@dataclass(frozen=True)
class Patience:
    """How often and how slowly attempts are made."""

    fruitless_limit: int
    backoff_ms: int
    backoff_max_ms: int


def after(job: JobFact, ending: Ending, patience: Patience, now_ms: int) -> JobFact:
    """Return the job after its lease ended. Its `settled_ucr` must count that lease already."""
    if is_terminal(JOB, job.state):
        return job
    job = _counted(job, ending, now_ms)
    ending = _image_judged(job, ending, now_ms)
    kind = _what_next(job, ending)
    if ending.reason is Reason.SUCCEEDED:
        return _moved(job, JobState.SUCCEEDED, Reason.SUCCEEDED, ending.detail, now_ms)
    if job.wanted == "cancel":
        return _moved(job, JobState.CANCELLED, Reason.CANCELLED, ending.detail, now_ms)
    if kind is Next.FAIL:
        return _moved(job, JobState.FAILED, ending.reason, ending.detail, now_ms)
    if kind is Next.CANCEL:
        return _moved(job, JobState.CANCELLED, ending.reason, ending.detail, now_ms)
    if kind is Next.PAUSE:
        return _moved(job, JobState.PAUSED, ending.reason, ending.detail, now_ms)
    return _retried(job, ending, patience, now_ms)


def _counted(job: JobFact, ending: Ending, now_ms: int) -> JobFact:
    if not ending.is_attempt:
        return replace(job, refusals=job.refusals + 1, prefer="")
    job = replace(job, refusals=0, prefer="")
    if ending.ran:
        job = replace(job, unstarted=0, image_unknown=(), image_unknown_since_ms=0)
        if ending.progressed:
            return replace(job, fruitless=0, avoid=())
        return replace(job, fruitless=job.fruitless + 1)
    job = replace(job, unstarted=job.unstarted + 1)
    if ending.reason is not Reason.IMAGE_UNKNOWN:
        return job
    if ending.image_named and not ending.has_durable:
        return replace(job, image_pinned="")
    return replace(
        job,
        image_unknown=(*job.image_unknown, ending.provider)[-MAX_AVOIDED:],
        image_unknown_since_ms=job.image_unknown_since_ms or now_ms,
    )


def _image_judged(job: JobFact, ending: Ending, now_ms: int) -> Ending:
    """Return the ending with the last word on an image, once enough have looked for it."""
    if ending.reason is not Reason.IMAGE_UNKNOWN:
        return ending
    said = job.image_unknown
    asked = set(said)
    # Whoever failed the job is tried again only when nobody else fits.
    all_twice = said.count(ending.provider) > 1
    waited = now_ms - job.image_unknown_since_ms >= IMAGE_WAIT_MS
    if len(asked) < IMAGE_WITNESSES and not (all_twice and waited):
        return ending
    detail = f"{ending.detail} (said by {len(asked)} providers, in {len(said)} attempts)"
    return replace(ending, reason=Reason.IMAGE_UNAVAILABLE, detail=detail)


def _what_next(job: JobFact, ending: Ending) -> Next:
    meaning = MEANINGS[ending.reason].next
    if ending.reason in PAUSED_WHEN_DURABLE and ending.has_durable:
        return Next.PAUSE
    if ending.reason is Reason.PAUSED_BY_RENTER and job.wanted != "pause":
        return Next.RETRY
    if ending.reason is Reason.BUDGET_EXHAUSTED and ending.topped_up:
        return Next.RETRY
    return meaning


def _retried(job: JobFact, ending: Ending, patience: Patience, now_ms: int) -> JobFact:
    if job.wanted == "pause":
        return _moved(job, JobState.PAUSED, Reason.PAUSED_BY_RENTER, "", now_ms)
    most_unstarted = UNSTARTED_FOR_ONE_FRUITLESS * patience.fruitless_limit
    if job.fruitless >= patience.fruitless_limit or job.unstarted >= most_unstarted:
        attempts = job.fruitless + job.unstarted
        detail = f"{attempts} attempts, the last one: {MEANINGS[ending.reason].says}"
        return _moved(job, JobState.PAUSED, Reason.NO_PROGRESS, detail, now_ms)
    if not affords_a_lease(job, accepted(job.envelope, Job)):
        return _moved(job, JobState.PAUSED, Reason.BUDGET_EXHAUSTED, ending.detail, now_ms)
    waiting = JobState.QUEUED if job.started_ms is None else JobState.RECOVERING
    blamed = MEANINGS[ending.reason].next is Next.RETRY and ending.reason is not Reason.YIELDED
    avoid = (*(p for p in job.avoid if p != ending.provider), ending.provider)
    # What it has run since would have taken the reason away.
    keeps = not ending.is_attempt and job.reason is not None and job.reason not in _NO_ATTEMPT
    return replace(
        job,
        state=waiting if job.state is waiting else step(JOB, job.state, waiting),
        reason=job.reason if keeps else ending.reason,
        detail=job.detail if keeps else ending.detail,
        avoid=avoid[-MAX_AVOIDED:] if blamed else job.avoid,
        prefer=ending.successor,
        not_before_ms=now_ms + _wait_ms(job, ending, patience),
    )


def _wait_ms(job: JobFact, ending: Ending, patience: Patience) -> int:
    if ending.signed and ending.ran:
        return _backoff_ms(job.fruitless - 1, patience)
    # Whoever hasn't refused or failed it yet is asked at once.
    failures = job.unstarted if ending.is_attempt else job.refusals
    return _backoff_ms(failures, patience) if ending.provider in job.avoid else 0


def _backoff_ms(failures: int, patience: Patience) -> int:
    if failures < 1:
        return 0
    return min(patience.backoff_ms << min(failures - 1, 32), patience.backoff_max_ms)


def _moved(job: JobFact, state: JobState, reason: Reason, detail: str, now_ms: int) -> JobFact:
    return replace(
        job,
        state=step(JOB, job.state, state),
        reason=reason,
        detail=detail,
        wanted="",
        prefer="",
        ended_ms=now_ms if is_terminal(JOB, state) else None,
    )


def ended_by_renter(job: JobFact, state: JobState, reason: Reason, now_ms: int) -> JobFact:
    """Return a job without a live lease as cancelled or paused, or cancelled by its expiry."""
    return _moved(job, state, reason, "", now_ms)


def resumed(job: JobFact, now_ms: int) -> JobFact:
    """Return a paused job as queued again."""
    waiting = JobState.QUEUED if job.started_ms is None else JobState.RECOVERING
    return replace(
        job,
        state=step(JOB, job.state, waiting),
        reason=None,
        detail="",
        wanted="",
        fruitless=0,
        unstarted=0,
        image_unknown=(),
        image_unknown_since_ms=0,
        not_before_ms=now_ms,
    )


def wants_machine(job: JobFact, leases: list[LeaseFact]) -> bool:
    """Say whether the job is queued. `leases`: those of the job that aren't closed."""
    live = any(lease.state is not LeaseState.CLOSED for lease in leases)
    return job.state in (JobState.QUEUED, JobState.RECOVERING) and not job.wanted and not live
