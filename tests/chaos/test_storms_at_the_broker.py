"""Short storms at the broker and its database; long ones are for `python -m tests.chaos`.

The jobs' patience is long where the storm isn't about it: a slow machine must not cost a run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.blackout import Blackout
from tests.chaos.clocks import DAY, MINUTES_10, ClockSteps
from tests.chaos.killed_database import KilledDatabase
from tests.chaos.rolling import RollingRestart
from tests.chaos.stage import Facts, Work
from tests.services import require

pytestmark = pytest.mark.slow

PATIENCE = "300s"


def holds(facts: Facts) -> None:
    """Every job ended as if nothing had been, at the machine where it began."""
    assert facts.jobs == facts.finished == facts.identical > 0
    assert facts.recoveries == 0


def test_nothing_is_lost_in_a_blackout_longer_than_the_jobs_patience(tmp_path: Path) -> None:
    facts = Blackout(tmp_path, 1, print, minutes=0.25, patience="12s", after_s=5).play()
    holds(facts)
    assert facts.injected["blackout by kill -9"] == 1


def test_a_rolling_restart_under_load_preempts_nobody(tmp_path: Path) -> None:
    rolling = RollingRestart(
        tmp_path, 1, print, times=1, patience=PATIENCE, work=Work(100), agents=2
    )
    facts = rolling.play()
    holds(facts)
    assert min(facts.injected[what] for what in ("deposits", "downloads", "submissions")) > 0


def test_wall_clocks_that_jump_change_nothing(tmp_path: Path) -> None:
    steps = (("box0", DAY), ("broker", -MINUTES_10), ("broker", MINUTES_10), ("box0", -DAY))
    holds(ClockSteps(tmp_path, 1, print, steps=steps, patience=PATIENCE, work=Work(160)).play())


def test_jobs_outlive_the_kill_of_their_brokers_database(tmp_path: Path) -> None:
    require("postgres-server")
    storm = KilledDatabase(
        tmp_path, 1, print, kills=1, away_s=3.0, patience=PATIENCE, work=Work(150), agents=1
    )
    facts = storm.play()
    holds(facts)
    assert facts.injected["servers killed"] == 1
