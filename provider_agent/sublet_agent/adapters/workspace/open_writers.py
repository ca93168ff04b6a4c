"""Says whether anybody has a file open for writing, by asking the kernel for a lease on it.

A read lease (fcntl's F_SETLEASE) is refused as long as a writer has the file open or mapped. It is
given back at once. It is for the file's owner to ask, so this is for the process that reads what
jobs wrote as the job's own user (reader.py).
"""

import contextlib
import errno
import fcntl
import signal


def ignore_breaks() -> None:
    """Let the signal pass by which the kernel tells that somebody wants to write meanwhile: its
    default is to end the process."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)


def has_writer(file: int) -> bool | None:
    """Say whether an open file is open for writing anywhere; None: that can't be known here (it is
    another user's, or its filesystem gives no leases)."""
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    with contextlib.suppress(OSError):
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
