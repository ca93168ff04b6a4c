"""What a running job's renter is warned of: the one list of codes, with words, begin and end.

A warning says that something will hurt, while it can still be helped: the job goes on. The broker
decides when one begins and ends (broker/sublet_broker/market/warnings.py, one rule for each code)
and gives the facts; the sentence is here; what to do about it is the client's to say
(sdk/sublet/terminal/warning_fixes.py), who knows its own commands.

To add one: a member here, a row in WARNINGS, a rule in the broker, a fix in the SDK; a test names
whichever is missing. Facts are integers with their unit in the name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from sublet_contracts.amounts import format_credits, format_duration

Facts = Mapping[str, int]


class WarningCode(StrEnum):
    """The one list of warnings."""

    NOTHING_SAVED = "nothing_saved"
    SAVES_STOPPED = "saves_stopped"
    SAVE_UNANSWERED = "save_unanswered"
    CHECKPOINT_UNREAD = "checkpoint_unread"
    BEGAN_AGAIN = "began_again"
    STANDS_STILL = "stands_still"
    SILENT = "silent"
    DEVICES_IDLE = "devices_idle"


@dataclass(frozen=True)
class WarningKind:
    """What is the same for all warnings of a code."""

    mark: str
    """In a table: two words."""
    says: Callable[[Facts], str]
    """The sentence. Raises KeyError where a fact is missing."""
    facts: tuple[str, ...]
    begins: str
    ends: str


def _at_risk(facts: Facts) -> str:
    return (
        f"a loss now costs {format_duration(facts['at_risk_ms'])} of work "
        f"({format_credits(facts['at_risk_ucr'])} credits, unless the machine is at fault)"
    )


def _then_paused(facts: Facts) -> str:
    if not facts["stall_ms"]:
        return ""
    return f"; after {format_duration(facts['stall_ms'])} it is paused"


WARNINGS: dict[WarningCode, WarningKind] = {
    WarningCode.NOTHING_SAVED: WarningKind(
        "nothing saved",
        lambda f: f"nothing that could be resumed has been saved yet; {_at_risk(f)}",
        ("at_risk_ms", "at_risk_ucr"),
        "it has run for the first checkpoint interval and half a minute, and nothing of the job is "
        "durable",
        "a checkpoint is durable",
    ),
    WarningCode.SAVES_STOPPED: WarningKind(
        "saves stopped",
        lambda f: (
            f"nothing new has been saved since step {f['durable_step']}, and the job goes on; "
            f"{_at_risk(f)}"
        ),
        ("durable_step", "at_risk_ms", "at_risk_ucr"),
        "the newest durable checkpoint is older than three intervals and five minutes, and the job "
        "has gone on since, or tells no steps",
        "a newer checkpoint is durable",
    ),
    WarningCode.SAVE_UNANSWERED: WarningKind(
        "no answer",
        lambda f: (
            f"a checkpoint was asked for {format_duration(f['unanswered_ms'])} ago and none has "
            f"come; {_at_risk(f)}"
        ),
        ("unanswered_ms", "at_risk_ms", "at_risk_ucr"),
        "something of the job is durable, and for one and a half intervals since a checkpoint was "
        "asked for, half a minute at the least, none was found; of a job that saves at times of "
        "its own, one and a half of the longest time between its last few",
        "one is found",
    ),
    WarningCode.CHECKPOINT_UNREAD: WarningKind(
        "not resumed",
        lambda f: (
            f"the checkpoint of step {f['start_step']} was put in its place, and the script has "
            "not opened it: it may have begun from the start"
        ),
        ("start_step",),
        "it has run for a minute and told a new step or made something durable, or has run for a "
        "quarter of an hour, and the machine's file system says that no file of the restored "
        "checkpoint was opened; not where that can't be known",
        "one of them is opened",
    ),
    WarningCode.BEGAN_AGAIN: WarningKind(
        "began again",
        lambda f: (
            f"it was resumed from step {f['start_step']} and counts from the start again: it "
            f"tells step {f['step']}"
        ),
        ("start_step", "step"),
        "for half a minute the job has told a step that lies before the one that it was resumed "
        "from",
        "it tells a step that does not",
    ),
    WarningCode.STANDS_STILL: WarningKind(
        "stands still",
        lambda f: (
            f"it has stood at step {f['step']} for {format_duration(f['still_ms'])}"
            f"{_then_paused(f)}"
        ),
        ("step", "still_ms", "stall_ms"),
        "the job tells steps, and for ten minutes and three times its longest step, or half of "
        "what it is paused after, there was no new one and no durable checkpoint; not once it has "
        "told its last step",
        "there is one",
    ),
    WarningCode.SILENT: WarningKind(
        "no sign",
        lambda f: (
            f"there has been no sign of life for {format_duration(f['still_ms'])}: no output, no "
            f"checkpoint, its devices idle{_then_paused(f)}"
        ),
        ("still_ms", "stall_ms"),
        "the job tells no steps, and for half of what it is paused after it has written no output, "
        "saved nothing durable, and computed nothing; not where its machine can't tell",
        "it does one of them",
    ),
    WarningCode.DEVICES_IDLE: WarningKind(
        "GPU idle",
        lambda f: f"its GPU has computed nothing for {format_duration(f['idle_ms'])}",
        ("idle_ms",),
        "for ten minutes the driver has said 0 % of each of its GPUs",
        "one computes, or its driver doesn't tell any more",
    ),
}


def warning_text(code: str, facts: Facts) -> str:
    """Return the sentence of a warning; of one that only a newer broker knows, its code."""
    try:
        return WARNINGS[WarningCode(code)].says(facts)
    except (ValueError, KeyError):
        return code.replace("_", " ")[:80]


def warning_mark(code: str) -> str:
    """Return a warning in two words; of one that only a newer broker knows, its code."""
    try:
        return WARNINGS[WarningCode(code)].mark
    except ValueError:
        return code.replace("_", " ")[:20]
