"""Where code that goes along with a job comes from: its commit, and what was changed since.

Two small files stand beside the code, so that they are part of what the signed job names by its
digest, and the job can read them too:

    .sublet/code.json           {"commit": ..., "changed": [...], "diff": ...}
    .sublet/uncommitted.diff    what was changed since the commit, of the files that go along

Without git, or outside of a repository, `commit` is null and nothing is compared.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = ".sublet"
ORIGIN = f"{FOLDER}/code.json"
DIFF = f"{FOLDER}/uncommitted.diff"
MAX_ORIGIN_BYTES = 256 * 1024
MAX_DIFF_BYTES = 1024 * 1024
MAX_CHANGED = 1_000
_GIT_S = 20.0
_ENV = {"GIT_OPTIONAL_LOCKS": "0", "GIT_LITERAL_PATHSPECS": "1", "LC_ALL": "C"}
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class CodeOrigin:
    """What is known of where a folder of code comes from."""

    commit: str | None
    changed: tuple[str, ...] = ()
    """MAX_CHANGED at most of the files that aren't as in the commit: changed, new, or gone"""
    changed_total: int = 0
    diff: str = ""
    """its file; "": nothing was changed, or too much to be written down"""

    def line(self) -> str:
        """Say it in words."""
        if self.commit is None:
            return "in no git repository: which commit it is isn't recorded"
        count = self.changed_total
        since = "as committed"
        if count:
            since = "1 file changed since" if count == 1 else f"{count:,} files changed since"
        return f"commit {self.commit[:12]}, {since}"

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode() + b"\n"


def read_origin(data: bytes) -> CodeOrigin:
    """Return what such a file says; who reads it need not have written it. Raises ValueError."""
    if len(data) > MAX_ORIGIN_BYTES:
        raise ValueError(f"{ORIGIN} has more than {MAX_ORIGIN_BYTES} bytes")
    try:
        said = json.loads(data)
        commit, changed = said["commit"], said["changed"]
        total, diff = said["changed_total"], said["diff"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{ORIGIN} can't be read") from error
    right = (
        (commit is None or (isinstance(commit, str) and _COMMIT.fullmatch(commit)))
        and isinstance(changed, list)
        and all(isinstance(path, str) for path in changed)
        and isinstance(total, int)
        and 0 <= total <= 2**53
        and diff in ("", DIFF)
    )
    if not right:
        raise ValueError(f"{ORIGIN} can't be read")
    return CodeOrigin(commit, tuple(changed), total, diff)


def find_origin(root: Path, paths: Sequence[str]) -> tuple[CodeOrigin, bytes]:
    """Return where the files `paths` of a folder come from, and what was changed in them since."""
    commit = _git(root, "rev-parse", "--verify", "HEAD").decode(errors="replace").strip()
    if not _COMMIT.fullmatch(commit):
        return CodeOrigin(None), b""
    # What stays home stays out of the diff as well: it may be a secret.
    going = set(paths)
    told = _git(root, "diff", "--name-only", "-z", "--relative", "HEAD", "--", ".")
    new = _git(root, "ls-files", "--others", "-z", "--", ".")
    listed = [os.fsdecode(name) for name in (told + new).split(b"\0") if name]
    changed = sorted(name for name in set(listed) if name in going or not (root / name).exists())
    diff = b""
    if changed:
        tracked = [name for name in changed if name.encode() not in new.split(b"\0")]
        diff = _diff(root, tracked) if 0 < len(tracked) <= MAX_CHANGED else b""
    origin = CodeOrigin(commit, tuple(changed[:MAX_CHANGED]), len(changed), DIFF if diff else "")
    return origin, diff


def _diff(root: Path, paths: Sequence[str]) -> bytes:
    """Return the changes of these files; nothing where that is too much."""
    found = _git(
        root, "diff", "--relative", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD", "--",
        *paths,
    )  # fmt: skip
    return found if len(found) <= MAX_DIFF_BYTES else b""


def _git(root: Path, *arguments: str) -> bytes:
    """Return what git says; nothing where there is no git, no repository, or no answer in time."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_S,
            check=True,
            env={**os.environ, **_ENV},
        )
    except (OSError, subprocess.SubprocessError):
        return b""
    return done.stdout
