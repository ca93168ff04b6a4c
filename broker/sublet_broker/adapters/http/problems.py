"""Every error as RFC 9457 problem+json: which code, what, which field. A 500 tells nothing.

STATUS is the one place that knows what HTTP calls a refusal; what to do about one, the client says.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sublet_broker.adapters.http.metrics import Metrics
from sublet_broker.service.errors import Refusal
from sublet_broker.service.ports import (
    BlobsAway,
    MatcherAway,
    StorageFailing,
    StorageFull,
    StoreAway,
)
from sublet_contracts.api import Problem
from sublet_contracts.auth import RequestRefused
from sublet_contracts.documents import DocumentRefused
from sublet_contracts.problems import PROBLEMS, ProblemCode

log = logging.getLogger("sublet.http")

PROBLEM_JSON = "application/problem+json"
DISCARD_BYTES = 64 * 1024**2
DISCARD_S = 5.0

STATUS: dict[ProblemCode, int] = {
    ProblemCode.NO_SUCH_ADDRESS: 404,
    ProblemCode.METHOD: 405,
    ProblemCode.MALFORMED: 400,
    ProblemCode.INVALID: 422,
    ProblemCode.TOO_LARGE: 413,
    ProblemCode.TOO_SLOW: 408,
    ProblemCode.GONE: 400,
    ProblemCode.NOT_AUTHENTIC: 401,
    ProblemCode.CLOCK: 401,
    ProblemCode.REPLAYED: 409,
    ProblemCode.IDEMPOTENCY_MISMATCH: 409,
    ProblemCode.UNKNOWN_PARTY: 403,
    ProblemCode.NOT_OPERATOR: 403,
    ProblemCode.STALE_INSTANCE: 409,
    ProblemCode.NOT_FOUND: 404,
    ProblemCode.AMBIGUOUS: 409,
    ProblemCode.BAD_STATE: 422,
    ProblemCode.DOCUMENT_REFUSED: 422,
    ProblemCode.IMAGE_NOT_PINNED: 422,
    ProblemCode.BUDGET_TOO_SMALL: 422,
    ProblemCode.OVER_BALANCE: 402,
    ProblemCode.NO_MATCH: 422,
    ProblemCode.JOB_ENDED: 409,
    ProblemCode.NOT_PAUSED: 409,
    ProblemCode.BUDGET_USED_UP: 422,
    ProblemCode.RECEIPTS_UNSIGNED: 422,
    ProblemCode.INPUT_MISSING: 422,
    ProblemCode.INPUT_CHANGED: 422,
    ProblemCode.INPUT_REFUSED: 422,
    ProblemCode.INPUT_TOO_LARGE: 422,
    ProblemCode.HASH_MISMATCH: 422,
    ProblemCode.STALE_EPOCH: 409,
    ProblemCode.NO_LONGER_KEPT: 410,
    ProblemCode.DAMAGED: 410,
    ProblemCode.BY_ADDRESS: 409,
    ProblemCode.TOO_MANY: 429,
    ProblemCode.TOO_MANY_JOBS: 429,
    ProblemCode.TOO_MANY_STREAMS: 429,
    ProblemCode.TOO_MUCH_STORED: 413,
    ProblemCode.BUSY: 503,
    ProblemCode.MATCHER_AWAY: 503,
    ProblemCode.DATABASE_AWAY: 503,
    ProblemCode.BLOBS_AWAY: 503,
    ProblemCode.STORAGE_FULL: 507,
    ProblemCode.STORAGE_FAILING: 507,
    ProblemCode.INTERNAL: 500,
}

_HEADERS: dict[int, dict[str, str]] = {
    401: {"WWW-Authenticate": 'Sublet realm="sublet broker"'},
    413: {"Connection": "close"},
    408: {"Connection": "close"},
    429: {"Retry-After": "5"},
    503: {"Retry-After": "5"},
    507: {"Retry-After": "5"},
}


class BodyTooLarge(Refusal):
    """More bytes than the call takes; they were not read."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            ProblemCode.TOO_LARGE,
            f"this call takes at most {limit_bytes} bytes",
            field="body",
            limit_bytes=limit_bytes,
        )


class _Unread(Response):
    """An answer to a request whose body is still coming. It is sent at once; then, for a while,
    what comes is thrown away: a connection closed over unread bytes takes the answer with it."""

    def __init__(self, answer: Response) -> None:
        super().__init__(answer.body, answer.status_code, dict(answer.headers))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        left = DISCARD_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_S):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body"):
                        break
        await send({"type": "http.response.body", "body": b""})


def answer_to(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Response:
    """Return a refusal as problem+json, with the headers that its status wants, and `headers`."""
    status = STATUS[refusal.code]
    body = Problem(
        type=f"urn:sublet:problem:{refusal.code}",
        title=PROBLEMS[refusal.code].title,
        status=status,
        detail=refusal.detail,
        code=refusal.code,
        field=refusal.field,
        facts=refusal.facts,
    )
    return Response(
        body.model_dump_json(),
        status,
        {**_HEADERS.get(status, {}), **(headers or {})},
        media_type=PROBLEM_JSON,
    )


def as_refusal(error: Exception) -> Refusal | None:
    """Return what an expected exception means to the caller; None: it isn't expected."""
    match error:
        case Refusal():
            return error
        case RequestRefused(header="Sublet-Time-Ms"):
            return Refusal(ProblemCode.CLOCK, f"{error.header}: {error}", field=error.header)
        case RequestRefused():
            says = f"{error.header}: {error}"
            return Refusal(ProblemCode.NOT_AUTHENTIC, says, field=error.header)
        case DocumentRefused():
            return Refusal(ProblemCode.DOCUMENT_REFUSED, str(error), field=error.field)
        case StorageFailing():
            return Refusal(
                ProblemCode.STORAGE_FAILING,
                "nothing that was stored before is lost; whether this was stored is not known",
            )
        case StorageFull():
            return Refusal(
                ProblemCode.STORAGE_FULL,
                "nothing was stored, and nothing that was stored before is lost",
            )
        case StoreAway():
            return Refusal(
                ProblemCode.DATABASE_AWAY,
                "it does not answer; nothing that was stored before is lost",
            )
        case BlobsAway():
            return Refusal(
                ProblemCode.BLOBS_AWAY,
                "it does not answer; nothing that was stored before is lost, and whether this was "
                "stored is not known",
            )
        case MatcherAway():
            return Refusal(ProblemCode.MATCHER_AWAY, "the match engine does not answer")
        case _:
            return None


def install(app: FastAPI) -> None:
    """Give the app these answers."""

    async def expected(_request: Request, error: Exception) -> Response:
        refusal = as_refusal(error)
        if refusal is None:
            raise error
        answer = answer_to(refusal)
        return _Unread(answer) if isinstance(refusal, BodyTooLarge) else answer

    for kind in (
        Refusal,
        RequestRefused,
        DocumentRefused,
        StorageFull,
        StoreAway,
        BlobsAway,
        MatcherAway,
    ):
        app.add_exception_handler(kind, expected)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        incident = secrets.token_hex(4)
        log.error(
            "incident %s: %s %s", incident, request.method, request.url.path[:200], exc_info=error
        )
        return answer_to(
            Refusal(
                ProblemCode.INTERNAL,
                f"incident {incident} is in the broker's log",
                incident=incident,
            )
        )

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:200]
        headers = error.headers or {}
        match error.status_code:
            case 404:
                refusal = Refusal(ProblemCode.NO_SUCH_ADDRESS, f"there is nothing at {path}")
            case 405:
                allowed = headers.get("Allow", "")
                says = f"{request.method} is not for {path}"
                refusal = Refusal(ProblemCode.METHOD, says, allowed=allowed)
            case _:  # The router knows no others; whatever else the framework can't read is here.
                refusal = Refusal(ProblemCode.MALFORMED, str(error.detail))
        return answer_to(refusal, headers)

    @app.exception_handler(RequestValidationError)
    async def validation(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
        return answer_to(Refusal(ProblemCode.INVALID, f"{field}: {first['msg']}", field=field))


class Guard:
    """Outermost: counts and logs requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            # Where a problem could still be sent, `unexpected` has sent and logged it. Otherwise
            # the answer is half-way out, and a broken connection is the only honest end of it.
            if status != 500:
                log.exception("%s %s broke off", scope["method"], scope["path"][:200])
                raise
        finally:
            took_s = time.perf_counter() - began
            route = scope.get("route")
            address = getattr(route, "path", "other")
            self._metrics.request(scope["method"], address, status, took_s)
            # Reading is frequent and uninteresting; so are chunks.
            told = status >= 400 or scope["method"] == "POST"
            level = logging.INFO if told else logging.DEBUG
            log.log(
                level,
                "%s %s %d",
                scope["method"],
                scope["path"][:200],
                status,
                extra={"status": status, "took_ms": round(took_s * 1000, 1), "route": address},
            )
