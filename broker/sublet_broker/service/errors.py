"""Why a use-case says no. A Refusal becomes problem+json at the edge; NotYet leaves a message
unacknowledged."""

from sublet_contracts.problems import PROBLEMS, FactValue, ProblemCode


class Refusal(Exception):
    """The request is refused, nothing has changed.

    `detail`: what is so, in a sentence, never what to do about it; `field`: what in the request is
    wrong; `facts`: what it rests on, for programs, by the names that PROBLEMS lists for the code.
    """

    def __init__(
        self, code: ProblemCode, detail: str, *, field: str = "", **facts: FactValue
    ) -> None:
        super().__init__(f"{PROBLEMS[code].title}: {detail}")
        self.code = code
        self.detail = detail
        self.field = field
        self.facts = facts


class NotYet(Exception):
    """A reliable message came before what it rests on: don't acknowledge it, it is sent again."""


class StaleInstance(Refusal):
    """The message is of an agent process that another one with the same key has replaced."""

    def __init__(self) -> None:
        super().__init__(ProblemCode.STALE_INSTANCE, "another agent with this key has joined since")


def not_found(what: str, ref: str) -> Refusal:
    """Return the refusal for something that isn't there, or isn't the caller's to see."""
    shown = ref[:80]
    return Refusal(ProblemCode.NOT_FOUND, f"you have no {what} {shown!r}", what=what, ref=shown)
