"""Why the engine could not start a container: whose matter that is, and our words for it. Pure.

The engine's own text names paths, versions and addresses of the owner's machine, and parts of it
are the renter's to choose. So renters read our words only; the text itself is for the owner.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class StartError:
    """What an engine's error at the start means. `exit_code`: what a shell would say of a command
    that can't be run; then it is the job's own, and would be the same on every machine."""

    says: str
    exit_code: int | None = None


# First match counts. The job's own come before what is looked for anywhere in the text: an error
# that quotes a path or a word of the job's must not become the machine's by it.
_RULES: tuple[tuple[str, StartError], ...] = (
    (
        r"^no command specified",
        StartError("the image has no command of its own, and the job gives none", 127),
    ),
    (
        r"\bexec:? .*: (executable file not found|no such file or directory)",
        StartError("the command, or the program its first line names, is not in the image", 127),
    ),
    (
        r"\bexec:? .*: (permission denied|is a directory)",
        StartError("the command may not be executed by the job's user", 126),
    ),
    (
        r"chdir to cwd .*(permission denied|not a directory)|mkdir .*cwd",
        StartError("the job's user may not enter the image's working folder", 126),
    ),
    (
        r"error mounting .*not a directory|mount a directory onto a file"
        r"|^cannot mkdir: .* is not a directory",
        StartError(
            "an input, the outputs, the working folder or /tmp is no folder in the image", 126
        ),
    ),
    (
        r"error mounting .*cannot be mounted because it is (not of type proc|inside /proc)",
        StartError("a folder or file that each run gets is a link into /proc in the image", 126),
    ),
    (
        r"^unable to find user",
        StartError("the image's own list of users can't be read", 126),
    ),
    (
        r"exec format error",
        StartError("the image is for another kind of processor than this machine's"),
    ),
    (
        r"could not select device driver|unresolvable cdi device|cdi device injection"
        r"|nvidia-container|unknown or invalid runtime name|libnvidia",
        StartError("this machine's engine can't hand out its GPU: look at its container toolkit"),
    ),
    (r"cgroup", StartError("this machine can't limit the run's resources")),
    (r"seccomp|apparmor|selinux", StartError("this machine can't confine the run")),
    (
        r"no space left on device|disk quota exceeded",
        StartError("this machine's disk is full (no space left on device)"),
    ),
    (
        r"too many open files|cannot allocate memory|resource temporarily unavailable|fork/exec",
        StartError("this machine has no more memory, processes or files to give"),
    ),
    (r"mount|bind source path", StartError("this machine can't hand the run its folders")),
    (r"network|endpoint|veth|iptables", StartError("this machine can't set up the run's network")),
)
_FLAGS = re.IGNORECASE | re.DOTALL
_PATTERNS = tuple((re.compile(pattern, _FLAGS), error) for pattern, error in _RULES)
_OTHER = StartError("this machine's container engine could not start the run")


def judge_start(text: str) -> StartError:
    """Return what an engine's text on a failed start means."""
    for pattern, error in _PATTERNS:
        if pattern.search(text[:4096]):
            return error
    return _OTHER
