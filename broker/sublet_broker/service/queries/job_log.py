"""Where to begin in a job's log, and what comes from there on. Everything is found by key: how long
the log is makes no difference.

A job's lines are numbered from 1 without a gap, in order of arrival; and those of each lease from
0. Times are the agents' own, so `since` finds a place and not a set: the first line, by halving,
from which on lines are as new as asked, and all that came after it.
"""

from sublet_broker.market.facts import JobFact, LeaseFact, LogLineFact
from sublet_broker.service.errors import Refusal
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.api import JobLogLine
from sublet_contracts.problems import ProblemCode


def log_start(
    snapshot: UnitOfWork, job: JobFact, *, tail: int | None, since_ms: int | None, epoch: int | None
) -> int:
    """Return the cursor after which the wanted lines begin. `tail`: that many lines from the end,
    `since_ms`: those written at that time or later, `epoch`: of that run. Raises Refusal (not
    found): the job has no such run."""
    after = 0
    lease = None if epoch is None else lease_of(snapshot, job, epoch)
    if tail is not None:
        after = _before_last(snapshot, job, lease, tail)
    if since_ms is not None:
        after = max(after, _before_time(snapshot, job.id, after, since_ms))
    return after


def log_lines(
    snapshot: UnitOfWork, job: JobFact, *, after: int, limit: int, epoch: int | None
) -> list[JobLogLine]:
    """Return at most `limit` lines after cursor `after`, of all runs or of one. Raises Refusal
    (not found)."""
    if epoch is None:
        found = snapshot.find(
            LogLineFact, {"job": job.id}, after=("id", after), order_by="id", limit=limit
        )
    else:
        lease = lease_of(snapshot, job, epoch)
        last = snapshot.get(LogLineFact, job.id, after) if after else None
        number = last.number if last is not None and last.lease == lease else -1
        of_lease = snapshot.find(
            LogLineFact, {"lease": lease}, after=("number", number), order_by="number", limit=limit
        )
        # Where the cursor is another run's line, this run's lines before it are left out as well.
        found = [line for line in of_lease if line.id > after] if number < 0 else of_lease
    return [
        JobLogLine(
            cursor=line.id,
            epoch=line.epoch,
            number=line.number,
            time_ms=line.time_ms,
            stream=line.stream,
            text=line.text,
        )
        for line in found
    ]


def lease_of(snapshot: UnitOfWork, job: JobFact, epoch: int) -> str:
    """Return the lease of a job's run. Raises Refusal (not found)."""
    found = snapshot.find(LeaseFact, {"job": job.id, "epoch": epoch}, limit=1)
    if found:
        return found[0].id
    raise Refusal(
        ProblemCode.NOT_FOUND,
        f"the job has no run {epoch}; it has had {job.epoch}",
        field="run",
        what="run",
        ref=str(epoch),
    )


def _before_last(snapshot: UnitOfWork, job: JobFact, lease: str | None, count: int) -> int:
    """Return the cursor before the last `count` lines."""
    if lease is None:
        newest = snapshot.find(
            LogLineFact, {"job": job.id}, order_by="id", descending=True, limit=1
        )
        return max(0, newest[0].id - count) if newest else 0
    of_lease = snapshot.find(
        LogLineFact, {"lease": lease}, order_by="number", descending=True, limit=1
    )
    if not of_lease or of_lease[0].number < count:
        return 0
    if not count:
        return of_lease[0].id
    [before] = snapshot.find(
        LogLineFact, {"lease": lease, "number": of_lease[0].number - count}, limit=1
    )
    return before.id


def _before_time(snapshot: UnitOfWork, job: str, after: int, since_ms: int) -> int:
    """Return the cursor of the last line before that time, by halving; `after`: not before it."""
    newest = snapshot.find(LogLineFact, {"job": job}, order_by="id", descending=True, limit=1)
    older, newer = after, (newest[0].id if newest else 0) + 1
    # All up to `older` is older, or not asked for; all from `newer` on is as new as asked.
    while newer - older > 1:
        middle = (older + newer) // 2
        line = snapshot.get(LogLineFact, job, middle)
        if line is None or line.time_ms >= since_ms:
            newer = middle
        else:
            older = middle
    return older
