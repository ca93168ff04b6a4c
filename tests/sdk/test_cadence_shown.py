"""What a renter is shown of how often a checkpoint is asked for, and of what a loss costs."""

import io

import pytest
from rich.console import Console, RenderableType

from sublet.terminal.cadence_text import cadence_lines, interval_text, most_lost_text
from sublet.terminal.follow import LiveScreen
from sublet.units import UnitError, interval_ms
from sublet_contracts.api import JobView, RunCadenceView, RunView
from tests.sdk.test_warnings_shown import warned

CADENCE = RunCadenceView(
    interval_ms=190_000,
    auto=True,
    rests_on="measured",
    cost_ms=210,
    durable_after_ms=9_000,
    unanswered_ms=0,
    most_lost_ms=199_000,
    most_lost_ucr=20_000,
)


def test_the_interval_says_what_it_rests_on() -> None:
    said = {
        "job": "every 3 m 10 s",
        "first": "every 3 m 10 s (auto: until the first is durable)",
        "measured": "every 3 m 10 s (auto: by its cost of 210 ms, and how often machines are lost)",
        "link": "every 3 m 10 s (auto, stretched: one takes 9.0 s to be durable)",
        "least": "every 3 m 10 s (auto: the least)",
        "most": "every 3 m 10 s (auto: the most)",
        "moon": "every 3 m 10 s (auto)",
    }
    for rests_on, text in said.items():
        assert interval_text(CADENCE.model_copy(update={"rests_on": rests_on})) == text


def test_the_most_that_a_loss_costs_is_said_in_time_and_money() -> None:
    assert most_lost_text(CADENCE) == (
        "a loss costs at most 3 m 19 s of work (0.02 credits, unless the machine is at fault)"
    )


def test_nothing_is_said_where_nothing_runs() -> None:
    assert cadence_lines(JobView.model_construct(runs=())) == []
    run = RunView.model_construct(cadence=None)
    assert cadence_lines(JobView.model_construct(runs=(run,))) == []


def test_it_stands_in_the_live_view() -> None:
    view = warned()
    runs = tuple(run.model_copy(update={"cadence": CADENCE}) for run in view.runs)
    drawn: list[RenderableType] = []
    screen = LiveScreen(drawn.append, lambda text, style: None)
    screen.status(view.model_copy(update={"runs": runs}), 0.0)
    paper = io.StringIO()
    Console(file=paper, width=120).print(drawn[-1])
    assert most_lost_text(CADENCE) in paper.getvalue()


@pytest.mark.parametrize(
    ("written", "ms"), [("auto", 0), ("AUTO ", 0), ("90s", 90_000), (5, 5_000)]
)
def test_an_interval_is_a_duration_or_auto(written: str | int, ms: int) -> None:
    assert interval_ms(written, "checkpoint_every") == ms


@pytest.mark.parametrize("written", ["soon", "", 0, "0s", "automatic"])
def test_what_is_neither_is_refused_with_what_to_write(written: str | int) -> None:
    with pytest.raises(UnitError, match=r"checkpoint_every.*auto"):
        interval_ms(written, "checkpoint_every")
