"""Progress of uploads and downloads: bars with speed and what is left on a terminal; elsewhere one
line when something large has arrived."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sublet.terminal.text import clip, safe
from sublet.terminal.uploads import short_size
from sublet.transfers import OnBytes
from sublet_contracts.amounts import format_duration

_WORTH_SHOWING_BYTES = 4 * 1024 * 1024
_NAME_COLUMNS = 24
_BAR_COLUMNS = 20


@contextmanager
def announcing(moved: str) -> Iterator[Callable[[str, int], OnBytes]]:
    """Give an `announce` for Client.run and Job.download that shows on stderr how far it is.
    `moved`: what has become of what has arrived: "sent", "fetched"."""
    if not sys.stderr.isatty():
        yield lambda what, total_bytes: _told_at_the_end(moved, what, total_bytes)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=_BAR_COLUMNS),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:

        def announce(what: str, total_bytes: int) -> OnBytes:
            if total_bytes < _WORTH_SHOWING_BYTES:
                return _nothing
            task = progress.add_task(clip(safe(what), _NAME_COLUMNS), total=total_bytes)
            return lambda count_bytes: progress.advance(task, count_bytes)

        yield announce


def _told_at_the_end(moved: str, what: str, total_bytes: int) -> OnBytes:
    """Say on stderr when all of it has arrived; nothing of what is small, or never does."""
    if total_bytes < _WORTH_SHOWING_BYTES:
        return _nothing
    lock = threading.Lock()
    began_s, left_bytes = time.monotonic(), total_bytes

    def on_bytes(count_bytes: int) -> None:
        nonlocal left_bytes
        with lock:
            left_bytes -= count_bytes
            done = left_bytes <= 0 < left_bytes + count_bytes
        if done:
            took_ms = max(1, int((time.monotonic() - began_s) * 1000))
            speed = short_size(total_bytes * 1000 // took_ms)
            took = f"{short_size(total_bytes)} in {format_duration(took_ms)}, {speed}/s"
            print(f"{moved} {safe(what)}: {took}", file=sys.stderr, flush=True)

    return on_bytes


def _nothing(count_bytes: int) -> None:
    return
