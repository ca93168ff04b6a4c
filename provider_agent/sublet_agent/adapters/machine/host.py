"""Facts about this machine: cores, memory, disk, and the class its results belong to.

Machines of one hardware class give byte-identical results on one image: for a CPU that is decided
by the widest vector instructions a library will pick, for a GPU by its model.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

_VECTORS = (  # the first that fits; sets as glibc's x86-64-v4, v3 and v2 have them
    ("avx512", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("avx2", {"avx2", "fma", "bmi2"}),
    ("sse42", {"sse4_2", "popcnt"}),
    ("sve", {"sve"}),
    ("neon", {"asimd"}),
)


@dataclass(frozen=True)
class HostFacts:
    """This machine, as far as an agent may use it."""

    cpu_name: str
    cpu_count: int
    memory_bytes: int
    memory_free_bytes: int
    disk_free_bytes: int
    hardware_class: str


def read_host(
    state_dir: Path,
    cpuinfo: Path = Path("/proc/cpuinfo"),
    meminfo: Path = Path("/proc/meminfo"),
) -> HostFacts:
    """Read the facts; the free disk is that of the agent's state folder. Raises OSError."""
    text = cpuinfo.read_text(errors="replace")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(limit)
        found = path.read_text().strip() if path.exists() else "max"
        memory = min(memory, int(found)) if found.isdigit() else memory
    return HostFacts(
        cpu_name=cpu_name(text),
        cpu_count=len(os.sched_getaffinity(0)),
        memory_bytes=memory,
        memory_free_bytes=min(memory, memory_free(meminfo.read_text(errors="replace"), memory)),
        disk_free_bytes=shutil.disk_usage(state_dir).free,
        hardware_class=cpu_class(platform.machine(), text),
    )


def memory_free(meminfo: str, otherwise_bytes: int) -> int:
    """Return from the text of /proc/meminfo what new programs can have without swapping."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo, re.MULTILINE)
    return int(found[1]) * 1024 if found else otherwise_bytes


def cpu_name(cpuinfo: str) -> str:
    """Return the model's name from the text of /proc/cpuinfo."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else "unknown CPU"


def cpu_class(machine: str, cpuinfo: str) -> str:
    """Return e.g. `cpu-x86_64-avx512` from the architecture and the text of /proc/cpuinfo."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    vector = next((name for name, needed in _VECTORS if needed <= flags), "base")
    return f"cpu-{machine}-{vector}"


def gpu_class(name: str, memory_bytes: int | None) -> str:
    """Return e.g. `nvidia-a100-80gb` from the driver's name of the GPU and its memory.

    The marketing name already carries form factor and size, so what it says is kept as it is.
    """
    plain = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    words = [w for w in plain.split("-") if w not in ("nvidia", "geforce", "graphics", "device")]
    if not any(re.fullmatch(r"\d+gb", word) for word in words) and memory_bytes:
        # The driver keeps a part for itself; round up to what is printed on the box.
        words.append(f"{-(-memory_bytes // 2**30)}gb")
    return "-".join(["nvidia", *words])[:64]
