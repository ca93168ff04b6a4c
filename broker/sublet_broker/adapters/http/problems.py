"""Every error as RFC 9457 problem+json: what, which field, what to do next. A 500 tells nothing."""

import asyncio
import contextlib
import logging
import secrets
import time
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sublet_broker.adapters.http.metrics import Metrics
from sublet_broker.service.errors import Refusal
from sublet_broker.service.ports import MatcherAway, StorageFailing, StorageFull, StoreAway
from sublet_contracts.api import Problem
from sublet_contracts.auth import RequestRefused
from sublet_contracts.documents import DocumentRefused

log = logging.getLogger("sublet.http")

PROBLEM_JSON = "application/problem+json"
DISCARD_BYTES = 64 * 1024**2
DISCARD_S = 5.0


class BodyTooLarge(Refusal):
    """More bytes than the call takes; they were not read."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            413,
            "too_large",
            "Too large",
            f"this call takes at most {limit_bytes} bytes",
            field="body",
            fix="send less; files go up in chunks (the sublet client does it)",
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


def problem(
    status: int,
    code: str,
    title: str,
    detail: str,
    *,
    field: str = "",
    fix: str = "",
    headers: dict[str, str] | None = None,
) -> Response:
    """Return a problem+json answer."""
    body = Problem(
        type=f"urn:sublet:problem:{code}",
        title=title,
        status=status,
        detail=detail,
        code=code,
        field=field,
        fix=fix,
    )
    return Response(body.model_dump_json(), status, headers, media_type=PROBLEM_JSON)


def as_refusal(error: Exception) -> Refusal | None:
    """Return what an expected exception means to the caller; None: it isn't expected."""
    match error:
        case Refusal():
            return error
        case RequestRefused():
            return Refusal(
                401,
                "clock" if error.header == "Sublet-Time-Ms" else "not_authentic",
                "Not authentic",
                f"{error.header}: {error}",
                field=error.header,
                fix="sign the request as /docs says, with the key of the party that it names",
            )
        case DocumentRefused():
            return Refusal(
                422,
                "bad_document",
                "Document refused",
                str(error),
                field=error.field,
                fix="sign a corrected document",
            )
        case StorageFailing():
            return Refusal(
                507,
                "storage_failing",
                "The broker's disk can't be written",
                "nothing that was stored before is lost; whether this was stored is not known",
                fix="send it again later, with the same Idempotency-Key; its operator must look",
            )
        case StorageFull():
            return Refusal(
                507,
                "storage_full",
                "The broker's disk is full",
                "nothing was stored, and nothing that was stored before is lost",
                fix="send it again later; the broker's operator must free some space",
            )
        case StoreAway():
            return Refusal(
                503,
                "database_away",
                "The broker's database is away",
                "it does not answer; nothing that was stored before is lost",
                fix="send it again later, with the same Idempotency-Key",
            )
        case MatcherAway():
            return Refusal(
                503,
                "matcher_away",
                "Matching waits",
                "the match engine does not answer",
                fix="queued jobs are matched when it is back; nothing needs to be sent again",
            )
        case _:
            return None


def install(app: FastAPI) -> None:
    """Give the app these answers."""

    async def expected(_request: Request, error: Exception) -> Response:
        refusal = as_refusal(error)
        if refusal is None:
            raise error
        headers: dict[str, str] = {}
        if refusal.status == 401:
            headers["WWW-Authenticate"] = 'Sublet realm="sublet broker"'
        if refusal.status in (413, 408):
            headers["Connection"] = "close"
        if refusal.status in (429, 503, 507):
            headers["Retry-After"] = "5"
        answer = problem(
            refusal.status,
            refusal.code,
            refusal.title,
            refusal.detail,
            field=refusal.field,
            fix=refusal.fix,
            headers=headers,
        )
        return _Unread(answer) if isinstance(refusal, BodyTooLarge) else answer

    for kind in (Refusal, RequestRefused, DocumentRefused, StorageFull, StoreAway, MatcherAway):
        app.add_exception_handler(kind, expected)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        incident = secrets.token_hex(4)
        log.error(
            "incident %s: %s %s", incident, request.method, request.url.path[:200], exc_info=error
        )
        return problem(
            500,
            "internal",
            "Our mistake",
            f"incident {incident} is in the broker's log",
            fix="send it again with the same Idempotency-Key; tell the operator the incident",
        )

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:200]
        match error.status_code:
            case 404:
                code, detail = "no_such_address", f"there is nothing at {path}"
                fix = "see /docs for what there is; the client may be newer than the broker"
            case 405:
                allowed = (error.headers or {}).get("Allow", "")
                code, detail = "method", f"{request.method} is not for {path}"
                fix = f"use {allowed}" if allowed else "see /docs"
            case _:
                code, detail, fix = "http", str(error.detail), "see /docs"
        title = HTTPStatus(error.status_code).phrase
        headers = dict(error.headers or {})
        return problem(error.status_code, code, title, detail, fix=fix, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def validation(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
        return problem(
            422,
            "invalid",
            "Not valid",
            f"{field}: {first['msg']}",
            field=field,
            fix="correct that field; /docs says what it takes",
        )


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
