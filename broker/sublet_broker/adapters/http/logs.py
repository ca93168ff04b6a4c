"""A job's log as a stream of NDJSON that can be followed.

Each line is a JobLogLine; an empty line now and then is a heartbeat, by which a dead connection is
noticed. The database is read when the job has news, and at the slowest every FALLBACK_S.
A reader that is slow slows only its own stream: nothing is buffered beyond one batch.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response, StreamingResponse

from sublet_broker.adapters.http.edge import Edge
from sublet_broker.adapters.http.jobs import After, JobRef
from sublet_broker.adapters.http.openapi import READ, SIGNED, problems
from sublet_broker.adapters.http.signed_calls import Reading
from sublet_contracts.api import JobLogLine, JobView
from sublet_contracts.states import JOB, is_terminal

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

BATCH = 500
HEARTBEAT_S = 10.0
FALLBACK_S = 5.0
COALESCE_S = 0.05
SETTLE_S = 0.5
"""After lines came, more may be under way; then the job's end is looked for."""
LINGER_MS = 1_000
"""A job's last lines may arrive just after its end: the stream waits so long for them."""
NDJSON = "application/x-ndjson"


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
) -> Response:
    """From `after` (the last cursor you have) on; no line is repeated or skipped."""
    views = call.edge.broker.views

    def begin() -> tuple[JobView, list[JobLogLine]]:
        call.admit()
        view = views.job(call.party, job)
        return view, views.logs(call.party, view.id, after, BATCH)

    view, lines = await call.edge.call(begin)
    stream = _stream(call.edge, call.party, view.id, lines, after, follow)
    # The first piece is made here: what is refused is refused before the answer has begun.
    first = await anext(stream)

    async def whole() -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(stream):
            yield first
            async for piece in stream:
                yield piece

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(whole(), media_type=NDJSON, headers=headers)


async def _stream(
    edge: Edge, party: str, job: str, lines: list[JobLogLine], after: int, follow: bool
) -> AsyncGenerator[bytes, None]:
    views = edge.broker.views
    with contextlib.ExitStack() as stack:
        news = stack.enter_context(edge.feeds.following(party, job)) if follow else None
        loop = asyncio.get_running_loop()
        yield _as_ndjson(lines) or b"\n"
        beat = loop.time()
        while True:
            if lines:
                after = lines[-1].cursor
            if len(lines) < BATCH:
                if news is None or edge.stopping.is_set():
                    return
                left_ms = None if lines else await _ends_in_ms(edge, party, job)
                if left_ms == 0:
                    return
                wait_s = FALLBACK_S if left_ms is None else left_ms / 1000
                if lines:
                    wait_s = SETTLE_S
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), wait_s)
                await asyncio.sleep(COALESCE_S)
                # Cleared before reading: what comes while we read sets it again.
                news.clear()
            lines = await edge.call(views.logs, party, job, after, BATCH)
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
