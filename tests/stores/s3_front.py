"""What stands between a broker and its S3 server, and does what networks and stores do.

A test hands it a function from method and path to a fault, or None. It forwards the rest as it is.
"""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from sublet_broker.adapters.blobs.s3_place import Credentials
from tests.stores.s3_rules import refusal

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "date", "server"}
STALL_S = 30.0


@dataclass(frozen=True)
class Fault:
    """What becomes of one request."""

    status: int = 0
    """Answer with this, and don't forward."""
    code: str = "InternalError"
    after: bool = False
    """Forward all the same, and then answer with `status`, or not at all (`cut`)."""
    stall: bool = False
    """Take the request and never answer."""
    cut: bool = False
    """Break the connection in the middle of the answer."""
    flip_sent: bool = False
    """Flip a bit of what is sent."""
    flip_kept: bool = False
    """Flip a bit of what is kept."""
    flip_received: bool = False
    """Flip a bit of what is received."""
    drop: tuple[str, ...] = ()
    """Headers that don't get through."""


Judge = Callable[[str, str], Fault | None]


class Front(ThreadingHTTPServer):
    """One address in front of another."""

    daemon_threads = True

    def __init__(self, target: str, key: Credentials | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.key = key
        self.judge: Judge = lambda method, path: None
        self.asked: list[tuple[str, str]] = []
        """Method and path of each request that came."""
        self.over = threading.Event()

    @property
    def endpoint(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def does(self, judge: Judge) -> Iterator[None]:
        """Have these faults for as long as the block lasts."""
        before, self.judge = self.judge, judge
        try:
            yield
        finally:
            self.judge = before

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up in the middle is no error here."""


@contextmanager
def front(target: str, key: Credentials | None = None) -> Iterator[Front]:
    """Stand before `target`. With a key it holds to what was signed with it, as S3 does."""
    server = Front(target, key)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Front
    protocol_version = "HTTP/1.1"

    def _take(self) -> None:
        server = self.server
        server.asked.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = server.judge(self.command, self.path) or Fault()
        if fault.stall:
            server.over.wait(STALL_S)
            self.close_connection = True
            return
        if fault.status and not fault.after:
            self._say(fault)
            return
        if fault.flip_sent:
            body = _flipped(body)
        if server.key is not None:
            url = f"http://{self.headers.get('Host')}{self.path}"
            refused = refusal(server.key, self.command, url, self.headers, body)
            if refused is not None:
                self._say(Fault(*refused))
                return
        status, headers, answer = self._forward(_flipped(body) if fault.flip_kept else body, fault)
        if fault.status:
            self._say(fault)
            return
        if fault.flip_received:
            answer = _flipped(answer)
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP | {"content-length"}:
                self.send_header(name, value)
        length = next((v for n, v in headers if n.lower() == "content-length"), str(len(answer)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(answer)))
        self.end_headers()
        self.wfile.write(answer[: len(answer) // 2] if fault.cut else answer)
        if fault.cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _take

    def _forward(self, body: bytes, fault: Fault) -> tuple[int, list[tuple[str, str]], bytes]:
        parts = urlsplit(self.server.target)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=STALL_S)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in (*HOP_BY_HOP - {"date"}, *fault.drop):
                    connection.putheader(name, value)
            connection.endheaders(body)
            got = connection.getresponse()
            return got.status, got.getheaders(), got.read()
        finally:
            connection.close()

    def _say(self, fault: Fault) -> None:
        text = f"<Error><Code>{fault.code}</Code><Message>by the test</Message></Error>".encode()
        self.send_response(fault.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:] if data else data
