"""What is said to whoever leaves a job that goes on: how it really stands, and the way back."""

from typing import Protocol

from sublet.errors import SubletError
from sublet.terminal.next_steps import status_text
from sublet.terminal.text import safe
from sublet_contracts.amounts import format_credits
from sublet_contracts.api import JobView
from sublet_contracts.keys import short
from sublet_contracts.states import JOB, JobState, is_terminal


class AskedJob(Protocol):
    """A job that can be asked how it stands; sublet.Job is one."""

    id: str

    def view(self) -> JobView:
        """Ask the broker how it is."""


def detached(job: AskedJob) -> str:
    """Ask once more how a job stands, and return that with the ways back to it. Where the broker
    doesn't answer that is said, and nothing is claimed."""
    try:
        return detached_text(job.view())
    except SubletError as error:
        return not_known(job.id, error)


def not_known(job: str, error: SubletError) -> str:
    """Return what is said where the broker couldn't be asked how the job stands."""
    return (
        f"detached; how the job stands is not known: {safe(error.problem.title)}. "
        f"Ask later: sublet inspect {short(job)}"
    )


def detached_text(view: JobView) -> str:
    """Return what is said to who leaves a job that stands so."""
    ref = short(view.id)
    stands = f"{safe(view.name)} is {view.state}: {status_text(view)}"
    spent = f"charged {format_credits(view.charged_ucr)} of {format_credits(view.budget_ucr)}"
    if is_terminal(JOB, view.state):
        return f"detached; {stands}; {spent}. All about it: sublet inspect {ref}"
    if view.state is JobState.PAUSED:
        return f"detached; {stands}; {spent}. Go on: sublet resume {ref}"
    goes_on = "it stays in line" if view.state is JobState.QUEUED else "it goes on"
    return (
        f"detached, and {goes_on}; {stands}; {spent}. "
        f"Back: sublet logs -f {ref}  End it: sublet cancel {ref}"
    )
