"""What this machine was doing while it measured: a number without its load says little."""

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Load:
    """How busy all cores were over a while, ourselves and everybody else together."""

    busy: float
    """0 to 1, of all cores."""
    seconds: float

    def __str__(self) -> str:
        return f"{self.busy:.0%} of {os.cpu_count()} cores busy over {self.seconds:.0f} s"


class LoadMeter:
    """Measures from its making on."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy, self._all = _jiffies()

    def load(self) -> Load:
        """Return the load since the beginning."""
        busy, everything = _jiffies()
        return Load(
            (busy - self._busy) / max(1, everything - self._all), time.monotonic() - self._began
        )


def load_before(seconds: float = 2.0) -> Load:
    """Return the load of `seconds` in which we do nothing: what others are doing."""
    meter = LoadMeter()
    time.sleep(seconds)
    return meter.load()


def _jiffies() -> tuple[int, int]:
    """Return (busy, all) from the kernel's count since boot."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields)
    everything = user + nice + system + idle + iowait + irq + softirq + steal
    return everything - idle - iowait, everything
