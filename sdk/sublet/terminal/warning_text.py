"""A job's warnings in words: what the broker says, and what to do about it."""

from collections.abc import Iterator

from sublet.terminal.text import clip, paint, safe
from sublet.terminal.warning_fixes import fix_of_warning
from sublet_contracts.api import JobView, WarningView
from sublet_contracts.job_warnings import warning_mark


def warning_text_of(warning: WarningView, view: JobView) -> str:
    """Return a warning as a sentence with its fix, fit for a terminal."""
    says, fix = safe(warning.says), fix_of_warning(warning, view)
    return f"{says}: {fix}" if fix else says


def warning_lines(view: JobView) -> Iterator[str]:
    """Yield each warning of a job as a line."""
    for warning in view.warnings:
        yield paint(warning_text_of(warning, view), "yellow")


def warning_marks(view: JobView, *, most: int = 1) -> str:
    """Return a job's warnings for a table: the first `most`, and how many more there are."""
    marks = ", ".join(clip(safe(warning_mark(w.code)), 20) for w in view.warnings[:most])
    more = len(view.warnings) - most
    return f"{marks} +{more}" if more > 0 else marks
