"""Asks for the GPUs in a process of its own: a call to the driver may hang for ever on a lost GPU,
and such a call can't even be killed. The agent gives the helper up then, and goes on.

One line in, one JSON line out. The helper ends with its stdin, which is the agent's end, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import time
from typing import Any

from sublet_agent.adapters.machine.nvml import (
    DOUBTFUL_MS,
    Fault,
    Gpu,
    GpuProbe,
    Reader,
    Unreadable,
)

FIRST_LIMIT_S = 30.0
"""for a helper's first answer: to set the driver up takes a second or two for each GPU"""
_MOST_BYTES = 1024 * 1024


class GpuHelper:
    """The agent's end. Used by one thread at a time; every call returns within its limit."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._given_up: list[subprocess.Popen[bytes]] = []
        self._asked_s: float | None = None
        self._has_answered = False
        self._read = b""

    def look(self, limit_s: float) -> GpuProbe:
        """Say what there is now; without an answer in time nothing is there, and why."""
        deadline_s = time.monotonic() + limit_s
        while True:
            late = self._asked_s is not None
            try:
                answer = self._answer(deadline_s)
            except OSError as error:
                return self._silent(f"the helper that asks the driver has ended ({error})")
            if answer is None:
                self._give_up_if_due(limit_s)
                return _no_answer(f"the driver gives no answer within {limit_s:g} s")
            if late:
                continue  # that was the answer to an earlier question
            try:
                found = _from_json(json.loads(answer))
            except (ValueError, TypeError, KeyError) as error:
                return self._silent(f"the helper that asks the driver said something odd: {error}")
            if found.trouble:
                self.close()  # A library that was upgraded meanwhile is seen by a new process only.
            return found

    def close(self) -> None:
        """End the helper. It is not waited for: it may hang."""
        process, self._process = self._process, None
        self._asked_s, self._has_answered, self._read = None, False, b""
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        process.kill()
        self._given_up.append(process)
        self._given_up = [one for one in self._given_up if one.poll() is None]

    def _silent(self, says: str) -> GpuProbe:
        self.close()
        return _no_answer(says)

    def _give_up_if_due(self, limit_s: float) -> None:
        patience_s = limit_s if self._has_answered else FIRST_LIMIT_S
        if self._asked_s is not None and time.monotonic() - self._asked_s >= patience_s:
            self.close()

    def _answer(self, deadline_s: float) -> bytes | None:
        """Ask, unless that was done; return the line that comes, None: none came in time."""
        if self._process is None:
            # Where many hang, no more are added: each holds a process that can't be ended.
            self._given_up = [one for one in self._given_up if one.poll() is None]
            if len(self._given_up) >= 4:
                raise OSError("four of them hang")
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sublet_agent.adapters.machine.gpu_helper"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._asked_s is None:
            self._process.stdin.write(b"\n")
            self._asked_s = time.monotonic()
        reader = self._process.stdout.fileno()
        while b"\n" not in self._read:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([reader], [], [], left_s)[0]:
                return None
            data = os.read(reader, 65536)
            if not data or len(self._read) > _MOST_BYTES:
                raise OSError("without an answer")
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        self._asked_s, self._has_answered = None, True
        return line


def _no_answer(says: str) -> GpuProbe:
    return GpuProbe((), (f"no NVIDIA GPU: {says}",), trouble=says, certain_after_ms=DOUBTFUL_MS)


def _from_json(said: dict[str, Any]) -> GpuProbe:
    parts = {"gpus": Gpu, "unreadable": Unreadable, "faults": Fault}
    lists = {name: tuple(kind(**one) for one in said.pop(name)) for name, kind in parts.items()}
    return GpuProbe(**said | {"reasons": tuple(said["reasons"])} | lists)


def main() -> None:
    """Be the helper."""
    reader = Reader()
    while sys.stdin.buffer.readline():
        print(json.dumps(dataclasses.asdict(reader.look())), flush=True)


if __name__ == "__main__":
    main()
