"""How a pull gets on, by the engine's events: whether it stands still, and how big it is. Pure.

A pull is still when for `stall_ms` no byte of any layer came. The engine reports a layer once per
cent or per 512 KiB, whichever is less; so a registry that sends less than that in the time counts
as still as well. Once everything is here the engine only unpacks: that is this machine's own work,
and has WORK_FACTOR times as long.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WORK_FACTOR = 10
MAX_LAYERS = 1_000
"""An engine takes 127; more are not kept count of, and not pulled either."""
_HERE = frozenset(
    {"Download complete", "Verifying Checksum", "Extracting", "Pull complete", "Already exists"}
)


@dataclass
class _Layer:
    total_bytes: int = 0
    downloaded_bytes: int = 0
    unpacked_bytes: int = 0
    status: str = ""
    is_here: bool = False


@dataclass
class PullProgress:
    """One pull. Times in ms of a clock that never goes back."""

    stall_ms: int
    cap_bytes: int
    moved_ms: int
    error: str = ""
    """the engine's own word that it failed; untrusted text"""
    _layers: dict[str, _Layer] = field(default_factory=dict)

    def take(self, event: Mapping[str, Any], now_ms: int) -> None:
        """Take an event of the engine's."""
        if event.get("error"):
            self.error = str(event["error"])
            return
        name, status = event.get("id"), event.get("status")
        if not isinstance(name, str) or not isinstance(status, str) or len(name) > 64:
            return
        if name not in self._layers and len(self._layers) > MAX_LAYERS:
            return
        detail = event.get("progressDetail")
        current, total = _numbers(detail) if isinstance(detail, Mapping) else (0, 0)
        layer = self._layers.setdefault(name, _Layer())
        moved = False
        if status == "Downloading":
            layer.total_bytes = max(layer.total_bytes, total, current)
            moved = current > layer.downloaded_bytes
            layer.downloaded_bytes = max(layer.downloaded_bytes, current)
        elif status in _HERE:
            moved = status != layer.status or current > layer.unpacked_bytes
            layer.is_here = True
            if status == "Extracting":
                layer.unpacked_bytes = max(layer.unpacked_bytes, current)
        layer.status = status
        if moved:
            self.moved_ms = now_ms

    def is_still(self, now_ms: int) -> bool:
        """Whether nothing has come for too long."""
        limit_ms = self.stall_ms * (WORK_FACTOR if self._all_here else 1)
        return now_ms - self.moved_ms >= limit_ms

    @property
    def _all_here(self) -> bool:
        layers = [layer for layer in self._layers.values() if layer.status]
        counted = [layer for layer in layers if layer.is_here or layer.total_bytes]
        waiting = [layer for layer in layers if layer.status in ("Pulling fs layer", "Waiting")]
        return bool(counted) and not waiting and all(layer.is_here for layer in counted)

    @property
    def announced_bytes(self) -> int:
        """What the layers announced so far will have in all, packed."""
        return sum(layer.total_bytes for layer in self._layers.values())

    @property
    def is_too_big(self) -> bool:
        """Whether what was announced is more than one image may have."""
        return self.announced_bytes > self.cap_bytes or len(self._layers) > MAX_LAYERS

    @property
    def downloaded_bytes(self) -> int:
        """How much has come."""
        return sum(layer.downloaded_bytes for layer in self._layers.values())


def _numbers(detail: Mapping[str, Any]) -> tuple[int, int]:
    current, total = detail.get("current"), detail.get("total")
    return (
        current if isinstance(current, int) and current > 0 else 0,
        total if isinstance(total, int) and total > 0 else 0,
    )
