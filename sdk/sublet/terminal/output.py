"""A job's output on this side: finished lines as they are, and the lines that it is still writing
redrawn in their place.

On a terminal an unfinished line stands below all finished ones, clipped to the width, until its
next state or the finished line takes its place. A file or a pipe gets what the job itself wrote
there: a carriage return and the next state.
"""

import shutil
import sys
from typing import TextIO

from sublet.terminal.text import clip, safe
from sublet_contracts.api import JobLogLine

_WIPE = "\r\x1b[K"


class Output:
    """Where lines go: those of the job's stderr to `err`, the others to `out`."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._states: dict[str, str] = {}
        """stream -> its unfinished line, as it is to be shown"""
        self._drawn: TextIO | None = None
        """the terminal on whose last line a state stands"""

    def show(self, line: JobLogLine, stamp: str = "") -> None:
        """Show a line, finished or not; `stamp` comes before it."""
        to = self._err if line.stream == "stderr" else self._out
        before = self._states.pop(line.stream, None)
        if line.unfinished:
            if line.text:
                self._states[line.stream] = stamp + line.text
            if not to.isatty() and (line.text or before):
                to.write("\r" + self._states.get(line.stream, ""))
        else:
            self._wipe()
            again = "\r" if before is not None and not to.isatty() else ""
            # A terminal is protected from control sequences; a file gets what the job wrote.
            text = safe(line.text) if to.isatty() else line.text
            to.write(f"{again}{stamp}{text}\n")
        self._draw()
        to.flush()

    def note(self, text: str) -> None:
        """Write a line of our own to `err`."""
        self._wipe()
        print(text, file=self._err, flush=True)
        self._draw()

    def close(self) -> None:
        """Leave what is unfinished as it stands, and the cursor below it."""
        if self._drawn is not None:
            self._drawn.write("\n")
            self._drawn.flush()
        for stream in self._states:
            to = self._err if stream == "stderr" else self._out
            if not to.isatty():
                to.write("\n")
                to.flush()
        self._states.clear()
        self._drawn = None

    def _wipe(self) -> None:
        if self._drawn is not None:
            self._drawn.write(_WIPE)
            self._drawn.flush()
            self._drawn = None

    def _draw(self) -> None:
        """Draw the newest unfinished line of a terminal's."""
        self._wipe()
        for stream, text in reversed(self._states.items()):
            to = self._err if stream == "stderr" else self._out
            if to.isatty():
                to.write(clip(safe(text), shutil.get_terminal_size().columns - 1))
                to.flush()
                self._drawn = to
                return
