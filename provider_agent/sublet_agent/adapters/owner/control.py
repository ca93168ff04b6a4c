"""The owner's door: a unix socket in the state folder, one JSON line in, one JSON line out.

Only the folder's owner reaches it (the folder is 0700). Linux limits such a path to 107 bytes, so
it is named through /proc/self/fd: a state folder may lie as deep as it likes.
"""

import asyncio
import contextlib
import json
import os
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOCKET_NAME = "control.sock"
MAX_LINE_BYTES = 64 * 1024


class NoAgent(Exception):
    """No agent runs with this state folder."""


@contextlib.contextmanager
def _reachable(folder: Path) -> Iterator[str]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_NAME}"
    finally:
        os.close(descriptor)


class Control:
    """Answers the owner's commands while the agent runs."""

    def __init__(self, folder: Path, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._folder = folder
        self._answer = answer
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Start to listen. The journal's lock is held, so an old socket is a dead one."""
        (self._folder / SOCKET_NAME).unlink(missing_ok=True)
        with _reachable(self._folder) as path:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(path)
        (self._folder / SOCKET_NAME).chmod(0o600)
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listener, limit=MAX_LINE_BYTES
        )

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
        (self._folder / SOCKET_NAME).unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await asyncio.wait_for(reader.readline(), 10)
            try:
                asked = json.loads(line)
                answer = self._answer(asked if isinstance(asked, dict) else {})
            except ValueError as error:
                answer = {"error": f"not JSON: {error}"}
            except sqlite3.Error as error:
                # The agent ends of it, and says so in its own log; who asked is to know it, too.
                answer = {
                    "error": f"the agent can't write to its state folder ({error}) and ends; runs "
                    "go on: look at its disk, start it again, and ask again"
                }
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except (OSError, TimeoutError):
            # Whoever asked has left.
            return
        finally:
            writer.close()


def ask_agent(folder: Path, command: dict[str, Any], timeout_s: float = 15.0) -> dict[str, Any]:
    """Send a command to the agent of a state folder and return its answer. Raises NoAgent."""
    try:
        with _reachable(folder) as path, socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(path)
            connection.sendall(json.dumps(command).encode() + b"\n")
            with connection.makefile("rb") as file:
                line = file.readline(1024 * 1024)
    except OSError as error:
        raise NoAgent(
            f"no agent runs with the state folder {folder} ({error.strerror or error}); start "
            "`sublet provide`, or name its folder with --state"
        ) from error
    answer = json.loads(line or b"{}")
    return answer if isinstance(answer, dict) else {}
