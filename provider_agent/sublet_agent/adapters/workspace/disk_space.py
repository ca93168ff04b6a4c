"""Room on this machine's disk: who may take it, and whose fault it is where there is none."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

from sublet_contracts.documents import Checkpoint, Job
from sublet_contracts.reasons import Reason

LEAST_FREE_BYTES = 16 * 1024 * 1024
"""what must stay free, so that the agent itself can go on writing"""


def make_room(
    folder: Path, job: Job, checkpoint: Checkpoint | None, let_go: Callable[[int], object]
) -> None:
    """Raise OSError (ENOSPC) where a job's inputs and checkpoint would fill this disk, even after
    `let_go` of so many bytes that are kept for nobody yet.

    A full one keeps the journal from being written, and with it every other run of this machine.
    """
    wanted = sum(item.total_bytes for item in job.inputs)
    wanted += checkpoint.total_bytes if checkpoint is not None else 0
    if not wanted:
        return
    short = wanted + LEAST_FREE_BYTES - shutil.disk_usage(folder).free
    if short > 0:
        let_go(short)
    free = shutil.disk_usage(folder).free
    if wanted + LEAST_FREE_BYTES > free:
        says = f"inputs and checkpoint have {wanted} bytes, {free} are free on this machine"
        raise OSError(errno.ENOSPC, says)


def fault_of(error: Exception, otherwise: Reason = Reason.START_FAILED) -> Reason:
    """Return why a preparation failed: for want of disk on this machine, or `otherwise`."""
    # The engine says it in words only.
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or "no space left on device" in str(error):
        return Reason.PROVIDER_DISK_FULL
    return otherwise
