"""A short name for a run's folder of temporary files.

A socket's path has at most 107 bytes, and Python's multiprocessing makes its sockets in TMPDIR
(/pymp-xxxxxxxx/listener-xxxxxxxx): where the agent's own folder lies deep, the workers of a
DataLoader wait for ever. The folder is then given to the job by a link in a folder of this user's
below the machine's own for temporary files, which nobody else may write.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path

MOST_BYTES = 64
"""Of a path that leaves room for the names of sockets below it."""


def short_name(owner: str, run_id: str, folder: Path) -> Path:
    """Return a name of a run's folder that is short enough, the folder's own if it is; and that as
    well where no shorter one can be made."""
    if len(os.fsencode(folder)) <= MOST_BYTES:
        return folder
    link = _link(owner, run_id)
    if len(os.fsencode(link)) > MOST_BYTES:
        return folder
    with contextlib.suppress(FileExistsError):
        link.parent.mkdir(mode=0o700)
    try:
        if not _is_ours(link.parent):
            return folder
        link.unlink(missing_ok=True)  # of a start that failed
        link.symlink_to(folder.absolute())
    except OSError:
        return folder
    return link


def forget(owner: str, run_id: str) -> None:
    """Delete the short name of a run's folder, if it has one."""
    link = _link(owner, run_id)
    try:
        if _is_ours(link.parent):
            link.unlink(missing_ok=True)
    except OSError:
        return  # there was none, or it isn't ours


def _link(owner: str, run_id: str) -> Path:
    name = hashlib.sha256(f"{owner} {run_id}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"sublet-{os.geteuid()}", name)


def _is_ours(folder: Path) -> bool:
    """Say whether it is a folder, no link to one, that nobody else can change. Raises OSError."""
    found = folder.lstat()
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return mine and not stat.S_IMODE(found.st_mode) & 0o022
