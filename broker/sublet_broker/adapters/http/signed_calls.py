"""Signed calls: bound, verify, parse, act, in that order.

The body is read up to the call's own limit, the signature is checked over its bytes, and only then
is it parsed. Nonce and idempotency key are the use-cases' business (service/idempotency.py).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from sublet_broker.adapters.http.edge import Edge
from sublet_broker.adapters.http.problems import BodyTooLarge
from sublet_broker.service.errors import Refusal
from sublet_contracts.auth import Caller, RequestRefused, authenticate, body_digest_of
from sublet_contracts.documents import refused_by_validation
from sublet_contracts.encoding import EncodingError, parse_json
from sublet_contracts.problems import ProblemCode

M = TypeVar("M", bound=BaseModel)

ENVELOPE_BODY_BYTES = 96 * 1024
"""A document of 64 KiB in base64, with its signatures."""
LIST_BODY_BYTES = 1024 * 1024
BODY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Call:
    """A request that is known to come from `caller`."""

    edge: Edge
    caller: Caller
    method: str
    target: str
    body: bytes
    body_digest: str
    key: str

    @property
    def party(self) -> str:
        """Who calls."""
        return self.caller.party

    def parse(self, model: type[M]) -> M:
        """Return the body as `model`. Raises Refusal that names the field."""
        try:
            parse_json(self.body, max_bytes=max(1, len(self.body)))
            return model.model_validate_json(self.body)
        except EncodingError as error:
            raise Refusal(ProblemCode.MALFORMED, f"the body is {error}", field="body") from error
        except ValidationError as error:
            refused = refused_by_validation(error)
            raise Refusal(
                ProblemCode.INVALID, str(refused), field=refused.field or "body"
            ) from error

    async def answer(self, act: Callable[[], BaseModel | None], status: int = 200) -> Response:
        """Run `act` once in a thread and return its view; a repetition gets the first answer."""

        def once() -> tuple[int, str]:
            access = self.edge.broker.idempotency
            said = access.begin(self.caller, self.method, self.target, self.body_digest, self.key)
            if said is not None:
                return said.status, said.body
            view = act()
            code, body = (204, "") if view is None else (status, view.model_dump_json())
            if self.key:
                access.finish(
                    self.caller, self.method, self.target, self.body_digest, self.key, code, body
                )
            return code, body

        code, body = await self.edge.call(once)
        if not body:
            return Response(status_code=code)
        return Response(body, code, media_type="application/json")

    def admit(self) -> None:
        """For calls that answer with something else than a view: refuse a replay. In a thread."""
        self.edge.broker.idempotency.begin(
            self.caller, self.method, self.target, self.body_digest, self.key
        )


def edge_of(request: Request) -> Edge:
    """Return the edge that this app serves."""
    edge: Edge = request.app.state.edge
    return edge


EdgeOf = Annotated[Edge, Depends(edge_of)]


def target_of(request: Request) -> str:
    """Return path and query exactly as they were sent: that is what has been signed."""
    path: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    query: bytes = request.scope["query_string"]
    return (path + b"?" + query if query else path).decode("latin-1")


def signed(max_bytes: int) -> Callable[[Request], Awaitable[Call]]:
    """Return a dependency that authenticates a request with a body of at most `max_bytes`."""

    async def authentic(request: Request) -> Call:
        refuse_unsigned(request)
        body = await read_body(request, max_bytes)
        return check(request, body, body_digest_of(body))

    return authentic


def refuse_unsigned(request: Request) -> None:
    """Refuse before reading the body what can't become authentic. Raises RequestRefused."""
    for header in ("Sublet-Party", "Sublet-Signature"):
        if header not in request.headers:
            raise RequestRefused("the request is not signed; use the sublet client", header)


def check(request: Request, body: bytes, body_digest: str) -> Call:
    """Authenticate. Raises RequestRefused."""
    edge = edge_of(request)
    target = target_of(request)
    for header in ("Sublet-Party", "Sublet-Time-Ms", "Sublet-Nonce", "Sublet-Signature"):
        if len(request.headers.getlist(header)) > 1:
            raise RequestRefused("stands twice", header)
    caller = authenticate(
        request.headers,
        broker=edge.broker.party,
        method=request.method,
        target=target,
        body_digest=body_digest,
        now_ms=edge.now_ms(),
    )
    key = request.headers.get("Idempotency-Key", "")
    return Call(edge, caller, request.method, target, body, body_digest, key)


def declared_bytes(request: Request, max_bytes: int) -> int:
    """Return how long the body is said to be; 0 where nothing is said. Raises BodyTooLarge."""
    declared = request.headers.get("Content-Length", "0")
    if not declared.isdecimal() or int(declared[:20]) > max_bytes:
        raise BodyTooLarge(max_bytes)
    return int(declared)


async def body_parts(request: Request, max_bytes: int, limit_s: float) -> AsyncIterator[bytes]:
    """Yield the body as it comes. Raises BodyTooLarge, and Refusal after `limit_s`."""
    size = 0
    try:
        async with asyncio.timeout(limit_s):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise BodyTooLarge(max_bytes)
                yield part
    except TimeoutError as error:
        raise Refusal(
            ProblemCode.TOO_SLOW,
            f"the body took longer than {limit_s:.0f} s",
            field="body",
            limit_ms=int(limit_s * 1000),
        ) from error
    except ClientDisconnect as error:
        raise Refusal(ProblemCode.GONE, "the client hung up", field="body") from error


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body. Raises BodyTooLarge before more than `max_bytes` are held in memory."""
    declared_bytes(request, max_bytes)
    return b"".join([part async for part in body_parts(request, max_bytes, BODY_TIMEOUT_S)])


Reading = Annotated[Call, Depends(signed(0))]
Sending = Annotated[Call, Depends(signed(ENVELOPE_BODY_BYTES))]
Listing = Annotated[Call, Depends(signed(LIST_BODY_BYTES))]
