"""Content moved by address: the hosts that the broker has named in a signed answer, and no others
(sublet_contracts/addresses.py).
"""

import time
from collections.abc import Sequence

import httpx
from pydantic import BaseModel

from sublet.errors import SubletError
from sublet.http import Link
from sublet_contracts import moves
from sublet_contracts.addresses import (
    AddressRefused,
    Run,
    UploadAddress,
    read_runs,
    read_upload,
)
from sublet_contracts.api import AddressRequest, CommitRequest
from sublet_contracts.packs import PackTable
from sublet_contracts.problems import ProblemCode
from sublet_contracts.tree import Chunk

_TIMEOUT = httpx.Timeout(30.0, connect=10.0)


class StoreRefused(OSError):
    """The broker's store didn't take or give content, or the broker named one that is not used."""


def send_pack(link: Link, table: PackTable, chunks: Sequence[bytes]) -> None:
    """Put a pack where the broker says, and commit it. Raises SubletError, StoreRefused."""
    request = AddressRequest(**moves.announcement(table, chunks))

    def ask() -> UploadAddress:
        answer = _post(link, f"/v1/packs/{table.name}/address", request)
        return read_upload(answer.content, broker=link.broker, broker_url=link.url, name=table.name)

    def put(address: UploadAddress) -> int:
        try:
            return httpx.put(
                address.url, headers=address.headers, content=b"".join(chunks), timeout=_TIMEOUT
            ).status_code
        except httpx.HTTPError:
            return 0

    def commit(pack: str) -> bool:
        try:
            _post(link, f"/v1/packs/{table.name}/commit", CommitRequest(pack=pack))
        except SubletError as error:
            code = error.problem.code
            anew = code == ProblemCode.NOT_FOUND or (
                code == ProblemCode.HASH_MISMATCH and moves.keeps_to(table, chunks)
            )
            if not anew:
                raise
            return False
        return True

    try:
        moves.upload(ask, put, commit, time.sleep)
    except (moves.NotMoved, AddressRefused) as error:
        raise StoreRefused(str(error)) from error


def read_chunks(link: Link, job: str, chunks: Sequence[Chunk]) -> bytes:
    """Return chunks, one after another, for the caller to check. Raises SubletError,
    StoreRefused."""
    names = ",".join(chunk.digest for chunk in chunks)
    sizes = [chunk.size_bytes for chunk in chunks]

    def ask() -> list[Run]:
        answer = link.send("GET", f"/v1/jobs/{job}/addresses/{names}")
        return read_runs(answer.content, broker=link.broker, broker_url=link.url, sizes=sizes)

    try:
        return moves.read(ask, _get, time.sleep)
    except (moves.NotMoved, AddressRefused) as error:
        raise StoreRefused(str(error)) from error


def _post(link: Link, path: str, body: BaseModel) -> httpx.Response:
    return link.send("POST", path, data=body.model_dump_json().encode())


def _get(run: Run) -> bytes | None:
    try:
        headers = {"range": run.range_header, "accept-encoding": "identity"}
        with httpx.stream("GET", run.url, headers=headers, timeout=_TIMEOUT) as answer:
            return moves.exactly(answer.status_code, answer.iter_raw(), run.size_bytes)
    except httpx.HTTPError:
        return None
