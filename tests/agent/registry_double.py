"""A registry in this process, whose mood a test sets: it serves images made here, and misbehaves.

It writes down what it was asked and with which credentials. What a mood does is told at `Mood`.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MANIFEST_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
LAYER_TAR = "application/vnd.docker.image.rootfs.diff.tar"
PIECE_BYTES = 64 * 1024
STILL_AFTER_BYTES = 256 * 1024
"""so much of a blob comes before it stands still, or is cut"""


class Mood(StrEnum):
    """How the registry behaves from now on."""

    WELL = "well"
    BUSY = "busy"
    """429 for every manifest"""
    DOWN = "down"
    """503 for every manifest"""
    STILL = "still"
    """a blob begins, and no more of it comes"""
    RESET = "reset"
    """a blob begins, and the connection is cut"""
    DRIP = "drip"
    """blobs come at 256 KiB/s"""
    NO_BLOBS = "no blobs"
    """404 for every blob"""
    HALF_MANIFEST = "half manifest"
    """a manifest ends in its middle, as if it were whole"""
    PRIVATE = "private"
    """401 to whoever shows no login"""
    DENIED = "denied"
    """403 DENIED, as for a repository that is not there, or not yours"""
    SILENT = "silent"
    """manifests are never answered"""
    CHATTY = "chatty"
    """500 with a long text of its own, control characters included"""


def digest_of(data: bytes) -> str:
    """Return the name of a content."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass
class RegistryDouble:
    """The registry. `name` is its host and port."""

    mood: Mood = Mood.WELL
    manifests: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)
    """(repository, tag or digest) -> media type and bytes"""
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    logins: list[str] = field(default_factory=list)
    """every Authorization header that came"""
    metadata: list[str] = field(default_factory=list)
    """every header of a client's own (X-Meta-...) that came"""
    ended_early: int = 0
    """blobs whose reader went away"""

    @property
    def name(self) -> str:
        """Its host and port, as images name it."""
        return f"127.0.0.1:{self.port}"

    port: int = 0

    # -- what it holds -----------------------------------------------------------------------------

    def add(
        self,
        repository: str,
        tag: str,
        layers: list[bytes] | None = None,
        *,
        architecture: str = "amd64",
        command: tuple[str, ...] = (),
    ) -> str:
        """Hold an image of these layers (tar archives). Returns its manifest's digest."""
        layers = layers if layers is not None else [layer_of({"noise": os.urandom(64)})]
        described = []
        for layer in layers:
            packed = gzip.compress(layer, compresslevel=1, mtime=0)
            described.append(self._blob(packed, LAYER))
        config = {
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": list(command) or None},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self._blob(json.dumps(config).encode(), CONFIG),
            "layers": described,
        }
        return self._manifest(repository, tag, MANIFEST, manifest)

    def add_list(self, repository: str, tag: str, digest: str, architecture: str) -> str:
        """Hold a manifest list that names one platform only."""
        listed = {
            "mediaType": MANIFEST,
            "digest": digest,
            "size": len(self.manifests[repository, digest][1]),
            "platform": {"os": "linux", "architecture": architecture},
        }
        document = {"schemaVersion": 2, "mediaType": MANIFEST_LIST, "manifests": [listed]}
        return self._manifest(repository, tag, MANIFEST_LIST, document)

    def add_saved(self, repository: str, tag: str, saved: bytes) -> str:
        """Hold an image as `docker save` wrote it."""
        with tarfile.open(fileobj=io.BytesIO(saved)) as tar:

            def read(name: str) -> bytes:
                file = tar.extractfile(name)
                assert file is not None
                return file.read()

            listed = json.loads(read("manifest.json"))[0]
            manifest = {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": self._blob(read(listed["Config"]), CONFIG),
                "layers": [self._blob(read(name), LAYER_TAR) for name in listed["Layers"]],
            }
        return self._manifest(repository, tag, MANIFEST, manifest)

    def _blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        digest = digest_of(data)
        self.blobs[digest] = data
        return {"mediaType": media_type, "size": len(data), "digest": digest}

    def _manifest(
        self, repository: str, tag: str, media_type: str, document: dict[str, Any]
    ) -> str:
        data = json.dumps(document).encode()
        digest = digest_of(data)
        self.manifests[repository, tag] = self.manifests[repository, digest] = (media_type, data)
        return digest

    def asked_for(self, part: str) -> int:
        """Return how many requests held `part` in their path."""
        return sum(part in path for path in self.asked)


def layer_of(files: dict[str, bytes]) -> bytes:
    """Return a layer with these files, all executable."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


@contextlib.contextmanager
def serving(double: RegistryDouble) -> Iterator[RegistryDouble]:
    """Let it answer on a port of this machine's loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: `asked` has it."""

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            double.asked.append(f"{self.command} {self.path}")
            login = self.headers.get("Authorization")
            if login:
                double.logins.append(login)
            double.metadata += [name for name in self.headers if name.lower().startswith("x-meta")]
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._respond(login)

        def _respond(self, login: str | None) -> None:
            if double.mood is Mood.PRIVATE and not login:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="double"')
                self._body(_problem("UNAUTHORIZED", "authentication required"))
            elif self.path == "/v2/":
                self._say(200, b"{}")
            elif "/manifests/" in self.path:
                self._manifest()
            elif "/blobs/" in self.path:
                self._blob(double.blobs.get(self.path.rsplit("/", 1)[1]))
            else:
                self._say(404, b"")

        def _manifest(self) -> None:
            match double.mood:
                case Mood.BUSY:
                    self._say(429, _problem("TOOMANYREQUESTS", "too many pulls from here"))
                    return
                case Mood.DOWN:
                    self._say(503, _problem("UNAVAILABLE", "service unavailable"))
                    return
                case Mood.DENIED:
                    self._say(403, _problem("DENIED", "requested access is denied"))
                    return
                case Mood.CHATTY:
                    self._say(500, b"\x1b[31mlook at me\x07\r\n" + b"secret-of-the-registry " * 900)
                    return
                case Mood.SILENT:
                    while double.mood is Mood.SILENT:
                        time.sleep(0.05)
            repository, _, name = self.path.removeprefix("/v2/").partition("/manifests/")
            found = double.manifests.get((repository, name))
            if found is None:
                self._say(404, _problem("MANIFEST_UNKNOWN", "manifest unknown"))
                return
            media_type, data = found
            self.send_response(200)
            self.send_header("Content-Type", media_type)
            self.send_header("Docker-Content-Digest", digest_of(data))
            self._body(data[: len(data) // 2] if double.mood is Mood.HALF_MANIFEST else data)

        def _blob(self, data: bytes | None) -> None:
            if data is None or double.mood is Mood.NO_BLOBS:
                self._say(404, _problem("BLOB_UNKNOWN", "blob unknown to registry"))
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            for at in range(0, len(data), PIECE_BYTES):
                if at >= STILL_AFTER_BYTES and double.mood is Mood.STILL:
                    self._stand_still()
                if at >= STILL_AFTER_BYTES and double.mood is Mood.RESET:
                    self._cut()
                    return
                if double.mood is Mood.DRIP:
                    time.sleep(0.25)
                try:
                    self.wfile.write(data[at : at + PIECE_BYTES])
                except OSError:
                    double.ended_early += 1
                    raise

        def _stand_still(self) -> None:
            self.connection.settimeout(0.05)
            while double.mood is Mood.STILL:
                with contextlib.suppress(TimeoutError):
                    if not self.connection.recv(1):
                        double.ended_early += 1
                        raise BrokenPipeError
            self.connection.settimeout(None)

        def _cut(self) -> None:
            # Closed at once and without waiting for what was sent: the reader sees a reset.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def _say(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self._body(body)

        def _body(self, body: bytes) -> None:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    double.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield double
    finally:
        double.mood = Mood.WELL
        server.shutdown()
        server.server_close()


def _problem(code: str, message: str) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": message}]}).encode()
