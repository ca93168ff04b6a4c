"""Bytes between this machine and the broker: signed HTTP requests, resumable.

Up they go in packs, down chunk by chunk. Synchronous; the agent calls it in threads. What was
uploaded before a disconnect isn't sent again: the broker is asked which chunks it misses. What is
read to be sent isn't hashed again: the broker does so, and says which chunk has changed since.
"""

import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import httpx
from pydantic import BaseModel, ValidationError

from sublet_agent.adapters.workspace.addressed import StoreClient
from sublet_agent.adapters.workspace.pack_pipe import PackBody, PackPipe
from sublet_agent.adapters.workspace.upload_meter import UploadMeter
from sublet_agent.core.fixes import with_fix
from sublet_contracts import moves
from sublet_contracts.addresses import (
    AddressRefused,
    Run,
    UploadAddress,
    read_runs,
    read_upload,
)
from sublet_contracts.api import (
    AddressRequest,
    CommitRequest,
    MissingRequest,
    MissingView,
    Problem,
)
from sublet_contracts.auth import sign_request
from sublet_contracts.digests import digest_of, shortened
from sublet_contracts.keys import SigningKey
from sublet_contracts.packs import (
    ChunkDiffers,
    PackRefused,
    PackTable,
    cut_read,
    in_packs,
    in_reads,
)
from sublet_contracts.problems import ProblemCode
from sublet_contracts.tree import (
    MAX_INDEX_BYTES,
    Chunk,
    OnChunk,
    ScannedTree,
    TreeIndex,
    TreeRefused,
    WhyLeftOut,
    parse_index,
)
from sublet_contracts.tree_writer import TreeWriter

PARALLEL = 4
AHEAD = 8
READ_ATTEMPTS = 3
"""of chunks that come other than they should"""
PACKS_AHEAD = PARALLEL
MAX_PROBLEM_BYTES = 64 * 1024
"""of a refusal, where less content was asked for"""
_ASK_AT_ONCE = 5_000


class TransferRefused(Exception):
    """The broker says no, for good. `code` is its problem code."""

    def __init__(self, message: str, code: str, status: int, digest: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.digest = digest
        """The content that it is about, if the broker says so."""


class StaleEpoch(TransferRefused):
    """The job has gone elsewhere: this epoch writes no more."""


class Cancelled(Exception):
    """The transfer is no longer wanted."""


class Transfer:
    """Signed requests of one party to one broker."""

    def __init__(
        self, base_url: str, key: SigningKey, broker: Callable[[], str], now_ms: Callable[[], int]
    ) -> None:
        self._key = key
        self._broker = broker
        self._now_ms = now_ms
        limits = httpx.Limits(max_connections=16, max_keepalive_connections=8)
        self._http = httpx.Client(base_url=base_url, timeout=30.0, limits=limits)
        self._base_url = base_url
        self._store = StoreClient()
        self._by_address = False
        """Whether this broker has its content in a store of its own; it said so last."""
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="chunk")

    def close(self) -> None:
        """Let go of connections and threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()
        self._store.close()

    def request(
        self,
        method: str,
        target: str,
        body: bytes | PackBody = b"",
        *,
        epoch: int | None = None,
        cancel: threading.Event | None = None,
        max_bytes: int = MAX_INDEX_BYTES,
        attempts: int = 0,
        body_digest: str = "",
    ) -> bytes:
        """Send until there is an answer; return its body. `attempts` 0: until cancelled.
        `body_digest`: what is signed instead of the hash of a body that comes in parts.

        Raises TransferRefused, StaleEpoch, Cancelled, httpx.HTTPError (attempts used up).
        """
        delay_s = 0.2
        attempt = 0
        while True:
            attempt += 1
            if cancel is not None and cancel.is_set():
                raise Cancelled(target)
            try:
                return self._once(method, target, body, epoch, max_bytes, body_digest)
            except httpx.HTTPError:
                if attempts and attempt >= attempts:
                    raise
            wait_s = random.uniform(delay_s / 2, delay_s)  # jitter, not a secret
            if cancel is not None:
                cancel.wait(wait_s)
            else:
                time.sleep(wait_s)
            delay_s = min(delay_s * 2, 10.0)

    def _once(
        self,
        method: str,
        target: str,
        body: bytes | PackBody,
        epoch: int | None,
        max_bytes: int,
        body_digest: str,
    ) -> bytes:
        headers = sign_request(
            self._key,
            broker=self._broker(),
            method=method,
            target=target,
            body=body if isinstance(body, bytes) else b"",
            time_ms=self._now_ms(),
            nonce=os.urandom(16).hex(),
            body_digest=body_digest,
        )
        if epoch is not None:
            headers["Sublet-Epoch"] = str(epoch)
        if isinstance(body, PackBody) or body:
            is_blob = method == "PUT"
            headers["Content-Type"] = "application/octet-stream" if is_blob else "application/json"
        content: bytes | Iterator[bytes]
        if isinstance(body, bytes):
            content = body
        else:
            # A piece may be a memoryview, which httpx's types don't know.
            content = cast(Iterator[bytes], body.pieces())
            headers["Content-Length"] = str(body.size_bytes)
        with self._http.stream(method, target, content=content, headers=headers) as answer:
            data = bytearray()
            for piece in answer.iter_bytes():
                data += piece
                if len(data) > max_bytes:
                    raise TransferRefused(f"{target}: the answer is too long", "too_long", 502)
        if answer.status_code >= 500 or answer.status_code in (408, 425, 429):
            raise httpx.HTTPStatusError(
                f"{answer.status_code} at {target}", request=answer.request, response=answer
            )
        if answer.is_success:
            return bytes(data)
        try:
            problem = Problem.model_validate_json(bytes(data))
            code, says = problem.code, with_fix(problem.code, problem.detail)
            about = str(problem.facts.get("digest", ""))
        except ValidationError:
            code, says, about = "", f"HTTP {answer.status_code}", ""
        kind = StaleEpoch if code == ProblemCode.STALE_EPOCH else TransferRefused
        raise kind(f"{target}: {says}", code, answer.status_code, about)

    # -- up ----------------------------------------------------------------------------------------

    def upload(
        self,
        job_id: str,
        epoch: int,
        read: Callable[[OnChunk], ScannedTree],
        cancel: threading.Event,
        meter: UploadMeter | None = None,
    ) -> tuple[str, TreeIndex]:
        """Move a tree to the broker while `read` reads it and tells of each chunk: those that it
        misses, then the index. Returns the index with its digest. Raises as `request` and `read`,
        and TreeRefused if a file has changed."""
        meter = meter or UploadMeter()

        def missing(some: Sequence[str]) -> list[str]:
            return self._missing(job_id, epoch, some, cancel)

        def put(body: PackBody) -> None:
            try:
                self._put_pack(job_id, epoch, body, cancel)
            except ChunkDiffers as error:
                raise _changed(body, error.digest) from error
            except TransferRefused as error:
                if error.code != ProblemCode.HASH_MISMATCH or error.digest not in body.sources:
                    raise
                raise _changed(body, error.digest) from error
            meter.sent(body.table.chunk_bytes)

        with PackPipe(self._pool, missing, put, meter) as pipe:

            def on_chunk(chunk: Chunk, path: Path, offset: int) -> None:
                if cancel.is_set():
                    raise Cancelled(f"reading {path.name}")
                pipe.take(chunk, path, offset)

            tree = read(on_chunk)
            meter.begins(sum(tree.index.chunks().values()))
            pipe.finish()
        return self._put_index(job_id, epoch, tree.index, cancel)

    def upload_outputs(
        self,
        job_id: str,
        epoch: int,
        tree: ScannedTree,
        cancel: threading.Event,
        left_s: Callable[[], float],
        meter: UploadMeter | None = None,
    ) -> tuple[str, TreeIndex]:
        """Move what can be moved of outputs, small files first, in the time that is left; the index
        lists the rest as left out. Returns that index with its digest; "": no file could be moved
        in time. Raises as `request`."""
        lost: dict[str, WhyLeftOut] = {}
        window: deque[tuple[PackTable, Future[dict[str, WhyLeftOut]]]] = deque()
        sizes = tree.index.chunks()
        meter = meter or UploadMeter()
        meter.begins(sum(sizes.values()))

        def put(table: PackTable) -> dict[str, WhyLeftOut]:
            return self._put_what_fits(job_id, epoch, tree, table, cancel, meter)

        def wait() -> None:
            table, future = window.popleft()
            seconds = left_s()
            try:
                lost.update(future.result(None if math.isinf(seconds) else max(0.0, seconds)))
            except TimeoutError:
                future.cancel()
                lost.update((digest, WhyLeftOut.NO_TIME) for digest, _ in table.chunks)

        smallest_first = sorted(tree.index.files, key=lambda file: file.size_bytes)
        wanted = list(dict.fromkeys(c.digest for file in smallest_first for c in file.chunks))
        try:
            for start in range(0, len(wanted), _ASK_AT_ONCE):
                part = wanted[start : start + _ASK_AT_ONCE]
                missing = self._missing(job_id, epoch, part, cancel)
                meter.found(sum(sizes[h] for h in part) - sum(sizes[h] for h in missing))
                for table in in_packs(missing, sizes):
                    if left_s() <= 0:
                        lost.update((digest, WhyLeftOut.NO_TIME) for digest, _ in table.chunks)
                    elif WhyLeftOut.NO_ROOM in lost.values():
                        lost.update((digest, WhyLeftOut.NO_ROOM) for digest, _ in table.chunks)
                    else:
                        window.append((table, self._pool.submit(put, table)))
                        if len(window) >= PACKS_AHEAD:
                            wait()
            while window:
                wait()
        finally:
            for _, future in window:
                future.cancel()
        index = tree.without(lost).index if lost else tree.index
        if lost and not index.files and math.isfinite(left_s()):
            return "", index
        return self._put_index(job_id, epoch, index, cancel)

    def _put_what_fits(
        self,
        job_id: str,
        epoch: int,
        tree: ScannedTree,
        table: PackTable,
        cancel: threading.Event,
        meter: UploadMeter,
    ) -> dict[str, WhyLeftOut]:
        """Send these chunks; return those that could not be, each with its reason."""
        lost: dict[str, WhyLeftOut] = {}
        todo = [table]
        while todo:
            now = todo.pop()
            try:
                self._put_pack(job_id, epoch, PackBody(now, tree.sources), cancel)
            except ChunkDiffers as error:
                rest = _without(now, error.digest)
                lost[error.digest] = WhyLeftOut.CHANGED
            except TransferRefused as error:
                if error.code == ProblemCode.HASH_MISMATCH and error.digest in dict(now.chunks):
                    rest = _without(now, error.digest)
                    lost[error.digest] = WhyLeftOut.CHANGED
                elif error.code == ProblemCode.TOO_MUCH_STORED:
                    rest = _halves(now)
                    if not rest:
                        lost[now.chunks[0][0]] = WhyLeftOut.NO_ROOM
                else:
                    raise
            else:
                meter.sent(now.chunk_bytes)
                continue
            todo += rest
        return lost

    def _put_pack(self, job_id: str, epoch: int, body: PackBody, cancel: threading.Event) -> None:
        """Raises as `request`, and ChunkDiffers: a chunk isn't there any more."""
        name = body.table.name
        if self._by_address:
            self._put_by_address(job_id, epoch, body.table, body.chunks(), cancel)
            return
        target = f"/v1/jobs/{job_id}/packs/{name}"
        self.request("PUT", target, body, epoch=epoch, cancel=cancel, body_digest=name)

    def _put_by_address(
        self,
        job_id: str,
        epoch: int,
        table: PackTable,
        chunks: Sequence[bytes],
        cancel: threading.Event,
    ) -> None:
        said = moves.announcement(table, chunks)
        target = f"/v1/jobs/{job_id}/packs/{table.name}/address"

        def post(target: str, body: BaseModel) -> bytes:
            data = body.model_dump_json().encode()
            return self.request("POST", target, data, epoch=epoch, cancel=cancel)

        def ask() -> UploadAddress:
            answer = post(target, AddressRequest(**said))
            broker, url = self._broker(), self._base_url
            return read_upload(answer, broker=broker, broker_url=url, name=table.name)

        def commit(pack: str) -> bool:
            try:
                post(f"/v1/jobs/{job_id}/packs/{table.name}/commit", CommitRequest(pack=pack))
            except TransferRefused as error:
                anew = error.code == ProblemCode.NOT_FOUND or (
                    error.code == ProblemCode.HASH_MISMATCH and moves.keeps_to(table, chunks)
                )
                if not anew:
                    raise
                return False
            return True

        try:
            moves.upload(
                ask,
                lambda to: self._store.put(to, chunks),
                commit,
                _pause(cancel, target),
                attempts=0,
            )
        except AddressRefused as error:
            raise TransferRefused(f"{target}: {error}", "address_refused", 502) from error

    def _put_index(
        self, job_id: str, epoch: int, index: TreeIndex, cancel: threading.Event
    ) -> tuple[str, TreeIndex]:
        data = index.to_bytes()
        if len(data) > MAX_INDEX_BYTES:
            raise TreeRefused(f"its index has {len(data)} bytes; at most {MAX_INDEX_BYTES} fit")
        digest = digest_of(data)
        self._put(job_id, epoch, digest, data, cancel)
        return digest, index

    def _missing(
        self, job_id: str, epoch: int, hashes: Sequence[str], cancel: threading.Event
    ) -> list[str]:
        body = MissingRequest(digests=tuple(hashes)).model_dump_json().encode()
        target = f"/v1/jobs/{job_id}/blobs/missing"
        answer = self.request("POST", target, body, epoch=epoch, cancel=cancel)
        mine = set(hashes)
        view = MissingView.model_validate_json(answer)
        self._by_address = view.by_address
        return [h for h in view.missing if h in mine]

    def _put(
        self, job_id: str, epoch: int, digest: str, data: bytes, cancel: threading.Event
    ) -> None:
        target = f"/v1/jobs/{job_id}/blobs/{digest}"
        self.request("PUT", target, data, epoch=epoch, cancel=cancel, body_digest=digest)

    # -- down --------------------------------------------------------------------------------------

    def index(
        self, job_id: str, epoch: int | None, digest: str, cancel: threading.Event
    ) -> TreeIndex:
        """Return a tree's index. Raises as `request`, and TreeRefused."""
        data = self._get(job_id, epoch, digest, MAX_INDEX_BYTES, cancel)
        return parse_index(data)

    def download(
        self, job_id: str, epoch: int | None, index: TreeIndex, root: Path, cancel: threading.Event
    ) -> None:
        """Write a tree below `root`, every chunk checked: a few groups of them at once, each to its
        place as it comes. Nothing is fsynced. Raises as `request`, TreeRefused, OSError."""
        writer = TreeWriter(index, root)

        def fetch(chunks: tuple[Chunk, ...]) -> None:
            for chunk, data in zip(
                chunks, self._get_many(job_id, epoch, chunks, cancel), strict=True
            ):
                writer.write(chunk, data)

        window: deque[Future[None]] = deque()
        try:
            for chunks in in_reads(writer.chunks):
                window.append(self._pool.submit(fetch, chunks))
                if len(window) >= AHEAD:
                    window.popleft().result()
            while window:
                window.popleft().result()
        finally:
            for future in window:
                future.cancel()

    def _get(
        self, job_id: str, epoch: int | None, digest: str, limit: int, cancel: threading.Event
    ) -> bytes:
        target = f"/v1/jobs/{job_id}/blobs/{digest}"
        data = self.request("GET", target, epoch=epoch, cancel=cancel, max_bytes=limit)
        if digest_of(data) != digest:
            raise TreeRefused(f"{shortened(digest)} came from the broker with other content")
        return data

    def _get_many(
        self, job_id: str, epoch: int | None, chunks: tuple[Chunk, ...], cancel: threading.Event
    ) -> list[bytes]:
        if self._by_address:
            return self._get_by_address(job_id, epoch, chunks, cancel)
        names = ",".join(chunk.digest for chunk in chunks)
        size_bytes = sum(chunk.size_bytes for chunk in chunks)
        target = f"/v1/jobs/{job_id}/chunks/{names}"
        limit = max(size_bytes, MAX_PROBLEM_BYTES)
        for left in reversed(range(READ_ATTEMPTS)):
            try:
                data = self.request("GET", target, epoch=epoch, cancel=cancel, max_bytes=limit)
                return cut_read(data, chunks)
            except TransferRefused as error:
                if error.code != ProblemCode.BY_ADDRESS:
                    raise
                self._by_address = True
                return self._get_by_address(job_id, epoch, chunks, cancel)
            except PackRefused as error:
                # The broker hashes what it reads: so it was damaged on its way.
                if not left:
                    raise TreeRefused(f"the broker gave other content: {error}") from error
        raise AssertionError("unreachable")

    def _get_by_address(
        self, job_id: str, epoch: int | None, chunks: tuple[Chunk, ...], cancel: threading.Event
    ) -> list[bytes]:
        target = f"/v1/jobs/{job_id}/addresses/{','.join(chunk.digest for chunk in chunks)}"
        sizes = [chunk.size_bytes for chunk in chunks]

        def ask() -> list[Run]:
            answer = self.request("GET", target, epoch=epoch, cancel=cancel)
            return read_runs(answer, broker=self._broker(), broker_url=self._base_url, sizes=sizes)

        try:
            data = moves.read(ask, self._store.get, _pause(cancel, target))
            return cut_read(data, chunks)
        except TransferRefused as error:
            if error.code != ProblemCode.TOO_LARGE or len(chunks) == 1:
                raise
            half = len(chunks) // 2
            return [
                data
                for part in (chunks[:half], chunks[half:])
                for data in self._get_by_address(job_id, epoch, part, cancel)
            ]
        except (moves.NotMoved, AddressRefused, PackRefused):
            # The broker reads it itself, and finds out whether it is damaged.
            limits = [max(size, MAX_PROBLEM_BYTES) for size in sizes]
            return [
                self._get(job_id, epoch, chunk.digest, limit, cancel)
                for chunk, limit in zip(chunks, limits, strict=True)
            ]


def _pause(cancel: threading.Event, target: str) -> Callable[[float], None]:
    def pause(seconds: float) -> None:
        if cancel.wait(seconds):
            raise Cancelled(target)

    return pause


def _changed(body: PackBody, digest: str) -> TreeRefused:
    path, _, _ = body.sources[digest]
    return TreeRefused(f"{path} changed while it was being uploaded")


def _without(table: PackTable, digest: str) -> list[PackTable]:
    rest = tuple(chunk for chunk in table.chunks if chunk[0] != digest)
    return [PackTable(rest)] if rest else []


def _halves(table: PackTable) -> list[PackTable]:
    """Return the two halves of a pack, the first one last; of a single chunk nothing."""
    half = len(table.chunks) // 2
    return [PackTable(table.chunks[half:]), PackTable(table.chunks[:half])] if half else []
