"""What stopping a job would cost it: where a resume would start from, and what would be lost. Pure.

A job that saves when it is asked to stop loses nothing; whether it does can't be known before. So
what is said is the worst case, and a question is asked only where that is more than a minute of
work with nothing to go on from, or with saves that a warning says are not to be trusted.
"""

from dataclasses import dataclass

from sublet_contracts.amounts import format_ago, format_credits, format_duration
from sublet_contracts.api import JobView
from sublet_contracts.job_warnings import WarningCode
from sublet_contracts.states import JOB, JobState, is_terminal

WORTH_ASKING_MS = 60_000
_DOUBTS = frozenset(
    {
        WarningCode.NOTHING_SAVED,
        WarningCode.SAVES_STOPPED,
        WarningCode.SAVE_UNANSWERED,
        WarningCode.CHECKPOINT_UNREAD,
        WarningCode.BEGAN_AGAIN,
    }
)


@dataclass(frozen=True)
class Loss:
    """What a stop may cost."""

    says: str
    """'' where there is nothing to say: nothing runs."""
    worth_asking: bool


def loss_of(view: JobView, now_ms: int, *, verb: str) -> Loss:
    """Return what it costs to `pause` or to `cancel` a job at this moment."""
    if is_terminal(JOB, view.state) or view.state is JobState.PAUSED or not view.runs:
        return Loss("", False)
    devices = max(1, len(view.runs[-1].device_ids))
    unsaved_ms = view.unsaved_device_ms // devices
    lost = f"{format_duration(unsaved_ms)} of work ({format_credits(view.unsaved_ucr)} credits)"
    unless = "unless the job saves when it is asked to stop"
    if view.durable_ms is None:
        if unsaved_ms <= 0:
            return Loss("", False)
        again = "a resume starts over, and " if verb == "pause" else ""
        says = f"nothing has been saved: {again}{lost} is lost, {unless}"
        return Loss(says, unsaved_ms > WORTH_ASKING_MS)
    saved = f"step {view.durable_step}, saved {format_ago(view.durable_ms, now_ms)}"
    says = (
        f"a resume goes on from {saved}" if verb == "pause" else f"its newest checkpoint is {saved}"
    )
    if unsaved_ms > 0:
        says += f"; {lost} since then is lost, {unless}"
    doubtful = any(warning.code in _DOUBTS for warning in view.warnings)
    return Loss(says, doubtful and unsaved_ms > WORTH_ASKING_MS)
