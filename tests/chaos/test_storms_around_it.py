"""Short storms in networks and on disks; long ones are for `python -m tests.chaos`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import loop_disk
from tests.chaos.failing_disks import FailingDisks
from tests.chaos.partitions import Partitions
from tests.chaos.rough_network import RoughNetwork
from tests.chaos.stage import Work
from tests.services import require

pytestmark = pytest.mark.slow

PATIENCE = "300s"


def test_jobs_through_a_rough_network(tmp_path: Path) -> None:
    storm = RoughNetwork(
        tmp_path, 1, print, jobs=2, agents=2, patience=PATIENCE, work=Work(250), directions=("up",)
    )
    facts = storm.play()
    assert facts.jobs == facts.identical == 2
    assert facts.recoveries == 0
    assert facts.injected["resets"] > 0
    assert facts.injected["dead up"] > 0


def test_a_partition_costs_a_recovery_only_where_it_outlasts_patience(tmp_path: Path) -> None:
    require("namespaces")
    facts = Partitions(tmp_path, 1, print, work=Work(100), agents=2).play()
    assert facts.jobs == facts.identical == 2
    assert facts.recoveries == 1
    assert facts.injected["zombies' writes refused"] == 1


def test_disks_that_become_read_only(tmp_path: Path) -> None:
    if (reason := loop_disk.missing()) is not None:
        pytest.skip(reason)
    facts = FailingDisks(tmp_path, 1, print, rounds=1, patience="60s", work=Work(200)).play()
    assert facts.jobs == facts.identical == 4
