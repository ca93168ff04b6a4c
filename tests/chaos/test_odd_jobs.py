"""A sample of odd jobs; thousands are for `python -m tests.chaos.odd_jobs`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.odd_behaviour import DEEDS, ENDS, draw
from tests.chaos.odd_jobs import Late, Result, play
from tests.services import require

HANDFUL = (3, 10, 15, 42, 1004, 2046)


def test_a_handful_of_odd_jobs_moves_nobody(tmp_path: Path) -> None:
    result = play(tmp_path, "process", map(draw, HANDFUL), Result())
    assert result.problems == []
    assert result.jobs == len(HANDFUL)


@pytest.mark.slow
def test_forty_odd_jobs_move_nobody(tmp_path: Path) -> None:
    result = play(tmp_path / "a", "process", map(draw, range(7_000, 7_040)), Result())
    assert result.problems == []
    assert result.jobs == 40
    if result.late:
        # Where others have the machine, a moment may be theirs; a job's doing comes again.
        again = play(tmp_path / "b", "process", map(draw, range(7_000, 7_040)), Result())
        assert (again.problems, again.late) == ([], []), result.late


@pytest.mark.slow
@pytest.mark.docker
def test_odd_jobs_in_containers_move_nobody(tmp_path: Path) -> None:
    require("docker")
    result = play(tmp_path, "docker", map(draw, range(8_000, 8_015)), Result())
    assert result.problems == []
    assert result.jobs == 15


@pytest.mark.parametrize(
    ("beat", "beside_s", "others_waited_s", "excess_s"),
    [
        pytest.param(Late(0, 0.5, ran_s=0.5, waited_s=0), 0, 0.5, 0.5, id="it computes"),
        pytest.param(Late(0, 0.5, ran_s=0, waited_s=0), 0, 0, 0.5, id="it stands still"),
        pytest.param(Late(0, 0.5, ran_s=0, waited_s=0.4), 0, 0, 0.1, id="no processor for it"),
        pytest.param(Late(0, 0.5, ran_s=0.1, waited_s=0), 0, 0.3, 0.2, id="none for a thread"),
        pytest.param(Late(0, 0.5, ran_s=0.1, waited_s=0), 0.2, 0, 0.3, id="late beside as well"),
    ],
)
def test_what_is_the_agents_own_doing(
    beat: Late, beside_s: float, others_waited_s: float, excess_s: float
) -> None:
    assert beat.excess_s(beside_s, others_waited_s) == pytest.approx(excess_s)


def test_a_seed_draws_the_same_job_and_all_deeds_are_drawn() -> None:
    jobs = [draw(seed) for seed in range(3_000)]
    assert [job.code for job in jobs] == [draw(seed).code for seed in range(3_000)]
    assert len({deed.name for job in jobs for deed in job.deeds}) == len(DEEDS)
    assert len({job.end.name.split()[0] for job in jobs}) >= len(set(ENDS)) - 4
    for kind in ("process", "docker"):
        assert all(job.reasons(kind) for job in jobs)
