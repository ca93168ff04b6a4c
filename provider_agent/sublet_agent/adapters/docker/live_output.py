"""What a container is writing right now, for the lines that it has not ended: the engine's log has
them only once they are.

One connection and one thread for each running container. It is read as fast as it comes, and no
more of it is kept than the unfinished lines: the engine holds a container's output back where
nobody reads it. Where the connection fails nothing is lost but this view, and it is made again. The
lines that are kept come from the engine's log (logs.py).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import docker
import requests
from docker.errors import DockerException

from sublet_agent.adapters.docker.logs import STREAMS, Frames
from sublet_agent.core.log_lines import Begun, UnfinishedLine, shown
from sublet_agent.core.runner_port import OutputLine

_READ_BYTES = 64 * 1024
_AGAIN_S = 5.0
_THREAD_NAME = "sublet-agent-output"


class _Follower:
    """One container's output as it comes."""

    def __init__(self, api: Any, container: str, *, from_start: bool) -> None:
        """Raises DockerException, RequestException, OSError, AttributeError."""
        params = {"stdout": 1, "stderr": 1, "stream": 1, "logs": 0}
        self._connection = api.attach_socket(container, params=params)
        self._socket: Any = getattr(self._connection, "_sock", self._connection)
        self._socket.settimeout(None)  # a job may well be silent for an hour
        self._lines = {stream: UnfinishedLine(known=from_start) for stream in STREAMS}
        self._begun = {stream: Begun() for stream in STREAMS}
        self.over = False
        threading.Thread(target=self._read, name=_THREAD_NAME, daemon=True).start()

    def states(self) -> tuple[OutputLine, ...]:
        """Return how its unfinished lines stand."""
        if self.over:
            return ()
        now_ms, seen_ms = _steady_ms(), time.time_ns() // 1_000_000
        found = ((stream, self._lines[stream].state) for stream in STREAMS)
        return tuple(
            OutputLine(stream, seen_ms, shown(state))
            for stream, state in found
            if state and self._begun[stream].stands(now_ms)
        )

    def close(self) -> None:
        """End it; its thread ends by that."""
        with contextlib.suppress(OSError):  # it has ended by itself
            self._socket.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        frames = Frames()
        # Closed by us, or by an engine that went away: then it is followed anew.
        with contextlib.suppress(OSError):
            while data := self._socket.recv(_READ_BYTES):
                for number, content in frames.feed(data):
                    if number in (1, 2):
                        stream = STREAMS[number - 1]
                        line, ended = self._lines[stream], b"\n" in content
                        line.feed(content)
                        self._begun[stream].wrote(line.held, _steady_ms(), ended_one=ended)
        self.over = True
        with contextlib.suppress(OSError):
            self._connection.close()


def _steady_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class LiveOutput:
    """Follows the containers of one agent. Any thread may call this."""

    def __init__(self, client: Callable[[], docker.DockerClient]) -> None:
        self._client = client
        self._followers: dict[str, _Follower] = {}
        self._not_before_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def follow(self, run_id: str, container: str, *, from_start: bool) -> None:
        """Follow a container, unless that is done. `from_start`: it has written nothing yet."""
        with self._lock:
            known = self._followers.get(run_id)
            if known is not None and not known.over:
                return
            if time.monotonic() < self._not_before_s.get(run_id, 0.0):
                return
            self._not_before_s[run_id] = time.monotonic() + _AGAIN_S
            # Only a view: without it all goes on, and the next look tries again.
            with contextlib.suppress(
                DockerException, requests.RequestException, OSError, AttributeError
            ):
                self._followers[run_id] = _Follower(
                    self._client().api, container, from_start=from_start
                )

    def states(self, run_id: str) -> tuple[OutputLine, ...]:
        """Return how a run's unfinished lines stand."""
        follower = self._followers.get(run_id)
        return follower.states() if follower is not None else ()

    def forget(self, run_id: str) -> None:
        """The run is over."""
        with self._lock:
            follower = self._followers.pop(run_id, None)
            self._not_before_s.pop(run_id, None)
        if follower is not None:
            follower.close()
