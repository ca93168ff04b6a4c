"""Text for a terminal: colours, tables, and what a stranger wrote made harmless. Standard library
only. How figures are written is in sublet_contracts/amounts.py."""

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
    "durable": "green",
    "verifying": "cyan",
    "rejected": "red",
    "quarantined": "red",
    "pruned": "dim",
}


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
    """Return a job's or checkpoint's state in its colour."""
    return paint(value, _STATE_COLOURS.get(value, ""))


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    colour: int | None = None,
) -> str:
    """Return rows as aligned columns below a dim head; `right`: columns that are flush right.

    `colour` is the column that holds states.
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
