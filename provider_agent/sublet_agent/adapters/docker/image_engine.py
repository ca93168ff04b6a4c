"""What is asked of the Docker Engine about images, always as somebody without any login.

Each request that may reach a registry carries an empty login of its own. Left to itself the SDK
would read the owner's `config.json` and his credential helpers and send what they hold for that
registry; and the headers that he set for his registries are kept back as well. An image is looked
up first, and then pulled by its digest, which leaves alone what a tag means on this machine: a
renter can't put another image behind a name that the owner uses.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import requests
import urllib3
from docker.errors import APIError, ImageNotFound

from sublet_agent.core.pull_troubles import PullTrouble, trouble_of
from sublet_contracts.image_references import ImageReference

ANONYMOUS = base64.urlsafe_b64encode(b"{}").decode()
CONNECT_S = 20.0
MAX_ANSWER_BYTES = 4 * 2**20
MAX_EVENT_BYTES = 64 * 1024
MAX_RAW_CHARACTERS = 500
MAX_PLATFORMS = 1_000
UNKNOWN_FREE_BYTES = 2**62


class Refused(Exception):
    """The engine could not, or its registry would not."""

    def __init__(self, trouble: PullTrouble, raw: str = "") -> None:
        super().__init__(trouble.value)
        self.trouble = trouble
        self.raw = printable(raw)


class EngineLost(Exception):
    """The engine went away in the middle."""


@dataclass(frozen=True)
class Found:
    """What a registry has by a name."""

    digest: str
    platforms: tuple[tuple[str, str], ...]
    """(operating system, architecture)"""


class Ending:
    """Lets one thread end what another one reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.is_set = False

    def hold(self, response: requests.Response) -> None:
        """Name the answer that is being read."""
        with self._lock:
            self._socket = _socket_of(response)
            if self._socket is not None:
                # From here on it is the events that tell whether something moves.
                self._socket.settimeout(None)
            self._act()

    def end(self) -> None:
        """End it, now or as soon as there is something to end."""
        with self._lock:
            self.is_set = True
            self._act()

    def _act(self) -> None:
        if self.is_set and self._socket is not None:
            # The reader wakes up, and the engine drops the pull when nobody listens any more.
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class ImageEngine:
    """The engine's images."""

    def __init__(self, client: Callable[[], docker.DockerClient], answer_s: float) -> None:
        """`answer_s`: how long the engine, and a registry behind it, may take to begin an
        answer."""
        self._client = client
        self._answer_s = answer_s
        self._root: Path | None = None

    def inspect(self, name: str) -> dict[str, Any] | None:
        """Return an image of this engine by a name or an id, or None."""
        try:
            found: dict[str, Any] = self._client().api.inspect_image(name)
        except ImageNotFound:
            return None
        except APIError as error:
            if error.status_code == 400:  # a name that the engine's own grammar refuses
                return None
            raise
        return found

    def architecture(self) -> str:
        """Return the engine's architecture as images name it."""
        return str(self._client().api.version().get("Arch") or "")

    def look_up(self, reference: ImageReference, answer_s: float | None = None) -> Found:
        """Ask the registry what a name means; it has `answer_s` to begin its answer. Raises
        Refused, requests.RequestException."""
        api = self._client().api
        try:
            with api.get(
                self._url(f"distribution/{reference}/json"),
                headers=self._headers(),
                timeout=(CONNECT_S, min(self._answer_s, answer_s or self._answer_s)),
                stream=True,
            ) as response:
                answer = _bounded(response)
        except requests.exceptions.ReadTimeout as error:
            raise Refused(PullTrouble.TOO_SLOW, str(error)) from error
        if response.status_code != 200:
            raise _refusal(response.status_code, answer)
        try:
            told = json.loads(answer)
            digest = str(told["Descriptor"]["digest"])
            platforms = tuple(
                (str(one.get("os") or ""), str(one.get("architecture") or ""))
                for one in (told.get("Platforms") or ())[:MAX_PLATFORMS]
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(PullTrouble.GARBLED, str(error)) from error
        if reference.digest and reference.digest != digest:
            raise Refused(PullTrouble.DAMAGED, digest)
        return Found(digest, platforms)

    def pull(self, pinned: ImageReference, ending: Ending) -> Iterator[Mapping[str, Any]]:
        """Pull by digest and return the engine's events. Raises Refused, EngineLost."""
        api = self._client().api
        try:
            response = api.post(
                self._url("images/create"),
                params={"fromImage": pinned.name, "tag": pinned.digest},
                headers=self._headers(),
                timeout=(CONNECT_S, self._answer_s),
                stream=True,
            )
        except requests.exceptions.ReadTimeout as error:
            raise Refused(PullTrouble.TOO_SLOW, str(error)) from error
        with response:
            if response.status_code != 200:
                raise _refusal(response.status_code, _bounded(response))
            ending.hold(response)
            yield from _events(response)

    def remove(self, name: str) -> bool:
        """Take a name off an image, and the image off the disk if that was its last one and nothing
        uses it. Returns whether the name is gone."""
        try:
            self._client().api.remove_image(name, force=False)
        except ImageNotFound:
            return True
        except APIError as error:
            if error.status_code == 409:
                return False
            raise
        return True

    def free_bytes(self) -> int:
        """Return how much the disk with the engine's images has left; a lot where it is not this
        machine's."""
        root = self._root_folder()
        return shutil.disk_usage(root).free if root else UNKNOWN_FREE_BYTES

    def shares_disk_with(self, folder: Path) -> bool:
        """Say whether the engine's images lie on the disk of a folder."""
        root = self._root_folder()
        return root is not None and root.stat().st_dev == folder.stat().st_dev

    def _root_folder(self) -> Path | None:
        if self._root is None:
            told = Path(str(self._client().info().get("DockerRootDir") or "/var/lib/docker"))
            # The folder itself is root's alone: who can't see it sees the one above.
            self._root = next((p for p in (told, *told.parents) if _can_see(p)), Path("/"))
            if self._root == Path("/") and not told.parent.exists():
                self._root = None  # an engine elsewhere
        return self._root

    def _url(self, path: str) -> str:
        api = self._client().api
        return f"{api.base_url}/v{api.api_version}/{path}"

    def _headers(self) -> dict[str, str | None]:
        kept_back = [name for name in self._client().api.headers if name.lower().startswith("x-")]
        return {**dict.fromkeys(kept_back), "X-Registry-Auth": ANONYMOUS}


def printable(text: str) -> str:
    """Return somebody's text for the owner's log: short, on one line, and without control
    characters."""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_RAW_CHARACTERS]).strip()


def _refusal(status: int, answer: bytes) -> Refused:
    text = answer.decode(errors="replace")
    with suppress(ValueError, AttributeError):
        text = str(json.loads(text).get("message") or text)
    return Refused(trouble_of(text, status), text)


def _bounded(response: requests.Response) -> bytes:
    read = b""
    for piece in response.iter_content(64 * 1024):
        read += piece
        if len(read) > MAX_ANSWER_BYTES:
            raise Refused(PullTrouble.GARBLED, "an answer of too many bytes")
    return read


def _events(response: requests.Response) -> Iterator[Mapping[str, Any]]:
    left = b""
    try:
        for piece in response.iter_content(chunk_size=None):
            *lines, left = (left + piece).split(b"\n")
            if len(left) > MAX_EVENT_BYTES:
                raise Refused(PullTrouble.GARBLED, "an event of too many bytes")
            for line in lines:
                if event := _event(line):
                    yield event
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise EngineLost(str(error)) from error
    if event := _event(left):
        yield event


def _event(line: bytes) -> Mapping[str, Any] | None:
    if not line.strip() or len(line) > MAX_EVENT_BYTES:
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def _socket_of(response: requests.Response) -> socket.socket | None:
    """Return what an answer is read from; None where it is no plain socket (an engine over ssh)."""
    found: Any = response.raw
    for name in ("_fp", "fp", "raw", "_sock"):
        found = getattr(found, name, None)
    return found if isinstance(found, socket.socket) else None


def _can_see(folder: Path) -> bool:
    try:
        return os.path.isdir(folder) and shutil.disk_usage(folder).total > 0
    except OSError:
        return False
