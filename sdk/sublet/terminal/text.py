"""How figures are written for people: credits, times, sizes, tables. Standard library only."""

import os
import sys
from collections.abc import Sequence
from typing import TextIO

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_STATE_COLOURS = {
    "running": "green",
    "succeeded": "green",
    "failed": "red",
    "recovering": "yellow",
    "paused": "yellow",
    "queued": "cyan",
    "starting": "cyan",
}


def credits(ucr: int) -> str:
    """Return micro-credits as credits, exactly, with at least two decimals."""
    sign = "-" if ucr < 0 else ""
    whole, part = divmod(abs(ucr), 1_000_000)
    decimals = f"{part:06d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole:,}.{decimals}"


def duration(ms: int) -> str:
    """Return a duration in its two largest units: '850 ms', '12 s', '3 m 20 s', '2 h 5 m'."""
    if ms < 1000:
        return f"{ms} ms"
    seconds = ms // 1000
    if seconds < 10:
        return f"{ms / 1000:.1f} s"
    for size, unit, below, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if seconds >= size:
            rest = seconds % size // below
            return f"{seconds // size} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{seconds} s"


def ago(then_ms: int, now_ms: int) -> str:
    """Return how long ago something was, in one unit: 'now', '40 s ago', '3 m ago', '2 d ago'."""
    seconds = (now_ms - then_ms) // 1000
    if seconds < 2:
        return "now"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def size(count_bytes: int) -> str:
    """Return a size: '512 B', '24 GB', '1.5 GB'."""
    value, units = float(count_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    figure = f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:.0f}"
    return f"{figure} {units[0]}"


def memory(count_bytes: int) -> str:
    """Return a device's memory, in the unit of its data sheet: '24 GiB'."""
    return f"{count_bytes / 2**30:.0f} GiB" if count_bytes >= 2**30 else size(count_bytes)


def clip(text: str, width: int) -> str:
    """Return `text` in at most `width` columns, an ellipsis at its end where it was longer."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def safe(text: str) -> str:
    """Return `text` without what could move a terminal's cursor or change its colours."""
    return "".join(c if c == "\t" or (c.isprintable()) else "�" for c in text)


def paint(text: str, style: str, stream: TextIO | None = None) -> str:
    """Return `text` in a colour or weight where `stream` (stdout) is a terminal that wants it."""
    target = stream or sys.stdout
    if not style or os.environ.get("NO_COLOR") or not target.isatty():
        return text
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m"


def state(value: str) -> str:
    """Return a job's state in its colour."""
    return paint(value, _STATE_COLOURS.get(value, ""))


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    colour: int | None = None,
) -> str:
    """Return rows as aligned columns below a dim head; `right`: columns that are flush right.

    `colour` is the column that holds job states.
    """
    widths = [max([len(head), *(len(row[i]) for row in rows)]) for i, head in enumerate(heads)]

    def line(cells: Sequence[str]) -> list[str]:
        return [
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i])
            for i, cell in enumerate(cells)
        ]

    lines = [paint("  ".join(line([head.upper() for head in heads])).rstrip(), "dim")]
    for row in rows:
        cells = line(row)
        if colour is not None:
            bare = row[colour]
            cells[colour] = cells[colour].replace(bare, state(bare), 1)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
