"""Calls about jobs. What changes the market wakes the scheduler: a match waits for no tick."""

from collections.abc import Callable
from typing import Annotated, get_args

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from sublet_broker.adapters.http.openapi import READ, SIGNED, WRITE, problems, takes
from sublet_broker.adapters.http.signed_calls import Call, Reading, Sending
from sublet_contracts.api import (
    CheckpointsPage,
    EventsPage,
    JobsPage,
    JobView,
    ReceiptsPage,
    ResumeRequest,
    SignedRequest,
    StatementView,
)
from sublet_contracts.documents import CheckpointKind
from sublet_contracts.states import JobState

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

JobRef = Annotated[
    str, Path(min_length=1, max_length=128, description="id, its first 8 digits or more, or name")
]
After = Annotated[int, Query(ge=0, le=2**53 - 1, description="only what comes after this one")]


@router.post(
    "",
    status_code=201,
    summary="Submit a job",
    response_model=JobView,
    responses={**WRITE, **problems(402, 403)},
    openapi_extra=takes(SignedRequest, "a `job` document, signed by its renter"),
)
async def submit(
    call: Sending,
    wait: Annotated[
        bool, Query(description="queue it where no machine is free for it now; else refuse it then")
    ] = True,
) -> Response:
    """Holds the budget and queues the job. Its inputs must have been uploaded (`content`)."""
    envelope = call.parse(SignedRequest).envelope
    answer = await call.answer(
        lambda: call.edge.broker.jobs.submit(call.party, envelope, wait_for_offer=wait),
        status=201,
    )
    call.edge.loops.wake("scheduling")
    return answer


@router.get("", summary="Your jobs", response_model=JobsPage, responses=READ, openapi_extra=SIGNED)
async def jobs(
    call: Reading,
    state: Annotated[
        str,
        Query(
            max_length=40,
            description="only these",
            json_schema_extra={"enum": ["", *JobState]},
        ),
    ] = "",
    name: Annotated[str, Query(max_length=128, description="only of this name")] = "",
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> Response:
    """Newest first."""
    return await call.answer(
        lambda: call.edge.broker.views.jobs(call.party, state=state, name=name, limit=limit)
    )


@router.get("/{job}", summary="A job", response_model=JobView, responses=READ, openapi_extra=SIGNED)
async def job_view(call: Reading, job: JobRef) -> Response:
    """Its state in words, progress, cost so far, and each run it has had."""
    return await call.answer(lambda: call.edge.broker.views.job(call.party, job))


@router.post(
    "/{job}/cancel",
    summary="Cancel a job",
    response_model=JobView,
    responses=WRITE,
    openapi_extra=SIGNED,
)
async def cancel(call: Sending, job: JobRef) -> Response:
    """It is asked to stop; what it used is settled and the rest of its budget released."""
    return await _order(call, lambda: call.edge.broker.jobs.cancel(call.party, job))


@router.post(
    "/{job}/pause",
    summary="Pause a job",
    response_model=JobView,
    responses=WRITE,
    openapi_extra=SIGNED,
)
async def pause(call: Sending, job: JobRef) -> Response:
    """It checkpoints, stops, and keeps what is left of its budget until it is resumed."""
    return await _order(call, lambda: call.edge.broker.jobs.pause(call.party, job))


@router.post(
    "/{job}/resume",
    summary="Resume a paused job",
    response_model=JobView,
    responses={**WRITE, **problems(402)},
    openapi_extra=takes(ResumeRequest, "an `amendment` document raises the budget", required=False),
)
async def resume(call: Sending, job: JobRef) -> Response:
    """It goes on from its newest durable checkpoint, on whichever machine fits."""
    amendment = call.parse(ResumeRequest).amendment if call.body else None
    return await _order(call, lambda: call.edge.broker.jobs.resume(call.party, job, amendment))


async def _order(call: Call, act: Callable[[], JobView]) -> Response:
    answer = await call.answer(act)
    call.edge.wake_market()
    return answer


@router.get(
    "/{job}/events",
    summary="What happened",
    response_model=EventsPage,
    responses=READ,
    openapi_extra=SIGNED,
)
async def events(call: Reading, job: JobRef, after: After = 0) -> Response:
    """The append-only history, oldest first; `next_after` continues it."""
    return await call.answer(lambda: call.edge.broker.views.events(call.party, job, after))


@router.get(
    "/{job}/checkpoints",
    summary="Checkpoints",
    response_model=CheckpointsPage,
    responses=READ,
    openapi_extra=SIGNED,
)
async def checkpoints(
    call: Reading,
    job: JobRef,
    kind: Annotated[
        str,
        Query(
            max_length=40,
            description="only these",
            json_schema_extra={"enum": ["", *get_args(CheckpointKind)]},
        ),
    ] = "",
    before_ms: Annotated[
        int | None,
        Query(ge=0, le=2**53 - 1, description="only what came before: a page's `next_before_ms`"),
    ] = None,
    limit: Annotated[
        int, Query(ge=1, le=1000, description="and what came at the same moment as the last")
    ] = 100,
) -> Response:
    """Newest first, refused ones with the reason; and where the job would go on from."""
    return await call.answer(
        lambda: call.edge.broker.views.checkpoints(
            call.party, job, kind=kind or None, before_ms=before_ms, limit=limit
        )
    )


@router.get(
    "/{job}/statement",
    tags=["money"],
    summary="Every charge, with its receipt",
    response_model=StatementView,
    responses=READ,
    openapi_extra=SIGNED,
)
async def statement(call: Reading, job: JobRef) -> Response:
    """What was charged for which lease on which receipt, and what was held and released."""
    return await call.answer(lambda: call.edge.broker.money.statement(call.party, job))


@router.get(
    "/{job}/export",
    tags=["money"],
    summary="Everything needed to verify the bill offline",
    responses=READ,
    openapi_extra=SIGNED,
)
async def export(call: Reading, job: JobRef) -> Response:
    """All documents of the job with their log proofs (`sublet_contracts/export.py`)."""
    return await call.answer(lambda: call.edge.broker.views.export(call.party, job))


@router.get(
    "/{job}/receipts",
    tags=["money"],
    summary="Receipts",
    response_model=ReceiptsPage,
    responses=READ,
    openapi_extra=SIGNED,
)
async def receipts(
    call: Reading,
    job: JobRef,
    unsigned: Annotated[bool, Query(description="only those that you haven't signed")] = False,
) -> Response:
    """Oldest first, with the leases they belong to."""
    return await call.answer(
        lambda: call.edge.broker.views.receipts(call.party, job, unsigned=unsigned)
    )
