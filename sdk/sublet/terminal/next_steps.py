"""How a job stands, in words: what the broker says, and the command for what comes next."""

from sublet.terminal.text import safe
from sublet_contracts.amounts import format_bytes
from sublet_contracts.api import JobView, NextStep
from sublet_contracts.reasons import Reason
from sublet_contracts.states import JobState

NEXT_STEPS: dict[NextStep, str] = {
    NextStep.NONE: "",
    NextStep.DOWNLOAD_OUTPUTS: "sublet download brings the outputs",
    NextStep.DOWNLOAD_PARTIAL_OUTPUTS: "sublet download brings what it had written",
    NextStep.SIGN_RECEIPTS: "sublet logs -f signs receipts, then sublet resume",
    NextStep.RAISE_BUDGET: "sublet resume --budget TOTAL raises it and goes on",
    NextStep.READ_LOGS: "look at sublet logs, then sublet resume",
    NextStep.RESUME: "sublet resume goes on from the last checkpoint",
}


def status_text(view: JobView) -> str:
    """Return what a job does or waits for, fit for a terminal. A step that only a newer broker
    knows is left out."""
    step = NEXT_STEPS[view.next_step] if isinstance(view.next_step, NextStep) else ""
    if view.next_step is NextStep.RESUME and not view.durable_step:
        step = "sublet resume starts it over: nothing that could be resumed was saved"
    return "; ".join(part for part in (safe(view.says), _asks_for_more(view), step) if part)


def _asks_for_more(view: JobView) -> str:
    """Return which option a job that has failed for want of something lacks; '' where none."""
    need = view.resources
    limits = {
        Reason.OUT_OF_MEMORY: ("--memory", need.memory_bytes),
        Reason.DISK_LIMIT: ("--disk", need.disk_bytes),
    }
    if view.state is not JobState.FAILED or view.reason not in limits:
        return ""
    option, size_bytes = limits[view.reason]
    return f"submit it again with {option} above {format_bytes(size_bytes)}"
