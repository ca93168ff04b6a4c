"""The proxy does what its weather says, to connections whose bytes are checked."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from tests.chaos.proxy import CALM, Proxy, Weather

DATA = random.Random(5).randbytes(300_000)
LIMIT_S = 60.0


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the proxy's doing
            while data := self.request.recv(65536):
                self.request.sendall(data)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy before a server that sends back what it gets."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, port = server.server_address[:2]
        proxy = Proxy((str(host), port), seed=1)
        yield proxy
        proxy.close()
        server.shutdown()


def _connect(proxy: Proxy) -> socket.socket:
    host, port = proxy.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), LIMIT_S)


def _echoed(wire: socket.socket, data: bytes) -> bytes:
    def send() -> None:
        with contextlib.suppress(OSError):
            wire.sendall(data)

    threading.Thread(target=send, daemon=True).start()
    got = bytearray()
    while len(got) < len(data) and (piece := wire.recv(65536)):
        got += piece
    return bytes(got)


@pytest.mark.parametrize(
    "weather",
    [CALM, Weather(fragments=True), Weather(delay_s=0.01, jitter_s=0.05, bytes_per_s=2e6)],
)
def test_what_passes_is_whole_and_in_order(proxy: Proxy, weather: Weather) -> None:
    proxy.weather = weather
    with _connect(proxy) as wire:
        got = _echoed(wire, DATA)
    assert hashlib.sha256(got).digest() == hashlib.sha256(DATA).digest()
    assert (proxy.counts["pieces"] > 0) == weather.fragments


def test_a_reset_comes_in_the_midst_of_a_stream(proxy: Proxy) -> None:
    proxy.weather = Weather(reset_share=1.0)
    got = b""
    with _connect(proxy) as wire, contextlib.suppress(ConnectionResetError):
        got = _echoed(wire, DATA)
    assert len(got) < len(DATA)
    assert proxy.counts["resets"] == 1


def test_a_half_open_connection_swallows_one_direction_and_tells_nobody(proxy: Proxy) -> None:
    with _connect(proxy) as wire:
        assert _echoed(wire, b"hello") == b"hello"
        assert proxy.deaden("down") == 1
        wire.sendall(b"are you there?")
        wire.settimeout(0.3)
        with pytest.raises(TimeoutError):
            wire.recv(1)
    with _connect(proxy) as wire:
        assert _echoed(wire, b"hello again") == b"hello again"


def test_a_shut_proxy_refuses_and_opens_at_the_same_port(proxy: Proxy) -> None:
    with _connect(proxy) as wire:
        assert _echoed(wire, b"hello") == b"hello"
        proxy.shut()
        with pytest.raises(ConnectionResetError):
            wire.recv(1)
    with pytest.raises(ConnectionRefusedError):
        _connect(proxy)
    proxy.open()
    with _connect(proxy) as wire:
        assert _echoed(wire, b"hello") == b"hello"


def test_the_same_seed_makes_the_same_choices(proxy: Proxy) -> None:
    def refusals(seed: int) -> list[bool]:
        other = Proxy(proxy.target, seed)
        other.weather = Weather(refused_share=0.5)
        refused = []
        for _ in range(12):
            try:
                with _connect(other) as wire:
                    refused.append(_echoed(wire, b"x") != b"x")
            except OSError:
                refused.append(True)
        other.close()
        return refused

    assert refusals(7) == refusals(7)
    assert len(set(refusals(7))) == 2
