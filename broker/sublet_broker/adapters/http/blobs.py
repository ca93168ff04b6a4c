"""Content in and out: chunks named by their SHA-256.

The name of an upload is the hash of its body, so the signature is checked before the first byte of
the body is read: a stranger can't make the broker hold megabytes.
"""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Request
from starlette.responses import Response

from sublet_broker.adapters.http.jobs import JobRef
from sublet_broker.adapters.http.openapi import READ, SIGNED, WRITE, problems, takes, takes_bytes
from sublet_broker.adapters.http.signed_calls import Call, Listing, Reading, check, read_body
from sublet_contracts.api import MissingRequest, MissingView

router = APIRouter(prefix="/v1", tags=["content"])

UPLOADS_AT_ONCE = 24

Sha = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="SHA-256 of the content")]
Epoch = Annotated[
    int | None,
    Header(alias="Sublet-Epoch", ge=0, le=2**53 - 1, description="the lease's, for its holder"),
]
_uploads = asyncio.Semaphore(UPLOADS_AT_ONCE)


async def announced(request: Request, sha256: Sha) -> Call:
    """Authenticate an upload by the hash that its address names."""
    return check(request, b"", sha256)


Upload = Annotated[Call, Depends(announced)]


async def _keep(request: Request, call: Call, scope: str, epoch: int | None, sha: str) -> Response:
    blobs = call.edge.broker.blobs
    limit = call.edge.broker.context.settings.max_blob_bytes
    async with _uploads:
        data = await read_body(request, limit)

        def keep() -> None:
            call.admit()
            blobs.put(call.party, scope, epoch, sha, data)

        await call.edge.call(keep)
    return Response(status_code=204)


@router.put(
    "/blobs/{sha256}",
    status_code=204,
    summary="Upload a chunk of an input",
    response_class=Response,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes_bytes("a chunk of at most 4 MiB, or an index of at most 16 MiB"),
)
async def put_own(request: Request, call: Upload, sha256: Sha) -> Response:
    """It is yours alone until a job of yours names it. Sending it again changes nothing."""
    return await _keep(request, call, call.party, None, sha256)


@router.post(
    "/blobs/missing",
    summary="Which chunks must I upload?",
    response_model=MissingView,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes(MissingRequest, "the chunks you have"),
)
async def missing_own(call: Listing) -> Response:
    """Only your own uploads count: the answer tells nothing about anyone else's."""
    hashes = call.parse(MissingRequest).sha256
    blobs = call.edge.broker.blobs
    return await call.answer(lambda: blobs.missing(call.party, call.party, None, hashes))


@router.put(
    "/jobs/{job}/blobs/{sha256}",
    status_code=204,
    summary="Upload a chunk of a checkpoint",
    response_class=Response,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes_bytes("a chunk of at most 4 MiB, or an index of at most 16 MiB"),
)
async def put_job(
    request: Request, call: Upload, job: JobRef, sha256: Sha, epoch: Epoch = None
) -> Response:
    """For the holder of the job's current epoch; an older one is refused (409 `stale_epoch`)."""
    return await _keep(request, call, job, epoch, sha256)


@router.get(
    "/jobs/{job}/blobs/{sha256}",
    summary="Download a chunk",
    response_class=Response,
    responses={
        200: {"description": "the chunk", "content": {"application/octet-stream": {}}},
        **READ,
        **problems(403, 410),
    },
    openapi_extra=SIGNED,
)
async def get_job(call: Reading, job: JobRef, sha256: Sha, epoch: Epoch = None) -> Response:
    """For the renter, the holder of the current epoch, and a successor that prepares."""

    def read() -> bytes:
        call.admit()
        return call.edge.broker.blobs.get(call.party, job, epoch, sha256)

    data = await call.edge.call(read)
    return Response(data, media_type="application/octet-stream")


@router.post(
    "/jobs/{job}/blobs/missing",
    summary="Which chunks of a checkpoint must I upload?",
    response_model=MissingView,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes(MissingRequest, "the checkpoint's chunks"),
)
async def missing_job(call: Listing, job: JobRef, epoch: Epoch = None) -> Response:
    """Chunks that the job has already (an unchanged base model, say) move once."""
    hashes = call.parse(MissingRequest).sha256
    blobs = call.edge.broker.blobs
    return await call.answer(lambda: blobs.missing(call.party, job, epoch, hashes))
