"""The same client for asyncio: every method of Client and Job, awaitable.

    async with sublet.aio.AsyncClient() as client:
        job = await client.run(image="...", command=["python", "train.py"], max_price=1, budget=5)
        view = await job.wait()

There is one implementation, the synchronous one; these methods run it in asyncio's default thread
pool. So a hundred waiting jobs don't hold a hundred threads (`wait` and `logs` poll, and sleep in
the event loop), but a cancelled upload or download stops being awaited, and its thread finishes.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from sublet import client as sync
from sublet import running
from sublet.http import BrokerAway
from sublet_contracts.api import JobLogLine, JobView
from sublet_contracts.states import JobState

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


def _awaited(
    method: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]:
    """Return the awaitable twin of a method of the synchronous class."""

    @wraps(method)
    async def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.to_thread(method, self.sync, *args, **kwargs)

    return call


def _awaited_job(
    method: Callable[Concatenate[S, P], sync.Job],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, "AsyncJob"]]:
    """As `_awaited`, for methods that return a job."""

    @wraps(method)
    async def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> "AsyncJob":
        return AsyncJob(await asyncio.to_thread(method, self.sync, *args, **kwargs))

    return call


class AsyncClient:
    """A party at a broker; see sublet.Client, whose arguments it takes. `sync` is that client."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sync = sync.Client(*args, **kwargs)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def party(self) -> str:
        """This party's id."""
        return self.sync.party

    async def run(self, **options: Any) -> "AsyncJob":
        """Submit a job; the options are those of `sublet.run`. Raises as Client.run does."""
        return AsyncJob(await asyncio.to_thread(lambda: self.sync.run(**options)))

    submit = _awaited_job(sync.Client.submit)
    job = _awaited_job(sync.Client.job)
    jobs = _awaited(sync.Client.jobs)
    match = _awaited(sync.Client.match)
    offers = _awaited(sync.Client.offers)
    balance = _awaited(sync.Client.balance)
    earnings = _awaited(sync.Client.earnings)
    fund = _awaited(sync.Client.fund)
    check_log = _awaited(sync.Client.check_log)
    close = _awaited(sync.Client.close)


class AsyncJob:
    """One job; see sublet.Job. `sync` is that handle."""

    def __init__(self, job: sync.Job) -> None:
        self.sync = job

    def __repr__(self) -> str:
        return f"Async{self.sync!r}"

    @property
    def id(self) -> str:
        """Its id."""
        return self.sync.id

    @property
    def name(self) -> str:
        """Its name."""
        return self.sync.name

    view = _awaited(sync.Job.view)
    cancel = _awaited(sync.Job.cancel)
    pause = _awaited(sync.Job.pause)
    resume = _awaited(sync.Job.resume)
    events = _awaited(sync.Job.events)
    checkpoints = _awaited(sync.Job.checkpoints)
    statement = _awaited(sync.Job.statement)
    export = _awaited(sync.Job.export)
    cosign = _awaited(sync.Job.cosign)
    download = _awaited(sync.Job.download)

    async def wait(self, poll_s: float = sync.POLL_S) -> JobView:
        """Wait until it has ended or is paused, signing its receipts; can be cancelled."""
        told: set[str] = set()
        while True:
            try:
                view = await self.view()
                sync.warn_of((await self.cosign()).refused, told)
            except BrokerAway:
                await asyncio.sleep(poll_s)
                continue
            if view.state in sync.TERMINAL or view.state is JobState.PAUSED:
                return view
            await asyncio.sleep(poll_s)

    async def logs(self, *, follow: bool = False, after: int = -1) -> AsyncIterator[JobLogLine]:
        """Yield its output's lines beyond cursor `after`; with `follow` until the job ends."""
        while True:
            # Asked first: what was written before the end is read after it.
            ended = not follow or (await self.view()).state in sync.TERMINAL
            for line in await asyncio.to_thread(self._lines, after):
                after = line.cursor
                yield line
            if ended:
                return
            await asyncio.sleep(sync.POLL_S)

    def _lines(self, after: int) -> list[JobLogLine]:
        return list(self.sync.logs(after=after))

    async def follow(self) -> JobView:
        """Show progress, logs and the price so far until it ends; cancelling it detaches."""
        from sublet.terminal.follow import follow

        stop = threading.Event()
        try:
            return await asyncio.to_thread(follow, self.sync, stop)
        finally:
            stop.set()


@wraps(running.run)
async def run(**options: Any) -> AsyncJob:
    """Submit a job; the options are those of `sublet.run`."""
    return AsyncJob(await asyncio.to_thread(lambda: running.run(**options)))
