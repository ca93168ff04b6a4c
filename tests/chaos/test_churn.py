"""A short churn run; long ones are for `python -m tests.chaos`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.churn import Churn

KILLS = 15
SEED = 4


@pytest.mark.slow
def test_every_promise_holds_under_churn(tmp_path: Path) -> None:
    result = Churn(tmp_path, KILLS, SEED, print).play()
    assert result.kills.total() == KILLS
    assert result.jobs == result.finished == result.identical > 0
