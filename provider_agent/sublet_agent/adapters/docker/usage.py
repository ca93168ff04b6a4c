"""What a container uses of the machine, as the engine's counters tell it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sublet_agent.core.runner_port import Measure

_DROPPABLE = ("total_inactive_file", "inactive_file")
"""File cache that goes when memory is needed: of cgroups v1, of v2."""


def ask(api: Any, container: str, at_ms: int) -> Measure | None:
    """Ask for one set of counters, without the engine's own wait for a second one."""
    url = api._url("/containers/{0}/stats", container)
    stats = api._result(api._get(url, params={"stream": 0, "one-shot": 1}), True)
    return measure_of(stats, at_ms)


def measure_of(stats: object, at_ms: int) -> Measure | None:
    """Return what the engine's answer says; None of a container that doesn't run: it has no
    counters."""
    memory = _part(stats, "memory_stats")
    used = _whole(memory, "usage")
    if used is None:
        return None
    details = _part(memory, "stats")
    cache = next((n for name in _DROPPABLE if (n := _whole(details, name)) is not None), 0)
    cpu_ns = _whole(_part(_part(stats, "cpu_stats"), "cpu_usage"), "total_usage")
    return Measure(at_ms, cpu_ns=cpu_ns, memory_bytes=max(0, used - cache))


def _part(value: object, name: str) -> Mapping[str, Any]:
    found = value.get(name) if isinstance(value, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _whole(value: Mapping[str, Any], name: str) -> int | None:
    found = value.get(name)
    return found if type(found) is int and found >= 0 else None
