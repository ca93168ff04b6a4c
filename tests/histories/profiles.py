"""How far the histories go: bounded and the same each time, or new ones each time, some or many.

`SUBLET_HISTORIES` says the form:

| form | examples | commands | drawn | takes |
|---|---|---|---|---|
| `short`, without it | as the test says | as the test says | the same everywhere | 30 s |
| `sample` | three times as many | as many | anew each time | at most 2 min |
| `long` | ten or `long` times as many | three times as many | anew each time | at most 8 min |

What it takes is for two processes, as `make` has them, on two idle cores. What is checked after
each command grows with the history, so that one of three times the commands takes up to nine times
as long: a test that would take more than about a minute says a smaller `long`. `sample` and `long`
keep examples that fail in .hypothesis/ and try them first.
"""

from __future__ import annotations

import os
from enum import StrEnum

from hypothesis import HealthCheck, settings

VARIABLE = "SUBLET_HISTORIES"


class Form(StrEnum):
    """How far the histories go."""

    SHORT = "short"
    SAMPLE = "sample"
    LONG = "long"


FORM = Form(os.environ.get(VARIABLE) or Form.SHORT)


def by_form(short: int, sample: int, long: int) -> int:
    """Return the number that belongs to this form."""
    return {Form.SHORT: short, Form.SAMPLE: sample, Form.LONG: long}[FORM]


def profile(*, examples: int, steps: int = 50, long: int = 10) -> settings:
    """Return the settings of a test whose short form is `examples` of at most `steps` commands; its
    long one has `long` times as many."""
    anew = FORM is not Form.SHORT
    return settings(
        max_examples=examples * by_form(1, 3, long),
        stateful_step_count=steps * by_form(1, 1, 3),
        deadline=None,
        derandomize=not anew,
        database=settings().database if anew else None,
        report_multiple_bugs=anew,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.filter_too_much,
            HealthCheck.data_too_large,
        ],
        print_blob=True,
    )
