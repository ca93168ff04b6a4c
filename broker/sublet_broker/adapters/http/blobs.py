"""Content in and out: chunks named by their digest, and packs of them.

The name of an upload is the hash of its body, or of the table that a pack begins with, so the
signature is checked before the first byte of the body is read: a stranger can't make the broker
hold megabytes. A pack's chunks are hashed as they come, and the first that differs ends it.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Request
from starlette.responses import Response

from sublet_broker.adapters.http.edge import Edge
from sublet_broker.adapters.http.jobs import JobRef
from sublet_broker.adapters.http.openapi import READ, SIGNED, WRITE, problems, takes, takes_bytes
from sublet_broker.adapters.http.pack_room import PackRoom
from sublet_broker.adapters.http.signed_calls import (
    BODY_TIMEOUT_S,
    Call,
    Listing,
    Reading,
    body_parts,
    check,
    declared_bytes,
    read_body,
)
from sublet_broker.service.errors import Refusal
from sublet_contracts.api import AddressRequest, CommitRequest, MissingRequest, MissingView
from sublet_contracts.digests import PATTERN
from sublet_contracts.envelope import Envelope
from sublet_contracts.packs import (
    MAX_BODY_BYTES,
    MAX_READ_CHUNKS,
    ChunkDiffers,
    Pack,
    PackReader,
    PackRefused,
)
from sublet_contracts.problems import ProblemCode

router = APIRouter(prefix="/v1", tags=["content"])

UPLOADS_AT_ONCE = 24
COMMITS_AT_ONCE = 4
"""Each waits until a pack was read."""
SLOWEST_BYTES_A_S = 128 * 1024
"""A pack may take as long as at this speed, and BODY_TIMEOUT_S more."""
HASHED_AT_ONCE_BYTES = 4 << 20
"""A thread for each MiB of them costs a quarter of all processor time of an upload."""

ContentName = Annotated[
    str, Path(pattern=f"^{PATTERN}$", description="digest of the content: blake3:...")
]
Hashes = Annotated[
    str,
    Path(
        pattern=f"^{PATTERN}(,{PATTERN}){{0,{MAX_READ_CHUNKS - 1}}}$",
        description=f"digests of up to {MAX_READ_CHUNKS} chunks, with commas",
    ),
]
PackName = Annotated[
    str,
    Path(pattern=f"^{PATTERN}$", description="digest of the table that the pack begins with"),
]
PACK_SAYS = (
    "a table of at most 4,096 chunks (`sublet-pack-1 blake3`, their number, each one's digest "
    "and size), then the chunks, at most 64 MiB"
)
Epoch = Annotated[
    int | None,
    Header(alias="Sublet-Epoch", ge=0, le=2**53 - 1, description="the lease's, for its holder"),
]
_uploads = asyncio.Semaphore(UPLOADS_AT_ONCE)
_room = PackRoom()
_commits = asyncio.Semaphore(COMMITS_AT_ONCE)


async def announced(request: Request, digest: ContentName) -> Call:
    """Authenticate an upload by the hash that its address names."""
    return check(request, b"", digest)


Upload = Annotated[Call, Depends(announced)]


async def announced_pack(request: Request, pack: PackName) -> Call:
    """Authenticate a pack by the hash of its table, which its address names."""
    return check(request, b"", pack)


PackUpload = Annotated[Call, Depends(announced_pack)]


async def _keep_pack(
    request: Request, call: Call, scope: str, epoch: int | None, name: str
) -> Response:
    edge, blobs = call.edge, call.edge.broker.blobs
    size_bytes = declared_bytes(request, MAX_BODY_BYTES)
    if not size_bytes:
        raise Refusal(ProblemCode.MALFORMED, "a pack says how long it is", field="Content-Length")

    limit_s = BODY_TIMEOUT_S + size_bytes / SLOWEST_BYTES_A_S
    body = body_parts(request, size_bytes, limit_s)

    def admit() -> None:
        call.admit()
        blobs.may_put(call.party, scope, epoch)

    try:
        await edge.call(admit)
        async with _room.hold(call.party, size_bytes):
            pack = await _received(edge, PackReader(name), body)
            await edge.call(blobs.put_pack, call.party, scope, epoch, pack)
    except Refusal:
        # An answer is only read by who has sent all of his request: what comes is thrown away.
        async for _ in body:
            pass
        raise
    return Response(status_code=204)


async def _received(edge: Edge, reader: PackReader, body: AsyncIterator[bytes]) -> Pack:
    come: list[bytes] = []
    waiting_bytes = 0

    def take(parts: list[bytes]) -> None:
        for part in parts:
            reader.feed(part)

    try:
        async for part in body:
            come.append(part)
            waiting_bytes += len(part)
            if waiting_bytes >= HASHED_AT_ONCE_BYTES:
                await edge.must_call(take, come)
                come, waiting_bytes = [], 0
        await edge.must_call(take, come)
        return reader.close()
    except ChunkDiffers as error:
        raise Refusal(
            ProblemCode.HASH_MISMATCH, str(error), field="body", digest=error.digest
        ) from error
    except PackRefused as error:
        raise Refusal(ProblemCode.MALFORMED, str(error), field="body") from error


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
    "/blobs/{digest}",
    status_code=204,
    summary="Upload a chunk of an input",
    response_class=Response,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes_bytes("a chunk of at most 1 MiB, or an index of at most 16 MiB"),
)
async def put_own(request: Request, call: Upload, digest: ContentName) -> Response:
    """It is yours alone until a job of yours names it. Sending it again changes nothing."""
    return await _keep(request, call, call.party, None, digest)


@router.post(
    "/blobs/missing",
    summary="Which chunks must I upload?",
    response_model=MissingView,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes(MissingRequest, "the chunks you have"),
)
async def missing_own(call: Listing) -> Response:
    """Only your own uploads count: the answer tells nothing about anyone else's."""
    hashes = call.parse(MissingRequest).digests
    blobs = call.edge.broker.blobs
    return await call.answer(lambda: blobs.missing(call.party, call.party, None, hashes))


@router.put(
    "/packs/{pack}",
    status_code=204,
    summary="Upload many chunks of an input",
    response_class=Response,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes_bytes(PACK_SAYS),
)
async def put_own_pack(request: Request, call: PackUpload, pack: PackName) -> Response:
    """They are yours alone until a job of yours names them. All are kept, or none."""
    return await _keep_pack(request, call, call.party, None, pack)


@router.put(
    "/jobs/{job}/packs/{pack}",
    status_code=204,
    summary="Upload many chunks of a checkpoint",
    response_class=Response,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes_bytes(PACK_SAYS),
)
async def put_job_pack(
    request: Request, call: PackUpload, job: JobRef, pack: PackName, epoch: Epoch = None
) -> Response:
    """For the holder of the job's current epoch. The answer doesn't tell whether others have sent
    the same chunks."""
    return await _keep_pack(request, call, job, epoch, pack)


@router.put(
    "/jobs/{job}/blobs/{digest}",
    status_code=204,
    summary="Upload a chunk of a checkpoint",
    response_class=Response,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes_bytes("a chunk of at most 1 MiB, or an index of at most 16 MiB"),
)
async def put_job(
    request: Request, call: Upload, job: JobRef, digest: ContentName, epoch: Epoch = None
) -> Response:
    """For the holder of the job's current epoch; an older one is refused (409 `stale_epoch`)."""
    return await _keep(request, call, job, epoch, digest)


@router.get(
    "/jobs/{job}/blobs/{digest}",
    summary="Download a chunk",
    response_class=Response,
    responses={
        200: {"description": "the chunk", "content": {"application/octet-stream": {}}},
        **READ,
        **problems(403, 410),
    },
    openapi_extra=SIGNED,
)
async def get_job(call: Reading, job: JobRef, digest: ContentName, epoch: Epoch = None) -> Response:
    """For the renter, the holder of the current epoch, and a successor that prepares."""

    def read() -> bytes:
        call.admit()
        return call.edge.broker.blobs.get(call.party, job, epoch, digest)

    data = await call.edge.call(read)
    return Response(data, media_type="application/octet-stream")


@router.get(
    "/jobs/{job}/chunks/{hashes}",
    summary="Download many chunks",
    response_class=Response,
    responses={
        200: {
            "description": "the chunks, one after another",
            "content": {"application/octet-stream": {}},
        },
        **READ,
        **problems(403, 409, 410, 413),
    },
    openapi_extra=SIGNED,
)
async def get_many(call: Reading, job: JobRef, hashes: Hashes, epoch: Epoch = None) -> Response:
    """As one by one, in this order; together at most 16 MiB. How long each is the index says.
    409 `by_address`: ask for their addresses."""

    def read() -> list[bytes]:
        call.admit()
        call.edge.broker.uploads.refuse_bytes()
        return call.edge.broker.blobs.get_many(call.party, job, epoch, hashes.split(","))

    data = b"".join(await call.edge.call(read))
    return Response(data, media_type="application/octet-stream")


@router.get(
    "/jobs/{job}/addresses/{hashes}",
    summary="Where to read many chunks",
    response_model=Envelope,
    responses={**READ, **problems(403, 410)},
    openapi_extra=SIGNED,
)
async def addresses(call: Reading, job: JobRef, hashes: Hashes, epoch: Epoch = None) -> Response:
    """Of a broker whose content lies in a store of its own; signed by it. 404 of any other."""
    uploads = call.edge.broker.uploads

    def read() -> bytes:
        call.admit()
        return uploads.read_addresses(call.party, job, epoch, hashes.split(","))

    return Response(await call.edge.call(read), media_type="application/json")


async def _address(call: Call, scope: str, epoch: int | None, name: str) -> Response:
    asked = call.parse(AddressRequest)
    uploads = call.edge.broker.uploads

    def answer() -> bytes:
        call.admit()
        return uploads.address(call.party, scope, epoch, name, asked.table, asked.body_sha256)

    return Response(await call.edge.call(answer), media_type="application/json")


async def _commit(call: Call, scope: str, epoch: int | None, name: str) -> Response:
    pack = call.parse(CommitRequest).pack
    uploads = call.edge.broker.uploads

    def act() -> None:
        call.admit()
        uploads.commit(call.party, scope, epoch, name, pack)

    async with _commits:
        await call.edge.call(act)
    return Response(status_code=204)


@router.post(
    "/packs/{pack}/address",
    summary="Where to put many chunks of an input",
    response_model=Envelope,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes(AddressRequest, "the pack's table, and the hash of what follows it"),
)
async def address_own(call: Listing, pack: PackName) -> Response:
    """An address that takes exactly this content, once, for some minutes; signed by the broker.
    Asked for again, it is another address for the same upload. 404: send it to this broker."""
    return await _address(call, call.party, None, pack)


@router.post(
    "/packs/{pack}/commit",
    status_code=204,
    summary="Many chunks of an input have been put",
    response_class=Response,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes(CommitRequest, "the pack's id, from its address"),
)
async def commit_own(call: Listing, pack: PackName) -> Response:
    """What lies there is read and hashed, and counts from now on: all of it, or nothing."""
    return await _commit(call, call.party, None, pack)


@router.post(
    "/jobs/{job}/packs/{pack}/address",
    summary="Where to put many chunks of a checkpoint",
    response_model=Envelope,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes(AddressRequest, "the pack's table, and the hash of what follows it"),
)
async def address_job(call: Listing, job: JobRef, pack: PackName, epoch: Epoch = None) -> Response:
    """For the holder of the job's current epoch; otherwise as for an input."""
    return await _address(call, job, epoch, pack)


@router.post(
    "/jobs/{job}/packs/{pack}/commit",
    status_code=204,
    summary="Many chunks of a checkpoint have been put",
    response_class=Response,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes(CommitRequest, "the pack's id, from its address"),
)
async def commit_job(call: Listing, job: JobRef, pack: PackName, epoch: Epoch = None) -> Response:
    """For the holder of the job's current epoch; an older one is refused (409 `stale_epoch`)."""
    return await _commit(call, job, epoch, pack)


@router.post(
    "/jobs/{job}/blobs/missing",
    summary="Which chunks of a checkpoint must I upload?",
    response_model=MissingView,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes(MissingRequest, "the checkpoint's chunks"),
)
async def missing_job(call: Listing, job: JobRef, epoch: Epoch = None) -> Response:
    """Chunks that the job has already (an unchanged base model, say) move once."""
    hashes = call.parse(MissingRequest).digests
    blobs = call.edge.broker.blobs
    return await call.answer(lambda: blobs.missing(call.party, job, epoch, hashes))
