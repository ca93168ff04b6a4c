"""What a container engine's own events say of a run: who stopped it, and when it stood still. Pure.

Rules:

1. A signal that the engine sent and that we did not ask it for was asked for by somebody with
   access to the engine: the machine's owner, or the engine itself as it went down. A job has no
   such access.
2. An engine that knows the container and did not see it end was started anew since: it was away.
3. Such a signal counts for a code that says so, and for what the job returned within
   `HEARD_WITHIN_MS` of it. Who went on for longer had not heard it as an ask to end.
4. Out of memory is what ended a run if nothing of the above came later, and the kernel's kill was
   shortly before. The engine's record is of the run's control group, so of its processes and of no
   others. Where it hit a worker, the main process returns a code of its own soon after (a data
   loader raises, a launcher gives up): that end comes of the memory as well.
5. While the engine holds a run still nothing runs, so no time passes for it.
6. The engine's code is one number for a signal n and for 128 + n that the job returned. Where the
   kernel's word on the end of the job's own process is at hand (adapters/process/exit_events.py)
   it tells which; it counts where it fits the code and the time.
7. Who returns 128 + n soon after a signal n has ended another process of the run may only pass that
   on, as shells do: that is said as well. Where something may have been unseen in that time, the
   number stays as doubtful as it is without the kernel's word.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sublet_contracts.run_conventions import EXIT_PREEMPTED

Kind = Literal[
    "own", "signal", "oom", "pause", "unpause", "began", "die",
    "exited", "killed", "worker", "blind",
]  # fmt: skip
"""own: a signal that we are about to send; began: the start that is ours, by the engine's clock.
By the kernel's word: the job's own process exited with a code, or was killed by a signal; another
one (worker) was; until now something may have been unseen (blind)."""
_KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}

HEARD_WITHIN_MS = 10 * 60_000
OOM_WITHIN_MS = 2 * 60_000
PASSED_ON_WITHIN_MS = 2 * 60_000
_OWN_END_WITHIN_MS = 10_000
"""The container is over so soon after the job's own process."""
_NS = 1_000_000
_ANSWERED_WITHIN_NS = 120_000 * _NS
"""The engine sends what we asked for within this time, or never."""
_SLACK_NS = 2_000 * _NS
_GOING_DOWN_MS = 20_000
"""An engine that is told to end first stops its containers, and only then falls silent."""
_HARMLESS = frozenset(
    {
        *(0, signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH),
        *(signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
    }
)
"""They end nothing."""


@dataclass(frozen=True, order=True)
class EngineFact:
    """One thing that happened to a run's container. `number`: the signal, or the exit code."""

    at_ns: int
    kind: Kind
    number: int = 0

    @property
    def at_ms(self) -> int:
        """When, in ms since 1970."""
        return self.at_ns // _NS


@dataclass(frozen=True)
class EngineMemory:
    """What the engine that answers now remembers at all."""

    events: int
    full: bool
    """it has forgotten what was before"""


@dataclass(frozen=True)
class EngineEnd:
    """What follows for a run that has exited."""

    engine_stopped: str = ""
    out_of_memory: bool = False
    unseen: str = ""
    """says that nobody can tell any more who may have asked it to end"""
    returned: bool = False
    """the job's own process returned the code"""
    signal: int | None = None
    """the signal that ended the job's own process"""
    worker_signal: int | None = None
    """the code may stand for this one, which ended another of its processes shortly before"""


def to_line(fact: EngineFact) -> str:
    """Write a fact as a line of a file."""
    return f"{fact.kind} {fact.at_ns} {fact.number}\n"


def from_lines(text: str) -> list[EngineFact]:
    """Read such lines; what is torn or unknown is left out."""
    found = []
    for line in text.splitlines(keepends=True):
        kind, _, rest = line.partition(" ")
        at_ns, _, number = rest.partition(" ")
        whole = line.endswith("\n") and at_ns.isdigit() and number.strip().isdigit()
        if whole and kind in _KINDS:
            found.append(EngineFact(int(at_ns), _KINDS[kind], int(number)))
    return found


def signals_of_others(facts: Iterable[EngineFact]) -> list[EngineFact]:
    """Return the signals that end something and that we did not ask for. One ask of ours explains
    one signal."""
    ordered = sorted(facts)
    asked = [fact for fact in ordered if fact.kind == "own"]
    found = []
    for sent in (fact for fact in ordered if fact.kind == "signal"):
        for ours in asked:
            since_ns = sent.at_ns - ours.at_ns
            if ours.number == sent.number and -_SLACK_NS <= since_ns <= _ANSWERED_WITHIN_NS:
                asked.remove(ours)
                break
        else:
            if sent.number not in _HARMLESS:
                found.append(sent)
    return found


def paused_ms(facts: Iterable[EngineFact], until_ms: int) -> int:
    """Return for how long the engine has held the run still, up to a time."""
    total_ns, since_ns = 0, None
    for fact in sorted(facts):
        if fact.kind == "pause" and since_ns is None:
            since_ns = fact.at_ns
        elif fact.kind in ("unpause", "die") and since_ns is not None:
            total_ns += fact.at_ns - since_ns
            since_ns = None
    if since_ns is not None:
        total_ns += max(0, until_ms * _NS - since_ns)
    return total_ns // _NS


def is_paused(facts: Iterable[EngineFact]) -> bool:
    """Say whether the engine holds the run still, by the last that is known of it."""
    kinds = [fact.kind for fact in sorted(facts) if fact.kind in ("pause", "unpause")]
    return kinds[-1:] == ["pause"]


def began_ns(facts: Iterable[EngineFact]) -> int | None:
    """Return when the start that is ours was, by the engine's clock."""
    return min((fact.at_ns for fact in facts if fact.kind == "began"), default=None)


def end_of_first(facts: Iterable[EngineFact]) -> EngineFact | None:
    """Return how a container first ended, where the engine has started it once more since."""
    return min((fact for fact in facts if fact.kind == "die"), default=None)


def end_evidence(
    facts: Sequence[EngineFact],
    *,
    exit_code: int | None,
    finished_ms: int,
    oom_flag: bool,
    memory: EngineMemory,
    away: Sequence[tuple[int, int]],
) -> EngineEnd:
    """Say what the engine's record means for a run that has exited.

    `oom_flag`: the engine's own, which says not when. `away`: from when to when, in ms, nobody
    answered for the engine.
    """
    asked = [
        fact for fact in signals_of_others(facts) if _may_have_ended(fact, exit_code, finished_ms)
    ]
    was_away = any(
        since - _GOING_DOWN_MS <= finished_ms <= until + _SLACK_NS // _NS for since, until in away
    )
    seen = any(fact.kind == "die" for fact in facts)
    ooms = [fact.at_ms for fact in facts if fact.kind == "oom"]
    last_ask_ms = max((fact.at_ms for fact in asked), default=None)
    if exit_code in (0, EXIT_PREEMPTED) or (not ooms and not oom_flag):
        # Done, or to be resumed, as the job says itself: it has coped.
        out_of_memory = False
    elif ooms:
        out_of_memory = finished_ms - ooms[-1] <= OOM_WITHIN_MS and (
            last_ask_ms is None or last_ask_ms <= max(ooms)
        )
    else:
        out_of_memory = last_ask_ms is None
    if asked and not was_away:
        name = signal_name(asked[-1].number)
        says = f"the engine was told to stop the container ({name}, as docker stop or kill send it)"
    elif asked or (not seen and (was_away if memory.full else True)):
        says = "the engine went away while it ran"
    else:
        says = ""
    unseen = ""
    if exit_code == 0 and not seen and not says:
        # The agent was away, and much has happened since: a stop from outside would look the same.
        unseen = "nobody saw its end, and the engine no longer remembers it"
    own = own_end(facts, exit_code, finished_ms)
    return replace(own, engine_stopped=says, out_of_memory=out_of_memory, unseen=unseen)


def own_end(facts: Sequence[EngineFact], exit_code: int | None, finished_ms: int) -> EngineEnd:
    """Say what the kernel's word is on how the job's own process ended; nothing where it has none,
    or it doesn't fit."""
    told = [
        fact
        for fact in facts
        if fact.kind in ("exited", "killed") and _is_about(fact, exit_code, finished_ms)
    ]
    if exit_code is None or not told:
        return EngineEnd()
    if told[-1].kind == "killed":
        return EngineEnd(signal=told[-1].number)
    soon = [fact for fact in facts if 0 <= told[-1].at_ms - fact.at_ms <= PASSED_ON_WITHIN_MS]
    if any(fact.kind == "worker" and fact.number == exit_code - 128 for fact in soon):
        return EngineEnd(returned=True, worker_signal=exit_code - 128)
    return EngineEnd(returned=exit_code <= 128 or not any(fact.kind == "blind" for fact in soon))


def _is_about(fact: EngineFact, exit_code: int | None, finished_ms: int) -> bool:
    number = fact.number if fact.kind == "exited" else 128 + fact.number
    return number == exit_code and abs(finished_ms - fact.at_ms) <= _OWN_END_WITHIN_MS


def signal_name(number: int) -> str:
    """Return a signal's name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _may_have_ended(sent: EngineFact, exit_code: int | None, finished_ms: int) -> bool:
    says_so = exit_code is None or exit_code - 128 in (sent.number, signal.SIGKILL)
    return says_so or finished_ms - sent.at_ms <= HEARD_WITHIN_MS
