"""What is kept of runs that the agent could not handle, so that the mistake can be found.

    quarantine/<lease>/error.txt     what went wrong, with the traceback
    quarantine/<lease>/record.json   what the agent knew of the run
    quarantine/<lease>/folder/       the run's folder, unless it is larger than KEPT_BYTES

Bounded in count and in bytes; the oldest is dropped first. Deleting it costs nothing but evidence.
"""

from __future__ import annotations

import os
from pathlib import Path

from sublet_agent.adapters.workspace import folders

KEPT_RUNS = 8
KEPT_BYTES = 128 * 1024 * 1024
"""of one run's folder: so eight of them hold a gigabyte at most"""
MAX_TEXT_BYTES = 64 * 1024


def keep(state: Path, lease_id: str, *, record: str, error: str) -> Path:
    """Put a run aside whose container is gone; return where it lies. Can be repeated.

    Raises OSError.
    """
    shelf = state / "quarantine"
    shelf.mkdir(mode=0o700, exist_ok=True)
    place = shelf / lease_id[:16]
    place.mkdir(mode=0o700, exist_ok=True)
    for name, text in (("record.json", record), ("error.txt", error)):
        data = text.encode(errors="backslashreplace")[:MAX_TEXT_BYTES]
        if data or not (place / name).exists():
            (place / name).write_bytes(data)
    folder = state / "runs" / lease_id[:16]
    if folder.is_dir() and not folder.is_symlink():
        if folders.usage([folder], KEPT_BYTES) > KEPT_BYTES:
            folders.delete(folder)
            (place / "folder-was-too-large").touch()
        else:
            folders.delete(place / "folder")
            os.rename(folder, place / "folder")
    _drop_oldest(shelf, place)
    return place


def _drop_oldest(shelf: Path, newest: Path) -> None:
    there = sorted(shelf.iterdir(), key=lambda path: (path == newest, path.lstat().st_mtime_ns))
    for path in there[:-KEPT_RUNS]:
        folders.delete(path)
