"""What of a job's content is kept, until when, and what could not be carried: in lines."""

import time
from collections.abc import Iterable, Sequence

from sublet.terminal.text import safe
from sublet_contracts.amounts import format_bytes, format_duration
from sublet_contracts.api import CheckpointView, JobView
from sublet_contracts.outputs_tree import left_out_text
from sublet_contracts.states import CheckpointState
from sublet_contracts.tree import LeftOut, WhyLeftOut

_DAY_MS = 86_400_000
_FIXES = {
    WhyLeftOut.TOO_BIG: "a larger --disk brings more",
    WhyLeftOut.NO_TIME: "a longer --stop-grace gives more",
    WhyLeftOut.TOO_MANY: "pack many small files into one",
}


def days_left(until_ms: int, now_ms: int) -> int:
    """Return how many whole days of keeping are left, 0 at the least."""
    return max(0, until_ms - now_ms) // _DAY_MS


def kept_lines(view: JobView, checkpoints: Iterable[CheckpointView], now_ms: int) -> list[str]:
    """Return what is kept, a line each, and in the last one how long; none where nothing is."""
    durable = CheckpointState.DURABLE
    kept = [c for c in checkpoints if c.state is durable and c.kept]
    parts = []
    for kind, says in (("outputs", "outputs"), ("partial-outputs", "partial outputs")):
        found = [c for c in kept if c.kind == kind]
        parts += [f"{says} ({format_bytes(found[0].total_bytes)})"] if found else []
    steps = sorted({c.step for c in kept if c.kind == "checkpoint"})
    if steps:
        one = "checkpoint of step" if len(steps) == 1 else "checkpoints of steps"
        parts.append(f"{one} {', '.join(map(str, steps))}")
    return [*parts, until_text(view.kept_until_ms, now_ms)] if parts else []


def until_text(until_ms: int | None, now_ms: int) -> str:
    """Return until when something is kept."""
    if until_ms is None:
        return "until newer ones come, or some days after the job's end"
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(until_ms / 1000))
    days = days_left(until_ms, now_ms)
    if days >= 2:
        return f"until {date}, {days} days left"
    if until_ms <= now_ms:
        return f"until {date}, which is over"
    return f"until {date}, {format_duration(until_ms - now_ms)} left"


def left_out_lines(left_out: Sequence[LeftOut], total: int, most: int = 10) -> list[str]:
    """Return what could not be carried, and for each kind of reason what would change that."""
    lines = [f"  {safe(left_out_text(entry))}" for entry in left_out[:most]]
    if total > len(lines):
        lines.append(f"  and {total - len(lines)} more")
    fixes = {_FIXES[entry.why]: None for entry in left_out if entry.why in _FIXES}
    return [*lines, *(f"  {fix}" for fix in fixes)]
