"""Asks the processes that read what jobs wrote (reader.py): bounded, and never waited for long.

Two of them serve all runs: one looks, five times a second and run; one walks through whole folders,
which takes longer. Who gives no answer in time is killed, and the next question starts another. A
job is told apart from a machine that is busy by what the answer cost: processor time is the job's
doing, waiting is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from sublet_agent.adapters.workspace.folder_snapshots import NamedFolder, open_named
from sublet_agent.adapters.workspace.folder_watch import Watched, Wish
from sublet_agent.adapters.workspace.reader import LENGTH, Look, Progress
from sublet_contracts.checkpoint_layouts import MAX_RECORD_BYTES, Snapshot, read_record

START_S = 30.0
ANSWER_S = {"look": 5.0, "walk": 60.0}
_ANSWER_BYTES = {"look": 256 * 1024, "walk": 2 * MAX_RECORD_BYTES}
_MODULE = "sublet_agent.adapters.workspace.reader"
_AT_HAND = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
Lane = Literal["look", "walk"]
T = TypeVar("T")


class FolderRefused(Exception):
    """The job has put more into its folders than anybody is to read."""


class FolderBusy(Exception):
    """There was no answer this time: the machine is busy, or its disk is."""


class ReaderBroken(Exception):
    """The reader came upon what nobody had thought of."""


class FolderReader:
    """Reads the folders of all runs. Used from the event loop's thread."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, _Reader] = {"look": _Reader("look"), "walk": _Reader("walk")}

    async def look(self, checkpoint: Path) -> Look:
        """Look into a run's checkpoint folder. Raises FolderRefused, FolderBusy."""
        with _at_hand(checkpoint) as folders:
            if not folders:
                return Look()
            answer = await self._lanes["look"].ask({"do": "look"}, folders)
            steps, by_protocol, progress, restored = answer
            word = restored if isinstance(restored, bool) else None
            return Look(tuple(map(int, steps)), bool(by_protocol), _progress(progress), word)

    async def usage(self, checkpoint: Path, others: Sequence[Path], stop_at_bytes: int) -> int:
        """Measure what the job has in out/ and in its other folders, up to that bound.

        Raises FolderRefused, FolderBusy.
        """
        with _at_hand(checkpoint, *others) as folders:
            if not folders:
                return 0
            question = {"do": "usage", "stop_at_bytes": stop_at_bytes}
            return int(await self._lanes["walk"].ask(question, folders))

    async def saved(self, tops: Sequence[Path], since_ns: int) -> tuple[int, str] | None:
        """Return which file a script seems to save its state to (`newest_saved`): which of these
        folders, which must be there, and the path in it. Raises FolderRefused, FolderBusy."""
        question = {"do": "saved", "since_ns": since_ns}
        with _at_hand(*tops) as folders:
            if len(folders) != len(tops):
                return None
            answer = await self._lanes["walk"].ask(question, folders)
        return None if answer is None else (int(answer[0]), str(answer[1]))

    async def search(
        self,
        run: str,
        outputs: Path,
        *,
        after_step: int,
        last_mtime_ms: int,
        quiet_ms: int,
        since_ms: int,
    ) -> Snapshot | None:
        """Search the outputs folder for a newer checkpoint (`OutputsSearch.newest`).

        Raises FolderRefused, FolderBusy.
        """
        question = {
            "do": "search",
            "run": run,
            "after_step": after_step,
            "last_mtime_ms": last_mtime_ms,
            "quiet_ms": quiet_ms,
            "since_ms": since_ms,
        }
        with _at_hand(outputs) as folders:
            answer = await self._lanes["walk"].ask(question, folders) if folders else None
        if answer is None:
            return None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, read_record, str(answer).encode())

    async def watch(self, run: str, places: Sequence[NamedFolder], wish: Wish) -> Watched:
        """Look into the folders that a job named as its checkpoint (`FolderWatch.look`).

        Raises FolderRefused, FolderBusy.
        """
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(open_named(place, at_hand=True)) for place in places]
            folders = [folder for folder in opened if folder is not None]
            question = {
                "do": "watch",
                "run": run,
                "folders": len(places),
                "there": [number for number, folder in enumerate(opened) if folder is not None],
                "leave_out": [list(place.leave_out) for place in places],
                "waited_ms": wish.waited_ms,
                "interval_ms": wish.interval_ms,
                "since_ns": wish.since_ns,
                "begun_ns": wish.begun_ns,
                "ended": wish.ended,
            }
            answer = await self._lanes["walk"].ask(question, folders) if folders else None
        if answer is None:
            return Watched(state="same")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, Watched.model_validate_json, str(answer))

    def close(self) -> None:
        """End the processes."""
        for reader in self._lanes.values():
            reader.end()


class _Reader:
    """One process, and the line to it. One question at a time."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._turn = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._user: tuple[int, int] | None = None

    async def ask(self, question: dict[str, Any], folders: list[int]) -> Any:
        async with self._turn:
            user = _owner_of(folders[0])
            process = self._process
            if process is None or process.poll() is not None or user != self._user:
                process = await self._start(user)
            before_s = _cpu_s(process.pid)
            try:
                async with asyncio.timeout(ANSWER_S[self._lane]):
                    answer = await self._exchange(question, folders)
            except TimeoutError as error:
                used_s = _cpu_s(process.pid) - before_s
                self.end()
                if used_s > ANSWER_S[self._lane] / 2:
                    raise FolderRefused("it takes too long to read") from error
                raise FolderBusy("no answer in time") from error
            except (OSError, EOFError, ValueError) as error:
                # It was killed: by the kernel for its time, or by whom we don't know.
                code = await _reaped(process)
                self.end()
                if code == -signal.SIGXCPU:
                    raise FolderRefused("it takes too long to read") from error
                raise FolderBusy(f"the reader ended ({code})") from error
            except BaseException:
                # Its answer would be taken for that to the next question.
                self.end()
                raise
        if "refused" in answer:
            raise FolderRefused(str(answer["refused"]))
        if "failed" in answer:
            raise FolderBusy(str(answer["failed"]))
        if "error" in answer:
            raise ReaderBroken(str(answer["error"]))
        return answer["answer"]

    async def _exchange(self, question: dict[str, Any], folders: list[int]) -> dict[str, Any]:
        assert self._line is not None
        data = json.dumps(question).encode()
        # Small, and the line is empty: this doesn't wait.
        socket.send_fds(self._line, [LENGTH.pack(len(data)) + data], folders)
        return await self._receive(self._line)

    async def _receive(self, line: socket.socket) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        (size,) = LENGTH.unpack(await _exactly(loop, line, LENGTH.size))
        if size > _ANSWER_BYTES[self._lane]:
            raise ValueError(f"an answer of {size} bytes")
        answer = json.loads(await _exactly(loop, line, size))
        if not isinstance(answer, dict):
            raise ValueError("an answer of another kind")
        return answer

    async def _start(self, user: tuple[int, int]) -> subprocess.Popen[bytes]:
        self.end()
        ours, its = socket.socketpair()
        try:
            ours.setblocking(False)
            arguments = [str(its.fileno()), self._lane, *map(str, user)]
            spawn = _spawner([sys.executable, "-I", "-B", "-m", _MODULE, *arguments], its.fileno())
            process = await asyncio.get_running_loop().run_in_executor(None, spawn)
        except BaseException:
            ours.close()
            raise
        finally:
            its.close()
        self._process, self._line, self._user = process, ours, user
        try:
            async with asyncio.timeout(START_S):
                await self._receive(ours)
        except (TimeoutError, OSError, EOFError, ValueError) as error:
            self.end()
            raise FolderBusy(f"the reader does not start: {type(error).__name__}") from error
        except BaseException:
            self.end()
            raise
        return process

    def end(self) -> None:
        """Kill it. It isn't waited for: what it reads may be a disk that doesn't answer."""
        process, line = self._process, self._line
        self._process = self._line = self._user = None
        if line is not None:
            line.close()
        if process is not None:
            process.kill()
            _ended.append(process)
        # Those that are gone are let go of; a zombie is no process that still reads.
        _ended[:] = [each for each in _ended if each.poll() is None]


_ended: list[subprocess.Popen[bytes]] = []
"""killed, and perhaps not gone yet"""


def _spawner(command: list[str], line: int) -> Callable[[], subprocess.Popen[bytes]]:
    def spawn() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            cwd="/",
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(line,),
            start_new_session=True,  # Ctrl-C at a terminal is for the agent
        )

    return spawn


@contextlib.contextmanager
def _at_hand(*paths: Path) -> Any:
    """Yield descriptors of these folders, of those that are there; none where the first isn't."""
    folders: list[int] = []
    try:
        for path in paths:
            try:
                folders.append(os.open(path, _AT_HAND))
            except OSError:
                if not folders:
                    break  # whatever the job has put in its place is its own loss
        yield folders
    finally:
        for folder in folders:
            os.close(folder)


def _owner_of(folder: int) -> tuple[int, int]:
    """Return as whom to read: whom the folder belongs to, where that is ours to become."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    info = os.fstat(folder)
    return info.st_uid, info.st_gid


def _progress(said: Any) -> Progress | None:
    if said is None:
        return None
    step, total, metrics = said
    return int(step), int(total), {str(name): float(value) for name, value in metrics.items()}


def _cpu_s(pid: int) -> float:
    """Return how much processor time a process has had; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _reaped(process: subprocess.Popen[bytes]) -> int | None:
    """Return the status of a process whose line is closed; None: it doesn't end."""
    for _ in range(100):
        if (code := process.poll()) is not None:
            return code
        await asyncio.sleep(0.01)
    return None


async def _exactly(loop: asyncio.AbstractEventLoop, line: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await loop.sock_recv(line, min(size - len(data), 1 << 18))
        if not piece:
            raise EOFError("the reader is gone")
        data += piece
    return bytes(data)
