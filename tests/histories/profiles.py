"""How far the histories go: bounded and the same each time for CI, or long and random.

`SUBLET_HISTORIES=long` draws new examples each time, ten times as many and three times as long, and
keeps failing ones in .hypothesis/; without it the same few are drawn on every machine.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

VARIABLE = "SUBLET_HISTORIES"
LONG = os.environ.get(VARIABLE) == "long"


def profile(*, examples: int, steps: int = 50) -> settings:
    """Return the settings of a test that takes `examples` of at most `steps` commands in CI."""
    unhurried = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    if LONG:
        return settings(
            max_examples=10 * examples,
            stateful_step_count=3 * steps,
            deadline=None,
            suppress_health_check=unhurried,
            print_blob=True,
        )
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=unhurried,
        print_blob=True,
    )
