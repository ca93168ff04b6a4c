"""A broker behind its whole edge in this process, and requests signed as the client signs them.

The app runs on an event loop in a thread of its own, so that a test can ask it synchronously.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import httpx

from sublet_broker.adapters.http.app import build_app
from sublet_broker.adapters.http.server import compose
from sublet_contracts.auth import sign_request
from sublet_contracts.digests import is_digest
from sublet_contracts.keys import SigningKey
from tests.service.world import World, key_named


@dataclass(frozen=True)
class Answer:
    """What the app said."""

    status: int
    headers: httpx.Headers
    body: bytes


class Door:
    """The way in. `world` is behind it: the same broker, for what only agents do."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="door", daemon=True)
        self._numbers = iter(range(1 << 62))

    def __enter__(self) -> Door:
        self._thread.start()

        async def begin() -> None:
            self._edge, hub = compose(self.world.broker, "histories")
            self.app = build_app(self._edge, hub)

        self._wait(begin())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._edge.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def signed(
        self, key: SigningKey, method: str, target: str, body: bytes, again: str = ""
    ) -> dict[str, str]:
        """Return the headers with which `key` sends this request, as sdk/sublet/http.py does."""
        named = target.rpartition("/")[2]
        return sign_request(
            key,
            broker=self.world.key.party,
            method=method,
            target=target,
            body=body,
            time_ms=self.world.now_ms,
            nonce=f"{next(self._numbers):032x}",
            idempotency_key=again,
            body_digest=named if method == "PUT" and is_digest(named) else "",
        )

    def ask(
        self,
        who: str | None,
        method: str,
        target: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request, signed by the party of that name (None: unsigned)."""
        made = dict(headers or {})
        if who is not None:
            made |= self.signed(key_named(who), method, target, body)
        return cast(Answer, self._wait(self._ask(method, target, body, made)))

    async def _ask(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str]
    ) -> Answer:
        """Speak ASGI: a client library would tidy up what a hostile peer sends as it likes."""
        path, _, query = target.partition("?")
        raw = [(b"host", b"broker"), (b"content-length", str(len(body)).encode())]
        raw += [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in headers.items()]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": httpx.URL("http://broker" + path).path,
            "raw_path": path.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "root_path": "",
            "headers": raw,
            "client": ("127.0.0.1", 1),
            "server": ("broker", 80),
        }
        sent = False
        status, got, parts = 0, httpx.Headers(), []

        async def receive() -> dict[str, object]:
            nonlocal sent
            if sent:
                await asyncio.Event().wait()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status, got
            if message["type"] == "http.response.start":
                status, got = message["status"], httpx.Headers(message["headers"])
            else:
                parts.append(message.get("body", b""))

        await self.app(scope, receive, send)  # type: ignore[arg-type]
        return Answer(status, got, b"".join(parts))
