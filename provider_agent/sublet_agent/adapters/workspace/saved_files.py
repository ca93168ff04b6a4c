"""Which file a script seems to save its state to: for the renter of a job that saves nothing that
could be resumed, who is told which folder to name.

A guess, and only words come of it: of the files that were changed since the run began, one whose
name ends as saved states do, else the largest. It runs in the process that reads for the agent
(reader.py); no link is followed, and listing ends at a bound.
"""

import contextlib
import os
import stat
from collections.abc import Sequence

from sublet_agent.adapters.workspace.outputs_search import entries_below
from sublet_contracts.checkpoint_folders import is_log

MAX_LISTED = 20_000
_MAX_DEPTH = 12
_MAX_PATH = 160
_STATES = (
    *(".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".safetensors", ".bin"),
    *(".h5", ".hdf5", ".keras", ".joblib", ".msgpack", ".eqx", ".orbax"),
)


def newest_saved(tops: Sequence[int], since_ns: int) -> list[int | str] | None:
    """Return the number of the folder and the path in it of the file that a script seems to save
    its state to; None: it has changed none since then."""
    best: tuple[bool, int, int, str] | None = None
    left = MAX_LISTED
    for number, top in enumerate(tops):
        if top < 0:
            continue  # that folder isn't there
        with contextlib.closing(entries_below(top, _MAX_DEPTH)) as below:
            for _, path, entry in below:
                left -= 1
                if left < 0:
                    break
                if len(path) > _MAX_PATH or not path.isprintable():
                    continue
                if entry.is_dir(follow_symlinks=False):
                    continue
                try:
                    info = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if not _counts(path, info, since_ns):
                    continue
                rank = (entry.name.lower().endswith(_STATES), info.st_size, -number, path)
                best = rank if best is None else max(best, rank)
    return None if best is None else [-best[2], best[3]]


def _counts(path: str, info: os.stat_result, since_ns: int) -> bool:
    return (
        stat.S_ISREG(info.st_mode)
        and info.st_size > 0
        and info.st_mtime_ns >= since_ns
        and not is_log(path)
    )
