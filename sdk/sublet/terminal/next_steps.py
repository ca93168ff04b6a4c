"""How a job stands, in words: what the broker says, and the command for what comes next."""

from sublet.terminal.text import safe
from sublet_contracts.api import JobView, NextStep

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
    says = safe(view.says)
    step = NEXT_STEPS[view.next_step] if isinstance(view.next_step, NextStep) else ""
    return f"{says}; {step}" if step else says
