"""The broker's one app: REST, the logs' streams and the agents' websocket, on one port."""

import asyncio

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from starlette.types import ASGIApp

from sublet_broker.adapters.http import (
    agent_socket,
    blobs,
    docs_page,
    health,
    jobs,
    logs,
    market,
    openapi,
    problems,
)
from sublet_broker.adapters.http.edge import Edge


def build_app(edge: Edge, hub: agent_socket.Hub) -> ASGIApp:
    """Return the app that serves `edge`."""
    app = FastAPI(
        title=openapi.TITLE,
        version=edge.version,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    app.state.edge = edge
    app.state.hub = hub
    app.state.readyz_lock = asyncio.Lock()
    app.state.readyz_kept = (0.0, None)
    problems.install(app)
    for part in (market, logs, jobs, blobs, health, agent_socket):
        app.include_router(part.router)

    @app.get("/docs", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(docs_page.page(app.openapi()), headers=docs_page.HEADERS)

    def described() -> dict[str, object]:
        return openapi.describe(app)

    app.openapi = described  # type: ignore[method-assign]
    return problems.Guard(app, edge.metrics)
