"""The broker's one app: REST, the logs' streams and the agents' websocket, on one port."""

import asyncio

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from starlette.types import ASGIApp

from sublet_broker.adapters.http import agent_socket as agents_ws
from sublet_broker.adapters.http import blobs as http_blobs
from sublet_broker.adapters.http import docs_page as http_page
from sublet_broker.adapters.http import health as http_health
from sublet_broker.adapters.http import jobs as http_jobs
from sublet_broker.adapters.http import logs as http_logs
from sublet_broker.adapters.http import market as http_market
from sublet_broker.adapters.http import openapi as http_docs
from sublet_broker.adapters.http import problems as http_errors
from sublet_broker.adapters.http.edge import Edge


def build_app(edge: Edge, hub: agents_ws.Hub) -> ASGIApp:
    """Return the app that serves `edge`."""
    app = FastAPI(
        title=http_docs.TITLE,
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
    http_errors.install(app)
    for part in (http_market, http_logs, http_jobs, http_blobs, http_health, agents_ws):
        app.include_router(part.router)

    @app.get("/docs", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(http_page.page(app.openapi()), headers=http_page.HEADERS)

    def openapi() -> dict[str, object]:
        return http_docs.describe(app)

    app.openapi = openapi  # type: ignore[method-assign]
    return http_errors.Guard(app, edge.metrics)
