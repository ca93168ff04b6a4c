"""How often a job is asked for a checkpoint, and what a loss of its machine costs, in words."""

from sublet_contracts.amounts import format_credits, format_duration
from sublet_contracts.api import JobView, RunCadenceView


def cadence_of(view: JobView) -> RunCadenceView | None:
    """Return that of the run under way; None: nothing runs, or its agent has not said so."""
    return view.runs[-1].cadence if view.runs else None


def interval_text(cadence: RunCadenceView) -> str:
    """Return how often, and why: 'every 3 m 10 s (auto: ...)'."""
    every = f"every {format_duration(cadence.interval_ms)}"
    match cadence.rests_on:
        case "job":
            return every
        case "first":
            return f"{every} (auto: until the first is durable)"
        case "measured":
            cost = format_duration(cadence.cost_ms)
            return f"{every} (auto: by its cost of {cost}, and how often machines are lost)"
        case "link":
            durable = format_duration(cadence.durable_after_ms)
            return f"{every} (auto, stretched: one takes {durable} to be durable)"
        case "least" | "most":
            return f"{every} (auto: the {cadence.rests_on})"
        case _:  # that only a newer agent knows
            return f"{every} (auto)"


def most_lost_text(cadence: RunCadenceView) -> str:
    """Return what a loss costs at most."""
    return (
        f"a loss costs at most {format_duration(cadence.most_lost_ms)} of work "
        f"({format_credits(cadence.most_lost_ucr)} credits, unless the machine is at fault)"
    )


def cadence_lines(view: JobView) -> list[str]:
    """Return both, a line each; nothing where it isn't known."""
    cadence = cadence_of(view)
    return [] if cadence is None else [interval_text(cadence), most_lost_text(cadence)]
