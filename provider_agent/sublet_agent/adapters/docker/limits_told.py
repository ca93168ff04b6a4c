"""Files that tell a container its limits: lxcfs, where the owner has installed it.

The kernel's own /proc/meminfo and /proc/cpuinfo tell the machine, in a container as well. lxcfs
serves them anew for each reader, by the limits of its cgroup.
"""

from __future__ import annotations

import os
from pathlib import Path

LXCFS = Path("/var/lib/lxcfs")
_FILES = (
    *("proc/cpuinfo", "proc/diskstats", "proc/loadavg", "proc/meminfo"),
    *("proc/stat", "proc/swaps", "proc/uptime", "sys/devices/system/cpu/online"),
)


def told_by(lxcfs: Path) -> tuple[tuple[str, Path], ...]:
    """Return (path in the container, file on this machine) of what lxcfs serves; nothing where it
    isn't there, or has died."""
    return tuple((f"/{name}", lxcfs / name) for name in _FILES if _answers(lxcfs / name))


def _answers(file: Path) -> bool:
    try:
        opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return bool(os.read(opened, 1))
    except OSError:
        return False
    finally:
        os.close(opened)
