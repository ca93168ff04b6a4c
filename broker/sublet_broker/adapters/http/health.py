"""/healthz, /readyz and /metrics: unsigned, for the operator's tools; nothing in them is secret."""

import asyncio
import time

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from sublet_broker.adapters.http.edge import Edge
from sublet_broker.adapters.http.metrics import CONTENT_TYPE
from sublet_broker.adapters.http.signed_calls import EdgeOf

router = APIRouter(tags=["operation"])

KEEP_S = 1.0
"""Answers are kept so long: whoever may ask without a signature may ask often."""
PROBE_S = 5.0


@router.get("/healthz", summary="The process answers")
async def healthz() -> dict[str, str]:
    """Always ok while the broker can answer at all."""
    return {"status": "ok"}


@router.get(
    "/readyz",
    summary="The broker can work",
    responses={503: {"description": "`checks` says what is missing"}},
)
async def readyz(edge: EdgeOf, request: Request) -> Response:
    """Database, blobs, match engine and loops. Without the match engine the broker matches by
    itself: it stays ready and says so."""
    state = request.app.state
    async with state.readyz_lock:
        at, kept = state.readyz_kept
        if kept is None or time.monotonic() - at > KEEP_S:
            kept = await _probe(edge)
            state.readyz_kept = (time.monotonic(), kept)
    ready, checks = kept
    status = "stopping" if edge.stopping.is_set() else "ready" if ready else "not ready"
    return JSONResponse({"status": status, "checks": checks}, 200 if status == "ready" else 503)


async def _probe(edge: Edge) -> tuple[bool, dict[str, str]]:
    checks: dict[str, str] = {}
    ready = True
    for probe in edge.probes:
        try:
            said = await asyncio.wait_for(edge.call(probe.check), PROBE_S)
        except Exception as error:  # noqa: BLE001 - the check's answer is that it failed
            said = f"{type(error).__name__}"
        checks[probe.name] = said or "ok"
        ready = ready and not (said and probe.needed)
    for name, loop in edge.loops.all.items():
        trouble = loop.trouble()
        checks[f"loop {name}"] = trouble or "ok"
        ready = ready and (not trouble or trouble.startswith("matching waits"))
    return ready, checks


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(edge: EdgeOf) -> Response:
    """In Prometheus' text format."""
    return Response(await edge.call(edge.metrics.render), media_type=CONTENT_TYPE)
