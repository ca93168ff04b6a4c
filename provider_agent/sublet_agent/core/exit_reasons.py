"""How a run ended: from what was seen of its end to the reason. First match counts."""

import signal
from dataclasses import dataclass

from sublet_agent.core.records import Stop
from sublet_contracts.reasons import Reason
from sublet_contracts.run_conventions import EXIT_PREEMPTED

_SENT = frozenset(
    {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
)  # fmt: skip
"""Signals that somebody sends. The others are what a program's own mistake brings it."""


@dataclass(frozen=True)
class ExitEvidence:
    """What was seen of a run's end. Each text is empty, or says what was seen, for people."""

    exit_code: int | None
    """What the runner says; 128 + n may stand for signal n. None: nobody can know it."""
    returned: bool = False
    """The job returned the code by itself: the wait status says so."""
    signal: int | None = None
    """The signal that ended it, where the wait status says so."""
    worker_signal: int | None = None
    """It returned 128 + this signal by itself, soon after the signal had ended another of its
    processes: it may only have passed that on."""
    out_of_memory: bool = False
    """The kernel's record, for this run's own process tree."""
    limit_exceeded: str = ""
    """Which other limit of its own the run passed, for which the runner ended it."""
    device_failed: str = ""
    engine_stopped: str = ""
    """The engine's event, or its silence when the run ended."""
    outside_signal: str = ""
    """Who outside of the run was seen to send it a signal that ends or stops programs."""
    unknown_signal: str = ""
    """Such a signal was seen, and its sender can't be told: of the run itself, or from outside."""

    @property
    def asked_by_others(self) -> bool:
        """Whether anybody but us was seen to ask it to end; it may have been the job itself."""
        return bool(self.engine_stopped or self.outside_signal or self.unknown_signal)

    @property
    def killed_by(self) -> int | None:
        """The signal that ended it, or may have."""
        if self.worker_signal is not None:
            return self.worker_signal
        if self.signal is not None or self.returned or self.exit_code is None:
            return self.signal
        return self.exit_code - 128 if 128 < self.exit_code < 128 + signal.NSIG else None


def reason_of_exit(seen: ExitEvidence, stop: Stop | None, *, finished: bool = True) -> Reason:
    """Return why a run ended. Rules, in order:

    1. Told to stop by the broker, the owner or a limit: that is why, whatever the code.
    2. Exit 0, and the job says that its work was done, or nobody had asked it to stop: it
       succeeded, even while it was drained.
    3. Drained: that is why; how it died in the end doesn't matter.
    4. A device failed while it ran: whatever the job then did came of that.
    5. Out of memory, as the kernel recorded it.
    6. It passed another limit of its own, and was ended for that: failed.
    7. The engine stopped it, or went away.
    8. Somebody outside of the run sent it a signal.
    9. Somebody sent it one, and nobody can tell who: unattributed, whatever it made of it.
    10. Exit 75 unasked: it yields.
    11. A code that it returned by itself, or a signal that a program's own mistake brings: failed.
    12. A signal that somebody sends, and nothing says who: unattributed. So is one that ended a
        worker, whose end the job then passed on; and an end of which nobody knows the code.

    `finished`: whether exit code 0 means that the work was done, where it was asked to stop. While
    that isn't known yet (the folder is read after the exit) it counts as done.
    """
    if stop is not None and stop.desired == "stop":
        return stop.reason
    asked = stop is not None or seen.asked_by_others
    if seen.exit_code == 0 and (finished or not asked):
        return Reason.SUCCEEDED
    if stop is not None:
        return stop.reason
    if seen.device_failed and seen.exit_code != 0:
        return Reason.DEVICE_FAILED
    if seen.out_of_memory:
        return Reason.OUT_OF_MEMORY
    if seen.limit_exceeded:
        return Reason.JOB_FAILED
    if seen.engine_stopped:
        return Reason.ENGINE_STOPPED
    if seen.outside_signal:
        return Reason.RUN_KILLED
    if seen.unknown_signal:
        return Reason.KILLED_UNATTRIBUTED
    if seen.exit_code == EXIT_PREEMPTED:
        return Reason.YIELDED
    if seen.exit_code is None or seen.killed_by in _SENT:
        return Reason.KILLED_UNATTRIBUTED
    return Reason.JOB_FAILED


def exit_text(seen: ExitEvidence, reason: Reason) -> str:
    """Return what a renter is told of an end that was judged so."""
    evidence = (
        seen.device_failed
        or seen.limit_exceeded
        or seen.engine_stopped
        or seen.outside_signal
        or seen.unknown_signal
    )
    if evidence:
        return evidence
    says = _code_text(seen)
    if reason is Reason.KILLED_UNATTRIBUTED and seen.exit_code is not None:
        return f"{says}; nothing that was seen says who sent it"
    return says


def _code_text(seen: ExitEvidence) -> str:
    if seen.killed_by is not None:
        try:
            name = signal.Signals(seen.killed_by).name
        except ValueError:
            name = f"signal {seen.killed_by}"
        if seen.worker_signal is not None:
            return f"exit code {seen.exit_code}, after {name} had ended another of its processes"
        if seen.signal is not None:
            return f"killed by {name}"
        return f"exit code {seen.exit_code}: killed by {name}, or so it said itself"
    if seen.exit_code is None:
        return "nobody saw its end, so nobody knows its exit code"
    return f"exit code {seen.exit_code}"
