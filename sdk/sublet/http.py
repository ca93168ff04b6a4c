"""One signed request, sent until it's answered: what every call of the client goes through."""

import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlencode

import httpx
from pydantic import BaseModel, ValidationError

from sublet.errors import is_of_tls, no_answer, not_understood, refusal
from sublet_contracts.api import BrokerInfo
from sublet_contracts.auth import sign_request
from sublet_contracts.keys import SigningKey

M = TypeVar("M", bound=BaseModel)

RETRIED_STATUS = frozenset({429, 502, 503, 504})
AWAY_LIMIT_S = 60.0
BYTES = "application/octet-stream"


class Link:
    """Signed requests to one broker. Every request may be sent again: a POST carries its own
    idempotency key, and each attempt is signed anew."""

    def __init__(self, url: str, key: SigningKey, *, away_limit_s: float = AWAY_LIMIT_S) -> None:
        self.url = url
        self.key = key
        self._away_limit_s = away_limit_s
        self._http = httpx.Client(base_url=url, timeout=httpx.Timeout(30.0, connect=5.0))
        self._broker: str | None = None

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def broker_info(self) -> BrokerInfo:
        """Ask the broker who it is."""
        return _parsed(self._until_answered(lambda: self._http.get("/v1/broker")), BrokerInfo)

    @property
    def broker(self) -> str:
        """The broker's party id."""
        if self._broker is None:
            self._broker = self.broker_info().broker
        return self._broker

    def sign_for(self, broker: str) -> None:
        """Address every signature to this broker from now on."""
        self._broker = broker

    def call(
        self,
        method: str,
        path: str,
        kind: type[M],
        *,
        query: Mapping[str, object] | None = None,
        body: BaseModel | None = None,
    ) -> M:
        """Send a request with a JSON body and return the answer. Raises SubletError."""
        data = body.model_dump_json().encode() if body is not None else b""
        return _parsed(self.send(method, path, query=query, data=data), kind)

    def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, object] | None = None,
        data: bytes = b"",
        signed_digest: str = "",
    ) -> httpx.Response:
        """Send a request until it's answered. `signed_digest`: of bytes, what is signed instead of
        their own hash. Raises SubletError on any answer but success."""
        target = _target(path, query)
        idempotency_key = os.urandom(16).hex() if method == "POST" else ""

        def attempt() -> httpx.Response:
            headers = self._signed(method, target, data, idempotency_key, signed_digest)
            if data:
                headers["Content-Type"] = BYTES if signed_digest else "application/json"
            return self._http.request(method, target, content=data or None, headers=headers)

        response = self._until_answered(attempt)
        if response.status_code >= 400:
            raise refusal(response)
        return response

    @contextmanager
    def stream(self, path: str, query: Mapping[str, object]) -> Iterator[Iterator[dict[str, Any]]]:
        """Open an NDJSON stream; yields its objects. Raises SubletError, httpx.TransportError."""
        target = _target(path, query)
        headers = self._signed("GET", target, b"", "")
        timeout = httpx.Timeout(60.0, connect=5.0)
        with self._http.stream("GET", target, headers=headers, timeout=timeout) as response:
            if response.status_code >= 400:
                response.read()
                raise refusal(response)
            yield (json.loads(line) for line in response.iter_lines() if line.strip())

    def _signed(
        self, method: str, target: str, data: bytes, key: str, data_digest: str = ""
    ) -> dict[str, str]:
        return sign_request(
            self.key,
            broker=self.broker,
            method=method,
            target=target,
            body=data,
            time_ms=time.time_ns() // 1_000_000,
            nonce=os.urandom(16).hex(),
            idempotency_key=key,
            body_digest=data_digest,
        )

    def _until_answered(self, attempt: Any) -> httpx.Response:
        deadline = time.monotonic() + self._away_limit_s
        wait_s = 0.1
        while True:
            asked_s = 0.0
            try:
                response: httpx.Response = attempt()
                if response.status_code not in RETRIED_STATUS:
                    return response
                why = f"answered {response.status_code}"
                retry_after = response.headers.get("Retry-After", "")
                asked_s = float(retry_after) if retry_after.isdecimal() else 0.0
            except httpx.TransportError as error:
                why = str(error) or type(error).__name__
                if is_of_tls(why):
                    raise no_answer(self.url, why) from error
            if time.monotonic() + wait_s > deadline:
                raise no_answer(self.url, why)
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(max(wait_s * 2, asked_s), 5.0)


def _target(path: str, query: Mapping[str, object] | None) -> str:
    chosen = {k: v for k, v in (query or {}).items() if v is not None and v != ""}
    return path + ("?" + urlencode(chosen) if chosen else "")


def _parsed(response: httpx.Response, kind: type[M]) -> M:
    if response.status_code >= 400:
        raise refusal(response)
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise not_understood(response, kind.__name__, error) from error
