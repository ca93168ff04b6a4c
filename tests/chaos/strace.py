"""strace's fault injection on one thread, or one process, that runs already."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CALLS = "fsync,fdatasync"
FAULTS = {"kill": "signal=KILL", "EIO": "error=EIO", "ENOSPC": "error=ENOSPC"}
"""By our name for it: what strace is told."""
ATTACH_LIMIT_S = 60.0
END_LIMIT_S = 60.0
_LINE = re.compile(
    r"(?P<thread>\d+)? *(?:(?P<name>fsync|fdatasync)\(\d+<(?P<path>[^>]*)>"
    r"|<\.\.\. (?P<resumed>fsync|fdatasync) resumed>)(?P<rest>.*)"
)


class StraceFailed(AssertionError):
    """strace did not attach or did not let go; the message holds what it said."""


@dataclass(frozen=True)
class Call:
    """One call that strace saw. `result`: what followed it, in strace's words."""

    name: str
    path: str
    result: str

    @property
    def met(self) -> bool:
        """Whether the fault hit this call: an error, or no return at all."""
        return "(INJECTED)" in self.result or self.result.endswith("= ?")


class Strace:
    """strace on a thread (`whole`: on all threads of a process), with a fault for what it calls.

    The threads of a process are followed as they come; a child process is let go when it executes
    its own program, so that Ray's processes and the runs never count.
    """

    def __init__(
        self,
        pid: int,
        fault: str,
        out: Path,
        *,
        first: int = 1,
        onwards: bool = False,
        whole: bool = False,
        also: Sequence[int] = (),
        calls: str = CALLS,
    ) -> None:
        """Attach. `first`: which call of each thread is met; `onwards`: and all that follow;
        `also`: further threads; `calls`: which are met, each counted for itself.

        Raises StraceFailed. ProcessLookupError: there is no such thread any more.
        """
        when = f"when={first}{'+' if onwards else ''}"
        self._out = out
        self._errors = out.with_suffix(".err")
        attach = [word for one in (pid, *also) for word in ("-p", str(one))]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [
                    "strace",
                    *(("-f", "-b", "execve") if whole else ()),
                    *attach,
                    "-y",
                    "-e",
                    f"trace={calls}",
                    "-e",
                    "signal=none",
                    "-e",
                    f"inject={calls}:{FAULTS[fault]}:{when}",
                    "-o",
                    str(out),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        deadline = time.monotonic() + ATTACH_LIMIT_S
        while f"Process {pid} attached" not in (said := self._errors.read_text()):
            if self._process.poll() is not None:
                if "No such process" in said:
                    raise ProcessLookupError(said)
                raise StraceFailed(f"strace -p {pid}: {said}")
            if time.monotonic() > deadline:
                self._process.kill()
                raise StraceFailed(f"strace -p {pid} did not attach: {said}")
            time.sleep(0.002)

    @property
    def running(self) -> bool:
        """Whether it is still attached to anything."""
        return self._process.poll() is None

    def calls(self) -> list[Call]:
        """Return what was called so far, in order."""
        found: list[Call] = []
        begun: dict[str, tuple[str, str]] = {}
        for line in self._out.read_text().splitlines():
            seen = _LINE.match(line)
            if not seen:
                continue
            thread = seen["thread"] or ""
            name, path = begun.pop(thread) if seen["resumed"] else (seen["name"], seen["path"])
            if seen["rest"].endswith("<unfinished ...>"):
                begun[thread] = name, path
            else:
                found.append(Call(name, path, seen["rest"].strip()))
        return found

    def met(self) -> list[Call]:
        """Return the calls that met the fault."""
        return [call for call in self.calls() if call.met]

    def cut_off(self) -> bool:
        """Whether it let go in the midst of a call, which may have failed of that."""
        return "<detached ...>" in self._out.read_text()

    def let_go(self) -> None:
        """Detach; the process goes on. Raises StraceFailed."""
        if self.running:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            raise StraceFailed("strace did not let go") from error


def missing() -> str | None:
    """Say why strace can't be used here, or None where it can."""
    if shutil.which("strace") is None:
        return "no strace: apt-get install strace"
    child = subprocess.Popen(["sleep", "600"])
    try:
        with tempfile.TemporaryDirectory() as folder:
            Strace(child.pid, "EIO", Path(folder) / "out").let_go()
    except StraceFailed as error:
        return f"strace can't attach to a process here: {error}"
    finally:
        child.kill()
        child.wait()
    return None
