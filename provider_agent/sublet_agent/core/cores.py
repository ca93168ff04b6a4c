"""Which cores a run gets, so that what it takes for their number is true. Pure.

A quota alone limits time: programs still count every core of the machine, and start as many
threads, which then wait for each other. So a run is kept to as many cores as its quota has, rounded
up: `nproc` and `os.sched_getaffinity` tell them. Those are taken that the fewest other runs have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def cores_for(
    cpu_millis: int, machine: Sequence[int], others: Iterable[Sequence[int]]
) -> tuple[int, ...]:
    """Return the cores for a run of so many thousandths of a core; none: it may use all.

    `machine`: the cores that there are; `others`: those of each other run.
    """
    count = -(-cpu_millis // 1000)
    if count >= len(machine):
        return ()
    taken = Counter(core for run in others for core in run)
    return tuple(sorted(sorted(machine, key=lambda core: (taken[core], core))[:count]))


def to_text(cores: Iterable[int]) -> str:
    """Write cores as the engine reads them."""
    return ",".join(map(str, cores))


def from_text(text: str) -> tuple[int, ...]:
    """Read what `to_text` wrote; () where it is something else."""
    parts = text.split(",") if text else []
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()
