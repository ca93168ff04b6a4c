"""Progress of uploads and downloads: bars on a terminal, silence elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sublet.transfers import OnBytes

_WORTH_SHOWING_BYTES = 4 * 1024 * 1024


@contextmanager
def announcing() -> Iterator[Callable[[str, int], OnBytes]]:
    """Give an `announce` for Client.run and Job.download that draws bars on stderr's terminal."""
    if not sys.stderr.isatty():
        yield lambda what, total_bytes: _nothing
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
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:

        def announce(what: str, total_bytes: int) -> OnBytes:
            if total_bytes < _WORTH_SHOWING_BYTES:
                return _nothing
            task = progress.add_task(what, total=total_bytes)
            return lambda count_bytes: progress.advance(task, count_bytes)

        yield announce


def _nothing(count_bytes: int) -> None:
    return
