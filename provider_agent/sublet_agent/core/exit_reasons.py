"""How a run ended: exit code -> reason. First match counts."""

import signal

from sublet_agent.core.records import Stop
from sublet_contracts.reasons import Reason

EXIT_PREEMPTED = 75
_KILLED = frozenset({137, -9, 143, -15})


def reason_of_exit(exit_code: int | None, out_of_memory: bool, stop: Stop | None) -> Reason:
    """Return why a run ended. Rules, in order:

    1. Asked to stop: that is why, whatever the code.
    2. Exit 0: it had finished, even while being drained (if it knows our code 75: see
       `Workspace.finished`).
    3. Asked to drain: that is why; how it died in the end doesn't matter.
    4. Out of memory, as the runner saw it.
    5. Exit 75 unasked: it yields.
    6. Killed, and not by us: somebody did it on this machine.
    7. Anything else is the job's own failure.
    """
    if stop is not None and stop.desired == "stop":
        return stop.reason
    if exit_code == 0:
        return Reason.SUCCEEDED
    if stop is not None:
        return stop.reason
    if out_of_memory:
        return Reason.OUT_OF_MEMORY
    if exit_code == EXIT_PREEMPTED:
        return Reason.YIELDED
    if exit_code is None or exit_code in _KILLED:
        return Reason.RUN_KILLED
    return Reason.JOB_FAILED


def exit_text(exit_code: int | None) -> str:
    """Return what a renter is told of an exit code: 128 and up are signals, by the shell's way."""
    if exit_code is None:
        return ""
    number = -exit_code if exit_code < 0 else exit_code - 128
    try:
        return f"killed by {signal.Signals(number).name}"
    except ValueError:
        return f"exit code {exit_code}"
