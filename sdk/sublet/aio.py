"""The same client for asyncio: every method of Client and Job, awaitable.

    async with sublet.aio.AsyncClient() as client:
        job = await client.run(image="...", command=["python", "train.py"], max_price=1, budget=5)
        view = await job.wait()

There is one implementation, the synchronous one; these methods run it in asyncio's default thread
pool. So a hundred waiting jobs don't hold a hundred threads (`wait` and `logs` poll, and sleep in
the event loop), but a cancelled upload or download stops being awaited, and its thread finishes.
What asks the broker is awaited: `await client.broker` too. A method that is added to Client or Job
and not here is an error on import.
"""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from sublet import client as sync
from sublet import finetuning, running
from sublet.errors import BrokerAway
from sublet.units import Moment
from sublet_contracts.api import JobLogLine, JobView
from sublet_contracts.keys import SigningKey
from sublet_contracts.states import JOB, JobState, is_terminal

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
C = TypeVar("C", bound=type)


def mirrors(original: type) -> Callable[[C], C]:
    """Return the decorator of a class that has all public names of `original`."""

    def checked(mirror: C) -> C:
        missing = public_names(original) - public_names(mirror)
        if missing:
            raise TypeError(
                f"{mirror.__name__} lacks {', '.join(sorted(missing))} of {original.__name__}"
            )
        return mirror

    return checked


def public_names(kind: type) -> set[str]:
    """Return the names of a class's public methods and properties."""
    return {name for name in vars(kind) if not name.startswith("_")}


def _awaited_function(
    function: Callable[P, sync.Job],
) -> Callable[P, Coroutine[Any, Any, "AsyncJob"]]:
    """Return the awaitable twin of a function that returns a job."""

    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> "AsyncJob":
        return AsyncJob(await asyncio.to_thread(function, *args, **kwargs))

    return call


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


@mirrors(sync.Client)
class AsyncClient:
    """A party at a broker; see sublet.Client. `sync` is that client."""

    def __init__(
        self,
        broker: str | None = None,
        profile: str | None = None,
        config_dir: Path | None = None,
        key: SigningKey | None = None,
        away_limit_s: float = 60.0,
    ) -> None:
        """Raises ConfigError, KeyRefused. Nothing is sent before the first call."""
        self.sync = sync.Client(broker, profile, config_dir, key, away_limit_s)

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

    @property
    def broker(self) -> Awaitable[str]:
        """The broker's id, to be awaited: the first time it is asked."""
        return asyncio.to_thread(lambda: self.sync.broker)

    def copy(self, away_limit_s: float | None = None) -> "AsyncClient":
        """Return a client of the same party with connections of its own."""
        return AsyncClient._of(self.sync.copy(away_limit_s))

    @classmethod
    def _of(cls, client: sync.Client) -> "AsyncClient":
        made = cls.__new__(cls)
        made.sync = client
        return made

    def handle(self, view: JobView) -> "AsyncJob":
        """Return a handle for a job that has been looked up already."""
        return AsyncJob(self.sync.handle(view))

    run = _awaited_job(sync.Client.run)
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


@mirrors(sync.Job)
class AsyncJob:
    """One job; see sublet.Job. `sync` is that handle."""

    def __init__(self, job: sync.Job) -> None:
        self.sync = job

    def __repr__(self) -> str:
        return f"Async{self.sync!r}"

    @property
    def client(self) -> AsyncClient:
        """The client that it was asked from."""
        return AsyncClient._of(self.sync.client)

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
    code_origin = _awaited(sync.Job.code_origin)
    checkpoints = _awaited(sync.Job.checkpoints)
    statement = _awaited(sync.Job.statement)
    export = _awaited(sync.Job.export)
    cosign = _awaited(sync.Job.cosign)
    download = _awaited(sync.Job.download)
    left_out = _awaited(sync.Job.left_out)

    async def wait(self, poll_s: float = sync.POLL_S) -> JobView:
        """Wait until it has ended or is paused, signing its receipts; can be cancelled."""
        warned: set[str] = set()
        while True:
            try:
                view = await self.view()
                sync.warn_once((await self.cosign()).refused, warned)
            except BrokerAway:
                await asyncio.sleep(poll_s)
                continue
            if is_terminal(JOB, view.state) or view.state is JobState.PAUSED:
                return view
            await asyncio.sleep(poll_s)

    async def logs(
        self,
        *,
        follow: bool = False,
        after: int = -1,
        tail: int | None = None,
        since: Moment | None = None,
        run: int | None = None,
        unfinished: bool = False,
    ) -> AsyncIterator[JobLogLine]:
        """Yield its output's lines, as sublet.Job.logs does; with `follow` until the job ends."""
        where: dict[str, Any] = {"tail": tail, "since": since}
        told: dict[str, str] = {}
        while True:
            # Asked first: what was written before the end is read after it.
            ended = not follow or is_terminal(JOB, (await self.view()).state)
            read = functools.partial(
                self.sync.logs, after=after, run=run, unfinished=unfinished, **where
            )
            for line in await asyncio.to_thread(_all_of, read):
                if line.unfinished:
                    if told.get(line.stream) == line.text:
                        continue
                    told[line.stream] = line.text
                else:
                    told.pop(line.stream, None)
                    after, where = line.cursor, {}
                yield line
            if ended:
                return
            await asyncio.sleep(sync.POLL_S)

    async def follow(self) -> JobView:
        """Show progress, logs and the price so far until it ends; cancelling it detaches."""
        from sublet.terminal.follow import follow

        stop = threading.Event()
        try:
            return await asyncio.to_thread(follow, self.sync, stop)
        finally:
            stop.set()


def _all_of(read: Callable[[], Iterable[JobLogLine]]) -> list[JobLogLine]:
    return list(read())


run = _awaited_function(running.run)
finetune = _awaited_function(finetuning.finetune)
