"""A run's layout on disk, so that an agent that was started anew knows where its folders are.

A job on the process runner can write there, so it is read as a stranger's.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sublet_agent.core.layout import Layout, plain_path

LAYOUT = "layout.json"
_MAX_BYTES = 64 * 1024
_ADAPTER = TypeAdapter(Layout)
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def write_layout(path: Path, layout: Layout) -> None:
    """Write it, whole or not at all. Raises OSError."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(_ADAPTER.dump_json(layout))
    os.rename(aside, path)


def read_layout(path: Path) -> Layout | None:
    """Return it; None: there is none that makes sense."""
    try:
        file = os.open(path, _FLAGS)
    except OSError:
        return None
    try:
        data = os.pread(file, _MAX_BYTES + 1, 0)
    except OSError:
        return None
    finally:
        os.close(file)
    if len(data) > _MAX_BYTES:
        return None
    try:
        found = _ADAPTER.validate_json(data)
    except ValidationError:
        return None
    for own in (found.work_path, found.home_path):
        if not plain_path(own) or plain_path(own) != own or own == "/":
            return None
    return found
