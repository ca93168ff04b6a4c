"""A job's log as a stream of NDJSON that can be followed.

Each line is a JobLogLine; an empty line now and then is a heartbeat, by which a dead connection is
noticed. The database is read when the job has news, and at the slowest every FALLBACK_S. How the
lines stand that the job has not finished comes from memory, and is told when it has changed.
A reader that is slow slows only its own stream: nothing is buffered beyond one batch.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response, StreamingResponse

from sublet_broker.adapters.http.edge import Edge
from sublet_broker.adapters.http.jobs import After, JobRef
from sublet_broker.adapters.http.openapi import READ, SIGNED, problems
from sublet_broker.adapters.http.signed_calls import Reading
from sublet_contracts.api import JobLogLine, JobView
from sublet_contracts.encoding import MAX_INTEGER
from sublet_contracts.states import JOB, is_terminal

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

BATCH = 500
HEARTBEAT_S = 10.0
FALLBACK_S = 5.0
COALESCE_S = 0.05
STATES_S = 0.3
"""How often it is looked, in memory, how unfinished lines stand."""
SETTLE_S = 0.5
"""After lines came, more may be under way; then the job's end is looked for."""
LINGER_MS = 1_000
"""A job's last lines may arrive just after its end: the stream waits so long for them."""
NDJSON = "application/x-ndjson"


@dataclass(frozen=True)
class _Wanted:
    """What one reader wants of which job."""

    party: str
    job: str
    run: int | None
    follow: bool
    unfinished: bool


@router.get(
    "/{job}/logs",
    summary="The job's output",
    response_class=Response,
    responses={
        200: {"description": "one JobLogLine per line", "content": {NDJSON: {}}},
        **READ,
        **problems(429),
    },
    openapi_extra=SIGNED,
)
async def logs(
    call: Reading,
    job: JobRef,
    after: After = 0,
    follow: Annotated[bool, Query(description="stay until the job has ended")] = False,
    tail: Annotated[
        int | None, Query(ge=0, le=MAX_INTEGER, description="only so many lines, the last ones")
    ] = None,
    since_ms: Annotated[
        int | None,
        Query(ge=0, le=MAX_INTEGER, description="only from the first line written since then"),
    ] = None,
    run: Annotated[
        int | None, Query(ge=1, le=MAX_INTEGER, description="only of this run: its lease's epoch")
    ] = None,
    unfinished: Annotated[
        bool, Query(description="also how lines stand that the job is still writing")
    ] = False,
) -> Response:
    """From `after` (the last cursor you have) on; no line is repeated or skipped. Where it begins
    is found by key, however long the log is."""
    views = call.edge.broker.views

    def begin() -> tuple[JobView, int, list[JobLogLine]]:
        call.admit()
        view = views.job(call.party, job)
        start = views.log_start(call.party, view.id, tail=tail, since_ms=since_ms, epoch=run)
        start = max(after, start)
        return view, start, views.logs(call.party, view.id, start, BATCH, run)

    view, start, lines = await call.edge.call(begin)
    wanted = _Wanted(call.party, view.id, run, follow, unfinished)
    stream = _stream(call.edge, wanted, lines, start)
    # The first piece is made here: what is refused is refused before the answer has begun.
    first = await anext(stream)

    async def whole() -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(stream):
            yield first
            async for piece in stream:
                yield piece

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(whole(), media_type=NDJSON, headers=headers)


class _States:
    """What one reader was told of the unfinished lines."""

    def __init__(self, edge: Edge, wanted: _Wanted) -> None:
        self._views = edge.broker.views
        self._wanted = wanted
        self._told: dict[str, JobLogLine] = {}

    def news(self, after: int) -> list[JobLogLine]:
        """Return how they stand, as far as that has changed: in memory, waiting for nothing."""
        if not self._wanted.unfinished:
            return []
        now = self._views.unfinished(self._wanted.job, after, self._wanted.run)
        found = {line.stream: line for line in now}
        gone = {
            stream: line.model_copy(update={"text": "", "cursor": after})
            for stream, line in self._told.items()
            if stream not in found and line.text
        }
        news = [
            line
            for stream, line in (found | gone).items()
            if stream not in self._told or self._told[stream].text != line.text
        ]
        self._told |= found | gone
        return news

    def finished(self, lines: list[JobLogLine]) -> None:
        """These lines were told: they stand where a state of their stream stood."""
        for line in lines:
            self._told.pop(line.stream, None)


async def _stream(
    edge: Edge, wanted: _Wanted, lines: list[JobLogLine], after: int
) -> AsyncGenerator[bytes, None]:
    views = edge.broker.views
    party, job = wanted.party, wanted.job
    states = _States(edge, wanted)
    with contextlib.ExitStack() as stack:
        news = stack.enter_context(edge.feeds.following(party, job)) if wanted.follow else None
        loop = asyncio.get_running_loop()
        yield _as_ndjson(lines) or b"\n"
        beat = loop.time()
        while True:
            if lines:
                after = lines[-1].cursor
                states.finished(lines)
            if len(lines) < BATCH:
                if found := states.news(after):
                    yield _as_ndjson(found)
                    beat = loop.time()
                if news is None or edge.stopping.is_set():
                    return
                left_ms = None if lines else await _ends_in_ms(edge, party, job)
                if left_ms == 0:
                    return
                wait_s = FALLBACK_S if left_ms is None else left_ms / 1000
                if lines:
                    wait_s = SETTLE_S
                until = loop.time() + wait_s
                while not news.is_set() and (left_s := until - loop.time()) > 0:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(news.wait(), min(left_s, STATES_S))
                    if not news.is_set() and (found := states.news(after)):
                        yield _as_ndjson(found)
                        beat = loop.time()
                await asyncio.sleep(COALESCE_S)
                # Cleared before reading: what comes while we read sets it again.
                news.clear()
            lines = await edge.call(views.logs, party, job, after, BATCH, wanted.run)
            if lines:
                yield _as_ndjson(lines)
                beat = loop.time()
            elif loop.time() - beat >= HEARTBEAT_S:
                yield b"\n"
                beat = loop.time()


async def _ends_in_ms(edge: Edge, party: str, job: str) -> int | None:
    """Return how long to wait for a job's last lines; None while it goes on."""
    view = await edge.call(edge.broker.views.job, party, job)
    if not is_terminal(JOB, view.state):
        return None
    ended_ms = view.ended_ms if view.ended_ms is not None else view.submitted_ms
    return max(0, ended_ms + LINGER_MS - edge.now_ms())


def _as_ndjson(lines: list[JobLogLine]) -> bytes:
    return "".join(line.model_dump_json() + "\n" for line in lines).encode()
